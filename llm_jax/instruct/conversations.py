"""Conversations: turns of a role and a text, from the formats they come in.

| format | fields of a record |
|---|---|
| `messages` | `messages` (or `conversations`): a list of `{"role", "content"}`, as OpenAI has them |
| `sharegpt` | `conversations`: a list of `{"from", "value"}`; `system` |
| `alpaca` | `instruction`, `input`, `output`; `system`, `history` (pairs of strings) |
| `prompt-completion` | `prompt` and `completion` (or `response`, `answer`), `question` and `answer`; strings or messages |

A record that is no usable conversation is counted under its reason and left out, never mended
silently: too many of them stop the stage (`Rejects.check`).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from llm_jax.data.documents import Rejects
from llm_jax.data.records import Record, read_records
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import DataError

Role = Literal["system", "user", "assistant"]
ConversationFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion"]
FORMATS = get_args(ConversationFormat)[1:]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
)


class Turn(NamedTuple):
    """What one side says."""

    role: Role
    content: str
    context: str = ""  # Alpaca's `input`: what an instruction is to be applied to

    @property
    def text(self) -> str:
        """Content and context as one text, for templates that do not keep them apart."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content


class Conversation(NamedTuple):
    """An optional system turn, then user and assistant in turn, an answer last."""

    turns: tuple[Turn, ...]
    id: str = ""  # where it comes from: "part-1.jsonl:37"


class UnusableError(Exception):
    """A record that is no conversation; the message is the reason it is counted under."""


def read_conversations(
    source: SourceConfig, form: ConversationFormat, rejects: Rejects
) -> Iterator[Conversation]:
    """Yields the conversations of `source` in order; counts what is left out in `rejects`.

    Args:
      source: where the records are.
      form: how a record says a conversation; "auto" tells by the fields of the first record.
      rejects: the account.

    Raises:
      DataError: a file is missing or damaged, or the format cannot be told.
    """
    for record in read_records(source, rejects):
        if form == "auto":
            form = detect(record, source.name)
        rejects.records += 1
        try:
            turns = tuple(_clean(turn, rejects) for turn in TURNS[form](record.fields))
            check(turns)
        except UnusableError as reason:
            rejects.add(str(reason), record.place, repr(record.fields))
            continue
        yield Conversation(turns, record.place)


def detect(record: Record, source: str) -> ConversationFormat:
    """The format of a source by the fields of its first record. Raises DataError."""
    fields = record.fields
    turns = fields.get("messages", fields.get("conversations"))
    if isinstance(turns, list):
        first = next((turn for turn in turns if isinstance(turn, dict)), {})
        return "sharegpt" if "from" in first else "messages"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if any(a in fields and b in fields for a, b in PAIRS):
        return "prompt-completion"
    raise DataError(
        f"source {source!r}: cannot tell how {record.place} says a conversation; it has the fields "
        f"{', '.join(map(repr, fields)) or 'none'}; known: messages; conversations; instruction and output; "
        f"{'; '.join(f'{a} and {b}' for a, b in PAIRS)}"
    )


def check(turns: tuple[Turn, ...]) -> None:
    """Raises UnusableError unless the turns are a conversation with answers."""
    if not turns:
        raise UnusableError("empty conversation")
    spoken = turns[1:] if turns[0].role == "system" else turns
    if any(turn.role == "system" for turn in spoken):
        raise UnusableError("a system turn that is not the first")
    for one, other in pairwise(spoken):
        if one.role == other.role:
            raise UnusableError(f"two {one.role} turns in a row")
    if not spoken or spoken[0].role != "user":
        raise UnusableError("does not begin with a user turn")
    if spoken[-1].role != "assistant":
        raise UnusableError("no answer to the last user turn")
    for turn in spoken:
        if not turn.text.strip():
            raise UnusableError("empty answer" if turn.role == "assistant" else "empty user turn")


def _clean(turn: Turn, rejects: Rejects) -> Turn:
    """The turn with lone surrogates replaced, which JSON may spell and UTF-8 cannot."""
    try:
        (turn.content + turn.context).encode("utf-8")
    except UnicodeEncodeError:
        rejects.repair("lone surrogate replaced by '?'")
        content, context = (
            text.encode("utf-8", "replace").decode("utf-8") for text in (turn.content, turn.context)
        )
        return Turn(turn.role, content, context)
    return turn


def _messages(fields: dict[str, Any]) -> Iterator[Turn]:
    turns = fields.get("messages", fields.get("conversations"))
    return _turns(turns, "role", "content", "messages")


def _sharegpt(fields: dict[str, Any]) -> Iterator[Turn]:
    yield from _system(fields)
    yield from _turns(fields.get("conversations", fields.get("messages")), "from", "value", "turns")


def _turns(turns: Any, role_field: str, text_field: str, what: str) -> Iterator[Turn]:
    if not isinstance(turns, list):
        raise UnusableError(f"no list of {what}")
    for turn in turns:
        if not isinstance(turn, dict) or role_field not in turn or text_field not in turn:
            raise UnusableError(f"a turn without {role_field!r} and {text_field!r}")
        role = turn[role_field]
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise UnusableError(f"unknown role {str(role)[:20]!r}")
        if turn.get("tool_calls"):
            raise UnusableError("a turn with tool calls")
        yield Turn(ROLES[role.lower()], _text(turn[text_field]))


def _text(content: Any) -> str:
    """A text, given as such or as OpenAI's list of parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UnusableError("a turn whose content is not text")
    return content


def _system(fields: dict[str, Any]) -> Iterator[Turn]:
    if fields.get("system"):
        yield Turn("system", _text(fields["system"]))


def _alpaca(fields: dict[str, Any]) -> Iterator[Turn]:
    for name in ("instruction", "output"):
        if not isinstance(fields.get(name), str):
            raise UnusableError(f"no text {name!r}")
    yield from _system(fields)
    for exchange in fields.get("history") or []:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise UnusableError("a history that is not pairs")
        yield Turn("user", _text(exchange[0]))
        yield Turn("assistant", _text(exchange[1]))
    context = fields.get("input") or ""
    if not fields["instruction"].strip() and context:  # some sets keep the task in `input` alone
        yield Turn("user", _text(context))
    else:
        yield Turn("user", fields["instruction"], _text(context).strip())
    yield Turn("assistant", fields["output"])


def _prompt_completion(fields: dict[str, Any]) -> Iterator[Turn]:
    pair = next(((a, b) for a, b in PAIRS if a in fields and b in fields), None)
    if pair is None:
        raise UnusableError("no prompt with a completion")
    yield from _system(fields)
    for value, role in zip((fields[name] for name in pair), ("user", "assistant"), strict=True):
        if isinstance(value, list):
            yield from _turns(value, "role", "content", "messages")
        else:
            yield Turn(role, _text(value))


TURNS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
}
