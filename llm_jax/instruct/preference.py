"""Pairs of a better and a worse answer to rows of token ids: what `train.preference` learns from.

A file is JSONL with the texts `prompt`, `chosen` and `rejected` (the names of TRL). How prompt and answer
become ids is a function that is given: a chat template, or `plain`. Pairs are packed into pairs of rows, the
better answers in the one and the worse ones in the other under the same segment numbers; packing is done
once, and every epoch goes through the packed rows in an order of its own.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data import text_files
from llm_jax.data.batch import DTYPES, Batch, PreferenceBatch
from llm_jax.errors import DataError
from llm_jax.tokenizer import Tokenizer
from llm_jax.tokenizer.base import start_id

FIELDS = ("prompt", "chosen", "rejected")
OPEN = 64  # packs that are looked at for room


class Rendered(NamedTuple):
    """A prompt with an answer."""

    ids: Sequence[int]
    is_target: Sequence[bool]  # of each id, whether it is to be predicted


Render = Callable[[str, str], Rendered]  # of prompt and answer


class Pair(NamedTuple):
    """Both answers to one prompt."""

    chosen: Rendered
    rejected: Rendered


def plain(tokenizer: Tokenizer) -> Render:
    """Prompt and answer one after the other, with the end of the text as a target."""
    first = start_id(tokenizer)
    start, end = [first] if first >= 0 else [], [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []

    def render(prompt: str, answer: str) -> Rendered:
        before = [*start, *tokenizer.encode(prompt)]
        after = [*tokenizer.encode(answer), *end]
        return Rendered(before + after, [False] * len(before) + [True] * len(after))

    return render


def read_pairs(path: Path, render: Render, seq_len: int) -> tuple[list[Pair], Counter[str]]:
    """The pairs of a file, and how many were left out by reason.

    Left out are pairs whose answers are the same, whose answer has no target, or that are longer than a row: cut, an
    answer would lack what it was preferred for.

    Raises:
      DataError: the file cannot be read, a line is no such object, or no pair is left.
    """
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    for number, line in _lines(path):
        prompt, chosen, rejected = _texts(line, f"{path}:{number}")
        if chosen == rejected:
            left_out["same answers"] += 1
            continue
        pair = Pair(render(prompt, chosen), render(prompt, rejected))
        longest = max(len(side.ids) for side in pair)
        if longest - 1 > seq_len:
            left_out["longer than a row"] += 1
        elif not all(any(side.is_target[1:]) for side in pair):
            left_out["no target"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it is empty"
        raise DataError(f"{path}: holds no usable pair ({told})")
    return pairs, left_out


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers; only a line feed ends one."""
    try:
        with text_files.open_bytes(str(path)) as stream:
            for number, line in text_files.lines(stream):
                if line is None:
                    limit = text_files.MAX_LINE_BYTES >> 20
                    raise DataError(f"{path}:{number}: line longer than {limit} MB")
                if line.strip():
                    yield number, line.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _texts(line: str, where: str) -> list[str]:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not a JSON object; one a line") from None
    texts = []
    for name in FIELDS:
        text = found.get(name) if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where}: needs the text {name!r}, beside {', '.join(FIELDS)}")
        texts.append(text)
    return texts


class PairPlan:
    """Row number -> row, without end: a pure function of pairs, row length and seed.

    Rows 2 k and 2 k + 1 belong together, so batches need an even number of rows.
    """

    def __init__(self, pairs: Sequence[Pair], seq_len: int, seed: int = 0) -> None:
        """Packs the pairs in a drawn order, each into the first of the last rows that has room for both sides."""
        self.seq_len, self.seed = seq_len, seed
        self._pairs = pairs
        self._packs: list[list[int]] = []
        used: list[tuple[int, int]] = []  # of the packs, inputs of both sides
        for index in np.random.default_rng(seed).permutation(len(pairs)).tolist():
            sizes = tuple(len(side.ids) - 1 for side in pairs[index])
            for at in range(max(0, len(used) - OPEN), len(used)):
                if all(a + b <= seq_len for a, b in zip(used[at], sizes, strict=True)):
                    break
            else:
                at = len(used)
                self._packs.append([])
                used.append((0, 0))
            self._packs[at].append(index)
            used[at] = (used[at][0] + sizes[0], used[at][1] + sizes[1])

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return 2 * len(self._packs)

    @property
    def digest(self) -> str:
        """Equal if and only if all rows are, but for what a hash cannot tell apart."""
        state = hashlib.sha256(f"{self.seq_len} {self.seed}".encode())
        for pair in self._pairs:
            for side in pair:
                for values in (np.asarray(side.ids, np.int32), np.asarray(side.is_target, np.int8)):
                    state.update(len(values).to_bytes(8, "little") + values.tobytes())
        return state.hexdigest()

    def packed(self, numbers: np.ndarray) -> np.ndarray:
        """Of row numbers, which rows of the packing they are: below `num_rows`, each once an epoch."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64) // 2, len(self._packs))
        order = {epoch: self._order(epoch) for epoch in np.unique(epochs).tolist()}
        packs = [order[e][p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)]
        return 2 * np.array(packs, np.int64) + np.asarray(numbers, np.int64) % 2

    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers, [len(numbers), seq_len]."""
        return self.rows_of_packing(self.packed(numbers))

    def rows_of_packing(self, packed: np.ndarray) -> Batch:
        """Rows by their place in the packing: all of them, once, are `np.arange(num_rows)`."""
        made = Batch(*(np.zeros((len(packed), self.seq_len), dtype) for dtype in DTYPES))
        for row, place in enumerate(packed.tolist()):
            at = 0
            for segment, index in enumerate(self._packs[place // 2], 1):
                side = self._pairs[index][place % 2]
                size = len(side.ids) - 1
                here = (row, slice(at, at + size))
                made.tokens_BT[here], made.targets_BT[here] = side.ids[:-1], side.ids[1:]
                made.positions_BT[here], made.segments_BT[here] = np.arange(size), segment
                made.loss_mask_BT[here] = side.is_target[1:]
                at += size
        return made

    def batch(self, numbers: np.ndarray, reference_RT: np.ndarray | None = None) -> PreferenceBatch:
        """Rows with what a reference model says of their targets.

        Args:
          numbers: of the rows.
          reference_RT: -log p of every target of `rows_of_packing(np.arange(num_rows))` under the reference
            model, computed once; None: the step asks the model below its adapters, or needs none.
        """
        places = self.packed(numbers)
        reference = None if reference_RT is None else reference_RT[places]
        return PreferenceBatch(self.rows_of_packing(places), reference)

    def _order(self, epoch: int) -> list[int]:
        """The packs in the order of an epoch."""
        return np.random.default_rng([self.seed, 1, epoch]).permutation(len(self._packs)).tolist()
