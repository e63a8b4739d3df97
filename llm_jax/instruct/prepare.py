"""Conversations to token shards with a mask: the stage `llm-jax data conversations`.

As `data.prepare`, with what conversations need besides: the tokenizer gets the template's special
tokens and carries the template; every token has a mask; and none is longer than a row of training,
because packing never cuts a conversation. One that is longer ends behind the last answer that fits
(shortened), or inside its first answer (truncated); one whose first answer lies beyond is dropped.
What is held out is decided by the first user turn alone: all conversations that begin with one question
are on one side.

A pair of a better and a worse answer (`form="preference"`) is stored as one document of two conversations, and
left out where both do not fit: cut, an answer would lack what it was preferred for.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from llm_jax import tokenizer as tokenizers
from llm_jax.config import nearest
from llm_jax.data import shards
from llm_jax.data.dedup.shingles import fold
from llm_jax.data.documents import Rejects
from llm_jax.data.lineage import input_records
from llm_jax.data.ordered_pool import ordered_map
from llm_jax.data.prepare import (
    PrepareConfig,
    Progress,
    SourceWriters,
    position_of,
    prepared_manifest,
    text_key,
    token_dtype,
    write_manifest,
)
from llm_jax.data.shard_writer import Encoded, new_folder
from llm_jax.data.shards import ANSWER, MARK, SECOND
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.instruct.conversations import ConversationFormat, Turn, read_conversations
from llm_jax.instruct.masks import ChatEncoder, Loss, Masked, chat_tokenizer
from llm_jax.instruct.pairs import read_pairs
from llm_jax.instruct.rendering import TemplateError
from llm_jax.instruct.templates import ChatTemplate, find_template
from llm_jax.tokenizer import Tokenizer

Form = Literal[ConversationFormat, "preference"]
CHUNK = 256  # conversations encoded at once
LENGTHS = ("whole", "shortened", "truncated", "dropped")


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    """How conversations become token shards."""

    prepare: PrepareConfig  # sources, tokenizer, output, and what they share with plain text
    template: str = "chatml"  # a name of `templates`, or "base" for the tokenizer's own
    form: Form = "auto"  # how a record says a conversation; auto: by its fields; preference: a pair
    loss: Loss = "all"  # the answers that are targets: all, the last, or everything that is said
    header: bool = False  # whether the tokens that open an assistant turn are targets too
    seq_len: int = (
        2048  # pairs (input, target) of the longest conversation, or both of a pair, that is stored
    )

    def __post_init__(self) -> None:
        for name, kind in (("form", Form), ("loss", Loss)):
            value, known = vars(self)[name], get_args(kind)
            if value not in known:
                raise ConfigError(f"{name}={value!r}; {nearest(value, known)}")
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len} must be at least 2")
        if self.pairs and self.loss != "last":
            raise ConfigError(
                f"loss={self.loss!r}: of a pair the last answers are compared; it must be 'last' with form='preference'"
            )

    @property
    def pairs(self) -> bool:
        """Whether the records are pairs of answers."""
        return self.form == "preference"


class Item(NamedTuple):
    """What is stored as one document: a conversation, or two whose last answers are compared, the better first."""

    sides: tuple[tuple[Turn, ...], ...]
    place: str


class Told(NamedTuple):
    """What became of one conversation."""

    encoded: Encoded | None  # None: it was left out
    length: str  # one of LENGTHS
    refused: str = ""  # why the template refuses it
    longest: int = 0  # pairs (input, target) of the longest side


def prepare_conversations(
    config: ConversationsConfig, progress: Callable[[Progress], None] | None = None
) -> shards.Prepared:
    """Prepares all sources and returns the opened result.

    Raises:
      ConfigError: no such template.
      DataError: an unusable source, tokenizer or template, an output that exists. Nothing is left at
        the output then.
    """
    common = config.prepare
    base = tokenizers.load(Path(common.tokenizer))
    template = find_template(config.template, base.files, common.tokenizer)
    tokenizer = chat_tokenizer(base, template)
    with new_folder(common.output, common.overwrite) as root:
        folder = root / shards.TOKENIZER
        folder.mkdir()
        tokenizer.save(folder)
        entries, samples = {}, ""
        inputs = input_records(common.sources)
        for source in common.sources:
            rejects = Rejects()
            stage = _Stage(config, tokenizer, template, source, rejects)
            entries[source.name] = stage.write(root, progress or (lambda _: None))
            samples += rejects.lines(source.name)
        facts = {name: vars(config)[name] for name in ("template", "loss", "header", "seq_len")}
        facts["base_fingerprint"] = base.fingerprint
        if config.pairs:
            facts["longest_side"] = max(entry.pop("longest") for entry in entries.values())
        manifest = prepared_manifest(tokenizer, config, inputs, entries, conversations=facts)
        write_manifest(root, samples, manifest)
    return shards.open_prepared(common.output)


class _Stage:
    """The work on one source."""

    def __init__(
        self,
        config: ConversationsConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        source: SourceConfig,
        rejects: Rejects,
    ) -> None:
        self._config, self._source, self._rejects = config, source, rejects
        self._settings = (tokenizer, template, config.loss, config.header, config.seq_len)
        self._seen: set[bytes] = set()
        self._duplicates = 0
        self._digest = hashlib.sha256()  # of every conversation that is kept, in order
        self._lengths: Counter[str] = Counter({length: 0 for length in LENGTHS})
        self._places: list[str] = []  # of the conversations that are being encoded, in order
        self._longest = 0

    def write(self, root: Path, progress: Callable[[Progress], None]) -> dict[str, Any]:
        """Writes the shards; returns the source's entry for the manifest."""
        common, rejects = self._config.prepare, self._rejects
        told = ordered_map(make_encoder, self._settings, self._chunks(), common.workers)
        dtype = token_dtype(self._settings[0])
        writers = SourceWriters(
            root, self._source.name, dtype, common.holdout_fraction, common.shard_max_tokens, together=True
        )  # fmt: skip
        kept = (self._account(chunk) for chunk in told)
        splits = writers.write(kept, lambda now: progress(now._replace(rejected=rejects.total)))
        rejects.check(self._source.name, common.max_reject_fraction)
        if not any(split["documents"] for split in splits.values()):
            what = f"no answer of {rejects.records} conversations begins"
            if self._config.pairs:
                what = f"none of {rejects.records} pairs fits"
            raise DataError(
                f"source {self._source.name!r}: {what} within seq_len={self._config.seq_len} tokens; raise it"
            )
        if not splits[shards.TRAIN]["documents"]:
            raise DataError(
                f"source {self._source.name!r}: every conversation is held out, as conversations that begin with the "
                "same question go together; hold nothing out (--holdout-fraction 0)"
            )
        return {
            "input_digest": self._digest.hexdigest(),
            "duplicates": self._duplicates,
            "rejects": rejects.report(),
            "lengths": dict(self._lengths),
            "splits": splits,
            **({"longest": self._longest} if self._config.pairs else {}),
        }

    def _chunks(self) -> Iterator[list[Item]]:
        chunk: list[Item] = []
        for item in self._unique():
            chunk.append(item)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _items(self) -> Iterator[Item]:
        form = self._config.form
        if form == "preference":
            for pair in read_pairs(self._source, self._rejects):
                yield Item((pair.chosen, pair.rejected), pair.id)
        else:
            for conversation in read_conversations(self._source, form, self._rejects):
                yield Item((conversation.turns,), conversation.id)

    def _unique(self) -> Iterator[Item]:
        for item in self._items():
            key = key_of(item.sides)
            if self._config.prepare.drop_duplicates:
                if key in self._seen:
                    self._duplicates += 1
                    continue
                self._seen.add(key)
            self._digest.update(key)
            self._places.append(item.place)
            yield item

    def _account(self, chunk: list[Told]) -> list[Encoded]:
        """The conversations to be stored; counts the others."""
        places, self._places = self._places[: len(chunk)], self._places[len(chunk) :]
        for place, told in zip(places, chunk, strict=True):
            if told.refused:
                self._rejects.add("the chat template refuses it", place, told.refused)
            else:
                self._lengths[told.length] += 1
                self._longest = max(self._longest, told.longest)
        return [told.encoded for told in chunk if told.encoded is not None]


