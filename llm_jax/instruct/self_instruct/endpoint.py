"""Text from an OpenAI-compatible endpoint (`/completions` or `/chat/completions`): vLLM, our own server, others.

What may pass is tried again with growing pauses, or after the pause that the server asks for: no connection,
a time-out, statuses 408, 409, 425, 429 and 5xx, a reply that is not what the interface promises. Any other
status ends the run in one line. The key comes from an environment variable, and is never written anywhere.
"""

import email.utils
import hashlib
import itertools
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

from llm_jax.errors import ConfigError
from llm_jax.instruct.self_instruct.generator import Answer, GeneratorError, Request

MAX_REPLY_BYTES = 16 << 20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
LONGEST_ASKED_SECONDS = 900.0  # of a pause that the server asks for
PASSING = {408, 409, 425, 429}  # statuses that another try may change, beside 5xx
FAILED_IN_A_ROW = 10  # unusable replies, each after all its tries, that end the run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Where and how to ask."""

    url: str = ""  # such as http://localhost:8000/v1; empty: a model of ours writes
    model: str = ""  # the name the server knows it by
    api: Literal["completions", "chat"] = "completions"
    key_variable: str = ""  # environment variable with the key; empty: none is sent
    concurrency: int = 8  # requests under way at once
    timeout_seconds: float = 120.0  # of one try, from connecting to the last byte
    attempts: int = 6  # tries of one request
    presence_penalty: float = 0.0  # the paper's model took 2; for instructions only
    send_seed: bool = True  # off for servers that refuse the field

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if self.url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ConfigError(
                f"endpoint.url={self.url!r} must look like http://localhost:8000/v1 or https://..."
            )
        if parts.username or parts.password or parts.query:
            # not repeated here: it may hold a secret
            raise ConfigError(
                "endpoint.url must hold neither user, password nor query; a key belongs into the "
                "environment variable named by endpoint.key_variable"
            )
        if self.url and not self.model:
            raise ConfigError("endpoint.model='' must be the name that the server knows a model by")
        for name, value in (("concurrency", self.concurrency), ("attempts", self.attempts)):
            if value < 1:
                raise ConfigError(f"endpoint.{name}={value} must be at least 1")
        if self.timeout_seconds <= 0:
            raise ConfigError(
                f"endpoint.timeout_seconds={self.timeout_seconds} must be above 0 seconds"
            )
        if not -2 <= self.presence_penalty <= 2:
            raise ConfigError(
                f"endpoint.presence_penalty={self.presence_penalty} must be from -2 to 2"
            )


