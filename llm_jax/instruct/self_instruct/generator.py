"""What writes the text: a protocol of two methods, met by our own sampler and by an HTTP endpoint.

A request is known by its key, such as `zh/3/instructions/07` (language, round, stage, number). Its prompt and
its seed follow from the key and from what was accepted in the rounds before, so a run can be repeated
request by request.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llm_jax.errors import UserError


class GeneratorError(UserError, RuntimeError):
    """The generator cannot answer, such as an endpoint that refuses; what was answered so far is kept."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be continued."""

    key: str
    prompt: str
    max_tokens: int  # most tokens of the answer
    temperature: float  # 0: the likeliest
    top_p: float
    stop: tuple[str, ...]  # the answer ends before the first of these
    seed: int  # 0 to 2**31 - 1

    @property
    def digest(self) -> str:
        """Tells whether a logged answer is to this request: the prompt and all settings."""
        told = "\x00".join(map(repr, (self.key, self.prompt, self.max_tokens, self.temperature,
                                      self.top_p, self.stop, self.seed)))  # fmt: skip
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    key: str
    text: str
    finished: str  # "stop": by itself; "length": cut off; "failed": no usable answer, text says why


class Generator(Protocol):
    """Answers requests; the order of the answers is free, their content is not (given the seed)."""

    # Requests that must be asked for together to be answered the same way again: the rows of a batch.
    # 1 when every request stands alone.
    together: int

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Answer]]:
        """Yields answers as they come, in lists that are saved at once.

        Raises:
          GeneratorError: it cannot go on.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the report says about it, as plain JSON values, without secrets."""
        ...


def seed_of(seed: int, key: str) -> int:
    """The seed of a request, 0 to 2**31 - 1 (what endpoints accept)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big") >> 1