def key_of(sides: tuple[tuple[Turn, ...], ...]) -> bytes:
    """A 16-byte hash of a conversation or pair: equal ones are one, whatever file they are in."""
    first, *others = sides
    return text_key(json.dumps(sides if others else first, ensure_ascii=False))


def opening_key(turns: tuple[Turn, ...]) -> bytes:
    """A 16-byte hash of the first user turn as dedup compares texts: its letters and digits, whatever their case
    and width; of a turn without any, its text.
    """
    text = next(turn for turn in turns if turn.role == "user").text
    return text_key(fold(text).tobytes().decode("utf-32-le") or text)


def make_encoder(
    tokenizer: Tokenizer, template: ChatTemplate, loss: Loss, header: bool, seq_len: int
) -> Callable[[list[Item]], list[Told]]:
    """The function that a worker applies to every chunk of conversations."""
    return partial(_encode_chunk, ChatEncoder(tokenizer, template, loss, header), seq_len)


def _encode_chunk(encoder: ChatEncoder, seq_len: int, items: list[Item]) -> list[Told]:
    chunk = []
    for item in items:
        try:
            sides = [encoder.encode(turns) for turns in item.sides]
        except TemplateError as error:
            chunk.append(Told(None, "dropped", str(error)))
            continue
        if len(sides) == 1:
            fitted, length = fit(sides[0], seq_len, encoder.tokenizer)
        else:
            fitted, length = both(sides[0], sides[1], seq_len)
        if fitted is None:
            chunk.append(Told(None, length))
            continue
        tokens = fitted.tokens.astype(np.uint32)
        sizes = (fitted.num_bytes, fitted.num_characters)
        position = position_of(opening_key(item.sides[0]))
        longest = max(len(side.tokens) for side in sides) - 1
        chunk.append(Told(Encoded(tokens, *sizes, position, fitted.mask), length, "", longest))
    return chunk