class _PassingError(Exception):
    """A failure that another try may not meet."""

    def __init__(self, told: str, pause: float = 0.0, unusable: bool = False) -> None:
        super().__init__(told)
        self.pause = pause  # seconds the server asks for
        self.unusable = unusable  # it answered, but not with what the interface promises


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A generator behind HTTP. Proxies are taken from the environment, as usual."""

    together = 1

    def __init__(self, config: EndpointConfig) -> None:
        """Raises ConfigError if the key's variable is not set."""
        self._config = config
        self._key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        if config.key_variable and not self._key:
            raise ConfigError(
                f"endpoint.key_variable={config.key_variable!r}: that environment variable is not set; export "
                "it, or leave the setting empty for a server without keys"
            )
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"endpoint.key_variable={config.key_variable!r}: the key there holds characters that no HTTP "
                "header may; export it again without line ends and blanks"
            )
        path = "/chat/completions" if config.api == "chat" else "/completions"
        self._url = config.url.rstrip("/") + path
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._stopping = threading.Event()
        self._failed_in_a_row = 0
        self.retries = 0
        parts = urlsplit(config.url)
        if (
            self._key
            and parts.scheme == "http"
            and parts.hostname not in ("localhost", "127.0.0.1")
        ):
            _log.warning("endpoint.url=%s: the key travels unencrypted; use https", config.url)

    def describe(self) -> dict[str, Any]:
        """The model and the interface; not the key."""
        return {"model": self._config.model, "api": self._config.api}

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Answer]]:
        """Asks for all, a few at a time; yields each answer as it comes. See `Generator`."""
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="endpoint")
        try:
            # no more than are asked for at once are unlogged: a kill costs no further requests
            rest, waiting = iter(requests), set[Future[Answer]]()
            failure: GeneratorError | None = None
            held: list[
                Answer
            ] = []  # failed ones, until another works: else they are asked again later
            while True:
                if not failure:
                    free = self._config.concurrency - len(waiting)
                    waiting |= {pool.submit(self._answer, r) for r in itertools.islice(rest, free)}
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                answers: list[Answer] = []
                for future in done:
                    try:
                        answer = future.result()
                        (held if answer.finished == "failed" else answers).append(answer)
                        self._count(answer)
                    except GeneratorError as error:
                        failure = failure or error
                if failure and not self._stopping.is_set():
                    # requests under way are paid for: their answers are kept
                    self._stopping.set()
                if answers:
                    yield [*held, *answers]
                    held = []
            if held and not failure:
                yield held
            if failure:
                raise failure
        finally:
            self._stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._stopping = threading.Event()

    def _count(self, answer: Answer) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if answer.finished == "failed" else 0
        if self._failed_in_a_row >= FAILED_IN_A_ROW:
            raise GeneratorError(
                f"{self._url}: {FAILED_IN_A_ROW} requests in a row got no usable reply, the last one: "
                f"{answer.text}; see that endpoint.url and endpoint.api fit the server"
            )

    def _answer(self, request: Request) -> Answer:
        """One request with all its tries."""
        stopping = self._stopping
        attempts = self._config.attempts
        # apart from one another, and the same in every run
        jitter = random.Random(request.key)
        for attempt in range(1, attempts + 1):
            if stopping.is_set():
                raise GeneratorError("stopped")
            try:
                return self._try(request)
            except _PassingError as failure:
                told, pause, unusable = str(failure), failure.pause, failure.unusable
            if attempt == attempts:
                if unusable:
                    return Answer(key=request.key, text=told, finished="failed")
                raise GeneratorError(
                    f"{self._url}: {told}; after {attempts} attempts the run stops, and goes on from here when "
                    "it is started again"
                )
            grown = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * (0.5 + jitter.random())
            self.retries += 1
            stopping.wait(max(min(pause, LONGEST_ASKED_SECONDS), min(grown, LONGEST_PAUSE_SECONDS)))
        raise AssertionError("attempts is at least 1")

    def _try(self, request: Request) -> Answer:
        """One try. Raises _PassingError, or GeneratorError when another try would not help."""
        data = json.dumps(self._body(request)).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "llm-jax"}
        # lets a server that knows the header answer a repeated request without writing it again
        headers["Idempotency-Key"] = request.key + "/" + request.digest
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline = time.monotonic() + self._config.timeout_seconds
        asked = urllib.request.Request(self._url, data, headers, method="POST")
        try:
            with self._opener.open(asked, timeout=self._config.timeout_seconds) as reply:
                content = _read(reply, deadline, self._config.timeout_seconds)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise _PassingError(f"no reply in {self._config.timeout_seconds:g} s") from None
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise _PassingError(f"no reply in {self._config.timeout_seconds:g} s") from None
            raise _PassingError(f"no connection ({reason or type(error).__name__})") from None
        text, reason = _content(content)
        return Answer(
            key=request.key, text=text, finished="length" if reason == "length" else "stop"
        )

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop": list(request.stop),
        }
        if self._config.send_seed:
            body["seed"] = request.seed
        if self._config.presence_penalty and "/instructions/" in request.key:
            body["presence_penalty"] = self._config.presence_penalty
        if self._config.api == "chat":
            return {**body, "messages": [{"role": "user", "content": request.prompt}]}
        return {**body, "prompt": request.prompt}

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status other than 200 means."""
        try:
            told = error.read(4096).decode("utf-8", "replace")
        except (OSError, HTTPException):
            told = ""
        told = " ".join(_message(told).split())[:200]
        if self._key:
            told = told.replace(self._key, "***")  # some servers repeat it
        told = f"HTTP {error.code} {error.reason}: {told}".rstrip(": ")
        if error.code in PASSING or error.code >= 500:
            return _PassingError(told, pause=_retry_after(error.headers.get("Retry-After", "")))
        remedy = {
            401: "see endpoint.key_variable", 403: "see endpoint.key_variable",
            404: "see endpoint.url and endpoint.model",
        }.get(error.code, "change the settings of endpoint")  # fmt: skip
        return GeneratorError(f"{self._url}: {told}; {remedy}")


def _read(reply: Any, deadline: float, seconds: float) -> bytes:
    """The whole body; `timeout` alone bounds the wait for each part, not for all of them."""
    parts, size = [], 0
    while part := reply.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise _PassingError(f"a reply of more than {MAX_REPLY_BYTES >> 20} MB", unusable=True)
        if time.monotonic() > deadline:
            raise _PassingError(f"no whole reply in {seconds:g} s")
    expected = reply.headers.get("Content-Length", "")
    if expected.isdecimal() and int(expected) != size:
        raise _PassingError(f"a reply cut off after {size} of {expected} bytes")
    return b"".join(parts)


def _content(data: bytes) -> tuple[str, str]:
    """Text and finish reason of a reply. Raises _PassingError when it is not what the interface promises."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        digest = hashlib.sha256(data).hexdigest()[:8]
        raise _PassingError(
            f"a reply of {len(data)} bytes (sha256 {digest}) that is no completion", unusable=True
        ) from None
    if text is None:  # a chat model that refused, or wrote nothing
        text = ""
    if not isinstance(text, str):
        raise _PassingError(f"a reply whose text is a {type(text).__name__}", unusable=True)
    # JSON may spell half of a surrogate pair
    return text.encode("utf-8", "replace").decode("utf-8"), str(reason)


def _message(told: str) -> str:
    """The message in an error reply, or all of it."""
    try:
        found = json.loads(told)
        error = found.get("error", found)
        return str(error.get("message", told)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        return told


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 if neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
