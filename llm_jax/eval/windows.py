"""Which tokens are scored in which row: documents, strided windows, packed rows. Plain numpy.

1. A document is its start token (BOS) and the tokens of its text. Every text token is a target once.
2. A document longer than the window is read through windows of `seq_len` inputs, `stride` apart. A
   window scores only the targets that the window before did not reach, so each target is scored
   exactly once, and after the first window with at least `seq_len - stride` tokens of context.
3. Windows are packed into rows of `seq_len` tokens, each its own segment with positions from 0: a
   batch of short documents is as full as one of long ones, and none sees another.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.data.packing import best_fit_decreasing
from llm_jax.data.shards import ANSWER, SECOND, Split
from llm_jax.errors import ConfigError
from llm_jax.tokenizer.base import Tokenizer, start_id

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How held-out text is scored."""

    seq_len: int = 0  # tokens a target may see, its window; 0: model.max_seq_len
    stride: int = 0  # targets a window adds to the one before; 0: half of seq_len
    batch_size: int = 8  # rows scored at once; on a mesh rounded up to what its devices can share
    max_documents: int = 0  # of every source, drawn by seed; 0: all
    max_tokens: int = 0  # of every source; the last document is cut to fit; 0: all
    bootstrap_samples: int = 1000  # resamples behind the confidence intervals; 0: no intervals
    seed: int = 0  # of the choice of documents and of the bootstrap

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "stride",
            "max_documents",
            "max_tokens",
            "bootstrap_samples",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"eval.{name}={getattr(self, name)} must be 0 or above")
        if self.batch_size < 1:
            raise ConfigError(f"eval.batch_size={self.batch_size} must be at least 1")
        if self.seq_len and self.stride > self.seq_len:
            raise ConfigError(
                f"eval.stride={self.stride} must be at most eval.seq_len={self.seq_len}, "
                "or targets would be left out"
            )

    def resolve(self, max_seq_len: int, *, hard_limit: bool) -> "EvalConfig":
        """The same with seq_len and stride filled in for a model.

        Raises:
          ConfigError: the window is longer than the model's `hard_limit` of max_seq_len tokens, or
            shorter than the stride.
        """
        seq_len = self.seq_len or max_seq_len
        if hard_limit and seq_len > max_seq_len:
            raise ConfigError(
                f"eval.seq_len={seq_len} must be at most model.max_seq_len={max_seq_len}: "
                "learned positions reach no further"
            )
        stride = self.stride or max(seq_len // 2, 1)
        return dataclasses.replace(self, seq_len=seq_len, stride=stride)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one source, laid end to end. Document d is ids[starts[d] : starts[d + 1]].

    EOS is left out: what is measured is the text. It is no text, has no bytes and no characters,
    and neither `xz` nor a character model has to predict it.
    """

    ids: np.ndarray  # int32; every document begins with its start token, which is never a target
    starts: np.ndarray  # int64 [documents + 1]
    bytes: np.ndarray  # int64 [documents], of the text in UTF-8
    characters: np.ndarray  # int64 [documents], Unicode code points
    # bool per id, of conversations: the text of answers, whose bytes and characters are counted above
    scored: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Targets of every document: its text tokens."""
        if self.scored is None:
            return np.diff(self.starts) - 1
        return np.add.reduceat(self.scored.astype(np.int64), self.starts[:-1])

    @property
    def targets(self) -> np.ndarray:
        """Whether each id is scored."""
        if self.scored is not None:
            return self.scored
        targets = np.ones(len(self.ids), bool)
        targets[self.starts[:-1]] = False
        return targets


def corpus_from_split(split: Split, tokenizer: Tokenizer, config: EvalConfig) -> Corpus:
    """The documents of a prepared split that `config` asks for."""
    num_bytes, num_characters = split.document_bytes, split.document_characters
    chosen = choose(split.num_documents, config)
    if split.has_mask:
        return _answers(split, chosen, config)

    def documents() -> Iterator[tuple[np.ndarray, int, int]]:
        for index in map(int, chosen):
            ids = _text_ids(split.document(index), tokenizer)
            yield ids, int(num_bytes[index]), int(num_characters[index])

    return _build(documents(), tokenizer, config)


def _answers(split: Split, chosen: np.ndarray, config: EvalConfig) -> Corpus:
    """Conversations of a split, whole, the better ones of pairs; the text of their answers is scored."""
    left = config.max_tokens or np.iinfo(np.int64).max
    kept, ids, masks = [], [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)]
    for index in map(int, chosen):
        start, end = map(int, split.document_starts[index : index + 2])
        values = split.read_mask(start, end - start)
        if (values == SECOND).any():
            end = start + int(np.argmax(values == SECOND))
        mask = values[: end - start] == ANSWER
        if left <= 0:
            break
        if mask[1:].any():
            kept.append(index)
            ids.append(split.read(start, end - start))
            masks.append(mask)
            left -= int(mask.sum())
    starts = np.cumsum([len(part) for part in ids]).astype(np.int64)
    sizes = split.document_bytes[kept], split.document_characters[kept]
    return Corpus(np.concatenate(ids), starts, *sizes, np.concatenate(masks).astype(bool))