def both(chosen: Masked, rejected: Masked, seq_len: int) -> tuple[Masked | None, str]:
    """Two conversations as one document, and which of LENGTHS it is: "whole" or "dropped"."""
    tokens = np.concatenate([chosen.tokens, rejected.tokens])
    if len(tokens) > seq_len + 1 or not (chosen.mask[1:].any() and rejected.mask[1:].any()):
        return None, "dropped"
    # the first token of a conversation is nobody's target
    mask = np.concatenate([chosen.mask, [SECOND], rejected.mask[1:]]).astype(np.uint8)
    return Masked(tokens, mask, chosen.num_bytes, chosen.num_characters), "whole"


def fit(masked: Masked, seq_len: int, tokenizer: Tokenizer) -> tuple[Masked | None, str]:
    """The conversation cut to `seq_len` pairs, and which of LENGTHS it then is."""
    limit = seq_len + 1
    whole = len(masked.tokens) <= limit
    if whole and masked.mask[1:].any():
        return masked, "whole"
    mask = masked.mask[:limit]
    ends = np.flatnonzero((mask[1:] == MARK) & (mask[:-1] == ANSWER)) + 2
    if not (mask[1:] == ANSWER).any():
        return None, "dropped"
    cut = int(ends[-1]) if len(ends) else limit
    mask, tokens = mask[:cut], masked.tokens[:cut]
    said = "".join(
        tokenizer.decode(run[mask_run == ANSWER].tolist())
        for run, mask_run in zip(*_runs(tokens, mask), strict=True)
    )
    shorter = Masked(tokens, mask, len(said.encode()), len(said))
    return shorter, "shortened" if len(ends) else "truncated"


def _runs(tokens: np.ndarray, mask: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and mask, cut wherever an answer begins or ends."""
    cuts = np.flatnonzero(np.diff((mask == ANSWER).astype(np.int8))) + 1
    return np.split(tokens, cuts), np.split(mask, cuts)
