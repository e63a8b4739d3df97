"""Pairs of a better and a worse answer to one prompt: what DPO and SimPO learn from.

| fields of a record | |
|---|---|
| `chosen`, `rejected` | both answers: strings, one turn each, lists of turns, or whole conversations (lists of turns) |
| `prompt` (or `question`, `instruction` with `input`) | what they answer: a string, or a list of turns |
| `messages` or `conversations` | the same as a list of turns |
| `system`, `history` | as in the other formats |

Turns are `{"role", "content"}` or `{"from", "value"}`. Of two whole conversations everything before the last
answers must be equal; the prompt beside them is then not needed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_jax.data.documents import Rejects
from llm_jax.data.records import read_records
from llm_jax.data.sources import SourceConfig
from llm_jax.instruct.conversations import (
    Turn,
    UnusableError,
    check,
    cleaned,
    exchanges_of,
    is_text,
    system_of,
    text_of,
    turns_of,
)

SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """Two conversations that differ in their last answer."""

    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    id: str = ""  # where it comes from: "part-1.jsonl:37"


def read_pairs(source: SourceConfig, rejects: Rejects) -> Iterator[Pair]:
    """Yields the pairs of `source` in order; counts what is left out in `rejects`.

    Raises:
      DataError: a file is missing or damaged.
    """
    for record in read_records(source, rejects):
        rejects.records += 1
        try:
            asked = tuple(_asked(record.fields))
            sides = [_side(record.fields, name, asked) for name in SIDES]
            chosen, rejected = (tuple(cleaned(turn, rejects) for turn in side) for side in sides)
            check_pair(chosen, rejected)
        except UnusableError as reason:
            rejects.add(str(reason), record.place, repr(record.fields))
            continue
        yield Pair(chosen, rejected, record.place)


def check_pair(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> None:
    """Raises UnusableError unless both are conversations that differ in their last answer and in nothing else."""
    for turns in (chosen, rejected):
        check(turns)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("chosen and rejected differ before their last answer")
    if chosen[-1] == rejected[-1]:
        raise UnusableError("chosen and rejected are the same")


def _asked(fields: dict[str, Any]) -> Iterator[Turn]:
    """The turns in front of both answers, as far as they have fields of their own."""
    yield from system_of(fields)
    yield from exchanges_of(fields)
    names = ("messages", "conversations", "prompt", "question", "instruction")
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        return
    if is_text(fields[name]):
        yield Turn("user", text_of(fields[name]), text_of(fields.get("input") or "").strip())
    else:
        yield from turns_of(fields[name])


def _side(fields: dict[str, Any], name: str, asked: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The whole conversation that ends with the answer of this name."""
    if fields.get(name) is None:
        raise UnusableError(f"no {name!r}")
    value = fields[name]
    if is_text(value):
        if not asked:
            raise UnusableError("no prompt beside chosen and rejected")
        return (*asked, Turn("assistant", text_of(value)))
    turns = tuple(turns_of([value] if isinstance(value, dict) else value))
    if turns and turns[0].role == "assistant":
        return (*asked, *turns)
    system = [turn for turn in asked if turn.role == "system"]
    return turns if any(turn.role == "system" for turn in turns) else (*system, *turns)
