"""An OpenAI-compatible server whose text comes from a small grammar, as a function of the prompt alone.

What it writes is plausible, with flaws planted that the filters must find. It counts what it is asked, and
can be told to fail: `fault(key, attempt)` names what goes wrong with a request, or "".
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llm_jax.instruct.self_instruct.prompts import WORDINGS

ENGLISH_VERBS = ["Describe", "Summarise", "Explain", "Write a poem about", "Plan a lesson on", "List three uses of",
                 "Compare two kinds of", "Invent a name for", "Give advice about", "Tell a story of"]  # fmt: skip
ENGLISH_TOPICS = ["rivers", "old clocks", "honey", "night trains", "bridges", "volcanoes", "bread", "lighthouses",
                  "chess", "umbrellas", "whales", "gardens", "mirrors", "deserts", "paper", "violins"]  # fmt: skip
ENGLISH_ENDS = ["for a class of curious pupils", "in the style of a letter", "so that nobody falls asleep",
                "with one surprising example", "without naming any person", "as if speaking to a sailor"]  # fmt: skip
CHINESE_VERBS = [
    "介绍",
    "解释",
    "总结",
    "比较两种",
    "写一首关于",
    "列出三种使用",
    "推荐一本讲",
    "设计一堂",
    "评价",
    "改写一段",
]
CHINESE_TOPICS = [
    "江河",
    "旧钟表",
    "蜂蜜",
    "夜行火车",
    "石拱桥",
    "火山",
    "面包",
    "灯塔",
    "象棋",
    "雨伞",
    "鲸鱼",
    "园林",
]
CHINESE_ENDS = ["的文章，写给好奇的小学生", "的短信，语气要幽默", "的诗歌，不要提到人名", "的课程，并且举一个出人意料的例子",
                "的方法，让外行也能听懂", "的故事，结尾要反转"]  # fmt: skip
FLAWED = {
    "en": ["Draw a picture of a horse in the rain.", "!! do it now, all of it", "Sing", "请写一首关于春天的诗歌。",
           "Describe rivers for a class of curious pupils."],
    "zh": ["画出一匹雨中的马。", "！！马上做完", "写诗", "Write a short poem about the spring.", "介绍江河的诗歌，不要提到人名。"],
}  # fmt: skip


def answer(prompt: str) -> str:
    """What the server writes."""
    rng = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    language = "en" if prompt.isascii() or "Task:" in prompt or "numbered list" in prompt else "zh"
    w = WORDINGS[language]
    if prompt.startswith(w.instructions):
        rows = [_instruction(rng, language) for _ in range(8)]
        rows[3], rows[6] = rng.sample(FLAWED[language], 2)
        return " " + "\n".join(row if not n else f"{n + 9}. {row}" for n, row in enumerate(rows))
    instruction = prompt.rpartition(w.task)[2].strip().split("\n")[0].strip()
    if prompt.startswith(w.classify):
        return f" {w.yes if instruction.startswith(('Compare', '评价', '比较')) else w.no}"
    return _instances(rng, language, instruction, prompt.startswith(w.label_first))


def _instruction(rng: random.Random, language: str) -> str:
    verbs, topics, ends = (
        (ENGLISH_VERBS, ENGLISH_TOPICS, ENGLISH_ENDS)
        if language == "en"
        else (CHINESE_VERBS, CHINESE_TOPICS, CHINESE_ENDS)
    )
    gap = " " if language == "en" else ""
    return f"{rng.choice(verbs)}{gap}{rng.choice(topics)}{gap}{rng.choice(ends)}."


def _instances(rng: random.Random, language: str, instruction: str, label_first: bool) -> str:
    w = WORDINGS[language]
    words = ENGLISH_TOPICS if language == "en" else CHINESE_TOPICS
    given = ["; ".join(rng.sample(words, 4)) for _ in range(3)]
    if label_first:
        return f" A\n{w.input} {given[0]}\n{w.label} B\n{w.input} {given[1]}\n{w.label} B\n{w.input} {given[1]}"
    flaw = rng.randrange(6)
    first = f" {w.none}\n{w.output} {'; '.join(rng.sample(words, 6))}"
    if flaw == 0:  # nothing but an echo: the instruction is left without an instance
        return f" {given[0]}\n{w.output} {instruction}"
    if flaw == 1:  # the same input with two outputs
        return f"{first}\n{w.example} 2\n{w.input} {given[0]}\n{w.output} {given[1]}\n{w.example} 3\n{w.input} {given[0]}\n{w.output} {given[2]}"
    return f"{first}\n{w.example} 2\n{w.input} {given[0]}\n{w.output} {given[1]}"


class Stub:
    """The server's settings, and what it saw."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.delay = 0.0  # seconds before every answer
        self.fault: Callable[[str, int], str] = lambda key, attempt: ""
        self.retry_after = "0"
        self.write: Callable[[str], str] = answer
        self.tries: Counter[str] = Counter()  # by request key
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"].rpartition("/")[0]
        with stub.lock:
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
            stub.tries[key] += 1
            attempt = stub.tries[key]
            stub.bodies.append(body)
            stub.headers.append(dict(self.headers))
            stub.paths.add(self.path)
        time.sleep(stub.delay)
        with stub.lock:  # before the answer: whoever has read it may ask again at once
            stub.at_once -= 1
        with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            self._reply(stub, body, key, stub.fault(key, attempt))

    def _reply(self, stub: Stub, body: dict[str, Any], key: str, fault: str) -> None:
        if fault.isdecimal():
            told = {"error": {"message": f"fault\n{self.headers.get('Authorization', '')}"}}
            self._send(int(fault), json.dumps(told).encode(), {"Retry-After": stub.retry_after})
            return
        if fault == "hang":
            time.sleep(1.0)
        if fault == "drop":
            self.connection.close()
            return
        chat = self.path.endswith("/chat/completions")
        text = stub.write(body["messages"][0]["content"] if chat else body["prompt"])
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        data = json.dumps({"choices": [choice]}).encode()
        if fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        unusable = {"html": b"<html>no such thing</html>", "no choices": b"{}", "list": b"[1]",
                    "number": b'{"choices": [{"text": 3}]}', "deep": b"[" * 100_000}  # fmt: skip
        self._send(200, unusable.get(fault, data), {})
        with stub.lock:
            stub.answered[key] += 1

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status in (301, 302):
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving():
    """Yields a running `Stub`."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    stub = handler.stub = Stub(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
