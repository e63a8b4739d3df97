"""Conversations to token shards with a mask: the stage `llm-jax data conversations`.

As `data.prepare`, with what conversations need besides: the tokenizer gets the template's special
tokens and carries the template; every token has a mask; and none is longer than a row of training,
because packing never cuts a conversation. One that is longer ends behind the last answer that fits
(shortened), or inside its first answer (truncated); one whose first answer lies beyond is dropped.
What is held out is decided by the first user turn alone: all conversations that begin with one question
are on one side.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

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
from llm_jax.data.shards import ANSWER, MARK
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.instruct.conversations import (
    Conversation,
    ConversationFormat,
    Turn,
    read_conversations,
)
from llm_jax.instruct.masks import ChatEncoder, Loss, Masked, chat_tokenizer
from llm_jax.instruct.rendering import TemplateError
from llm_jax.instruct.templates import ChatTemplate, find_template
from llm_jax.tokenizer import Tokenizer

CHUNK = 256  # conversations encoded at once
LENGTHS = ("whole", "shortened", "truncated", "dropped")


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    """How conversations become token shards."""

    prepare: PrepareConfig  # sources, tokenizer, output, and what they share with plain text
    template: str = "chatml"  # a name of `templates`, or "base" for the tokenizer's own
    form: ConversationFormat = "auto"  # how a record says a conversation; auto: by its fields
    loss: Loss = "all"  # the answers that are targets: all, the last, or everything that is said
    header: bool = False  # whether the tokens that open an assistant turn are targets too
    seq_len: int = 2048  # pairs (input, target) of the longest conversation that is stored

    def __post_init__(self) -> None:
        for name, kind in (("form", ConversationFormat), ("loss", Loss)):
            value, known = vars(self)[name], get_args(kind)
            if value not in known:
                raise ConfigError(f"{name}={value!r}; {nearest(value, known)}")
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len} must be at least 2")


class Told(NamedTuple):
    """What became of one conversation."""

    encoded: Encoded | None  # None: it was left out
    length: str  # one of LENGTHS
    refused: str = ""  # why the template refuses it


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
            raise DataError(
                f"source {self._source.name!r}: no answer of {rejects.records} conversations begins within "
                f"seq_len={self._config.seq_len} tokens; raise it"
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
        }

    def _chunks(self) -> Iterator[list[Conversation]]:
        chunk: list[Conversation] = []
        for conversation in self._unique():
            chunk.append(conversation)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _unique(self) -> Iterator[Conversation]:
        form = self._config.form
        for conversation in read_conversations(self._source, form, self._rejects):
            key = key_of(conversation.turns)
            if self._config.prepare.drop_duplicates:
                if key in self._seen:
                    self._duplicates += 1
                    continue
                self._seen.add(key)
            self._digest.update(key)
            self._places.append(conversation.id)
            yield conversation

    def _account(self, chunk: list[Told]) -> list[Encoded]:
        """The conversations to be stored; counts the others."""
        places, self._places = self._places[: len(chunk)], self._places[len(chunk) :]
        for place, told in zip(places, chunk, strict=True):
            if told.refused:
                self._rejects.add("the chat template refuses it", place, told.refused)
            else:
                self._lengths[told.length] += 1
        return [told.encoded for told in chunk if told.encoded is not None]


def key_of(turns: tuple[Turn, ...]) -> bytes:
    """A 16-byte hash of a conversation: equal ones are one, whatever file they are in."""
    return text_key(json.dumps(turns, ensure_ascii=False))


def opening_key(turns: tuple[Turn, ...]) -> bytes:
    """A 16-byte hash of the first user turn as dedup compares texts: its letters and digits, whatever their case
    and width; of a turn without any, its text.
    """
    text = next(turn for turn in turns if turn.role == "user").text
    return text_key(fold(text).tobytes().decode("utf-32-le") or text)


def make_encoder(
    tokenizer: Tokenizer, template: ChatTemplate, loss: Loss, header: bool, seq_len: int
) -> Callable[[list[Conversation]], list[Told]]:
    """The function that a worker applies to every chunk of conversations."""
    return partial(_encode_chunk, ChatEncoder(tokenizer, template, loss, header), seq_len)


def _encode_chunk(
    encoder: ChatEncoder, seq_len: int, conversations: list[Conversation]
) -> list[Told]:
    chunk = []
    for conversation in conversations:
        try:
            masked = encoder.encode(conversation.turns)
        except TemplateError as error:
            chunk.append(Told(None, "dropped", str(error)))
            continue
        fitted, length = fit(masked, seq_len, encoder.tokenizer)
        if fitted is None:
            chunk.append(Told(None, length))
            continue
        tokens = fitted.tokens.astype(np.uint32)
        sizes = (fitted.num_bytes, fitted.num_characters)
        position = position_of(opening_key(conversation.turns))
        chunk.append(Told(Encoded(tokens, *sizes, position, fitted.mask), length))
    return chunk


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