def corpus_from_texts(texts: Sequence[str], tokenizer: Tokenizer, config: EvalConfig) -> Corpus:
    """Raw texts, one document each, as far as `config` asks for them."""
    chosen = [texts[index] for index in map(int, choose(len(texts), config))]

    def documents() -> Iterator[tuple[np.ndarray, int, int]]:
        for text, ids in zip(chosen, tokenizer.encode_batch(chosen), strict=True):
            yield ids, len(text.encode("utf-8", "replace")), len(text)

    return _build(documents(), tokenizer, config)


def _text_ids(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """A stored document without its start token and EOS."""
    first = 1 if len(ids) and ids[0] == start_id(tokenizer) else 0
    last = len(ids) - (1 if len(ids) > first and ids[-1] == tokenizer.eos_id else 0)
    return ids[first:last]


def choose(count: int, config: EvalConfig) -> np.ndarray:
    """Indices of the documents to score: all in order, or the first ones of a seeded shuffle."""
    if not config.max_documents and not config.max_tokens:
        return np.arange(count)
    order = np.random.default_rng(config.seed).permutation(count)
    return order[: config.max_documents or count]


def _build(
    documents: Iterator[tuple[np.ndarray, int, int]], tokenizer: Tokenizer, config: EvalConfig
) -> Corpus:
    """Lays documents (text ids, bytes, characters) end to end until the token budget is spent."""
    left = config.max_tokens or np.iinfo(np.int64).max
    pieces, lengths, sizes = [], [], []
    first = np.array([start_id(tokenizer)], np.int32)
    for ids, num_bytes, num_characters in documents:
        if len(ids) > left:
            ids, num_bytes, num_characters = _cut(ids, int(left), tokenizer)
        if not len(ids):
            continue
        pieces += [first, ids.astype(np.int32)]
        lengths.append(len(ids) + 1)
        sizes.append((num_bytes, num_characters))
        left -= len(ids)
        if left <= 0:
            break
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    counts = np.array(sizes, np.int64).reshape(-1, 2)
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Corpus(ids, starts, counts[:, 0], counts[:, 1])


def _cut(ids: np.ndarray, length: int, tokenizer: Tokenizer) -> tuple[np.ndarray, int, int]:
    """The first `length` ids, or a few less so as not to end inside a character; bytes; characters."""
    while length > 0:
        text = tokenizer.decode(ids[:length].tolist())
        if not text.endswith(REPLACEMENT):
            return ids[:length], len(text.encode()), len(text)
        length -= 1
    return ids[:0], 0, 0


class Windows(NamedTuple):
    """Windows over documents laid end to end; all int64 [windows]."""

    start: np.ndarray  # offset of the first input; target t is the token at start + t + 1
    length: np.ndarray  # inputs, and as many targets
    skip: np.ndarray  # leading targets that an earlier window has scored
    document: np.ndarray


def plan_windows(starts: np.ndarray, seq_len: int, stride: int) -> Windows:
    """The windows of every document, in order."""
    targets = np.diff(starts) - 1
    counts = np.where(targets > 0, 1 + -(-np.maximum(targets - seq_len, 0) // stride), 0)
    document = np.repeat(np.arange(len(targets)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = number * stride
    length = np.minimum(targets[document] - offset, seq_len)
    skip = np.where(number > 0, seq_len - stride, 0)
    return Windows(starts[:-1][document] + offset, length, skip, document)


class Rows(NamedTuple):
    """One batch to score, all int32 [B, T]."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray  # 0 is padding
    document_BT: np.ndarray  # whose target is scored here; -1: none


class RowPlan:
    """Windows packed into rows of `row_len` tokens, none of which may be longer."""

    def __init__(
        self, ids: np.ndarray, windows: Windows, row_len: int, targets: np.ndarray | None = None
    ) -> None:
        self.ids, self.windows, self.row_len = ids, windows, row_len
        self._targets = targets  # bool per id: whether it is scored; None: every one is
        order = np.argsort(-windows.length, kind="stable")
        rows, self.num_rows = best_fit_decreasing(windows.length[order], row_len)
        by_row = np.argsort(rows, kind="stable")
        self._order = order[by_row]
        self._row_starts = np.searchsorted(rows[by_row], np.arange(self.num_rows + 1))

    def batches(self, batch_size: int) -> Iterator[Rows]:
        """All rows, `batch_size` at a time; the last batch is filled up with padding."""
        for first in range(0, self.num_rows, batch_size):
            yield self._batch(first, batch_size)

    def _batch(self, first: int, batch_size: int) -> Rows:
        shape = (batch_size, self.row_len)
        tokens, targets, positions, segments = np.zeros((4, *shape), np.int32)
        rows = Rows(tokens, targets, positions, segments, np.full(shape, -1, np.int32))
        for row in range(first, min(first + batch_size, self.num_rows)):
            at = 0
            members = self._order[self._row_starts[row] : self._row_starts[row + 1]]
            for segment, window in enumerate(members.tolist(), start=1):
                start, length, skip, document = (int(a[window]) for a in self.windows)
                place = (row - first, slice(at, at + length))
                rows.tokens_BT[place] = self.ids[start : start + length]
                rows.targets_BT[place] = self.ids[start + 1 : start + length + 1]
                rows.positions_BT[place] = np.arange(length)
                rows.segments_BT[place] = segment
                scored = rows.document_BT[row - first, at + skip : at + length]
                scored[:] = document
                if self._targets is not None:
                    scored[~self._targets[start + skip + 1 : start + length + 1]] = -1
                at += length
        return rows
