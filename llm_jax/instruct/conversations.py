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
            turns = tuple(cleaned(turn, rejects) for turn in TURNS[form](record.fields))
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
    if "chosen" in fields and "rejected" in fields:
        raise DataError(
            f"source {source!r}: {record.place} is a pair of answers, not a conversation; pairs are prepared for "
            "`llm-jax instruct --method dpo` by `llm-jax data conversations --format preference`"
        )
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


def cleaned(turn: Turn, rejects: Rejects) -> Turn:
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
    return _turns(fields.get("messages", fields.get("conversations")), "role", "content")


def _sharegpt(fields: dict[str, Any]) -> Iterator[Turn]:
    yield from system_of(fields)
    yield from _turns(fields.get("conversations", fields.get("messages")), "from", "value")


def turns_of(turns: Any) -> Iterator[Turn]:
    """The turns of a list as OpenAI or ShareGPT has them, told by its first one. Raises UnusableError."""
    first = turns[0] if isinstance(turns, list) and turns else None
    sharegpt = isinstance(first, dict) and "from" in first
    return _turns(turns, *(("from", "value") if sharegpt else ("role", "content")))


def _turns(turns: Any, role_field: str, text_field: str) -> Iterator[Turn]:
    if not isinstance(turns, list):
        raise UnusableError(f"no list of {'messages' if role_field == 'role' else 'turns'}")
    for turn in turns:
        if not isinstance(turn, dict) or role_field not in turn or text_field not in turn:
            raise UnusableError(f"a turn without {role_field!r} and {text_field!r}")
        role = turn[role_field]
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise UnusableError(f"unknown role {str(role)[:20]!r}")
        if turn.get("tool_calls"):
            raise UnusableError("a turn with tool calls")
        yield Turn(ROLES[role.lower()], text_of(turn[text_field]))


def is_text(content: Any) -> bool:
    """Whether it is a text, given as such or as OpenAI's list of parts."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        )
    )


def text_of(content: Any) -> str:
    """The text. Raises UnusableError if it is none."""
    if not is_text(content):
        raise UnusableError("a turn whose content is not text")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def system_of(fields: dict[str, Any]) -> Iterator[Turn]:
    """The system turn that a field of its own holds, if there is one. Raises UnusableError."""
    if fields.get("system"):
        yield Turn("system", text_of(fields["system"]))


def exchanges_of(fields: dict[str, Any]) -> Iterator[Turn]:
    """The turns of `history`, pairs of strings. Raises UnusableError."""
    for exchange in fields.get("history") or []:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise UnusableError("a history that is not pairs")
        yield Turn("user", text_of(exchange[0]))
        yield Turn("assistant", text_of(exchange[1]))


def _alpaca(fields: dict[str, Any]) -> Iterator[Turn]:
    for name in ("instruction", "output"):
        if not isinstance(fields.get(name), str):
            raise UnusableError(f"no text {name!r}")
    yield from system_of(fields)
    yield from exchanges_of(fields)
    context = fields.get("input") or ""
    if not fields["instruction"].strip() and context:  # some sets keep the task in `input` alone
        yield Turn("user", text_of(context))
    else:
        yield Turn("user", fields["instruction"], text_of(context).strip())
    yield Turn("assistant", fields["output"])


def _prompt_completion(fields: dict[str, Any]) -> Iterator[Turn]:
    pair = next(((a, b) for a, b in PAIRS if a in fields and b in fields), None)
    if pair is None:
        raise UnusableError("no prompt with a completion")
    yield from system_of(fields)
    for value, role in zip((fields[name] for name in pair), ("user", "assistant"), strict=True):
        if isinstance(value, list):
            yield from _turns(value, "role", "content")
        else:
            yield Turn(role, text_of(value))


TURNS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
}
