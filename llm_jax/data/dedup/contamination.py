"""Does a document hold an evaluation set? n-grams of words, a Han character being a word.

An item of the set is in a document if the document holds at least `share` of the item's different
n-grams, so one common phrase convicts nobody. Items shorter than n words are looked for as a whole if
they have at least `min_words`. After GPT-3's 13-grams (Brown et al. 2020, appendix C).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data.characters import TABLE_SIZE, Kind, codes, kind_table
from llm_jax.data.dedup.shingles import STEP, fold_table, grams, mix
from llm_jax.data.documents import Rejects
from llm_jax.data.lineage import input_record
from llm_jax.data.sift import Judge, Judgement, SiftConfig, sift
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.errors import ConfigError, DataError

# each such character is a word of its own
ALONE = (Kind.HAN, Kind.HAN_FUNCTION, Kind.HAN_RARE, Kind.KANA)


@dataclass(frozen=True, kw_only=True)
class ContaminationStage(SiftConfig):
    """Which sets may not be in the sources, and when a document holds an item of one."""

    against: tuple[SourceConfig, ...] = ()  # evaluation sets
    ngram: int = 13  # words
    share: float = 0.5  # of an item's n-grams
    min_words: int = 8  # shorter items are looked for nowhere

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.against:
            raise ConfigError("against is empty; name an evaluation set, --against NAME=PATH")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share} must be above 0 and at most 1")
        if not 2 <= self.min_words <= self.ngram:
            raise ConfigError(
                f"min_words={self.min_words} must be between 2 and ngram={self.ngram}"
            )


class Items(NamedTuple):
    """The n-grams of all items. Picklable."""

    lengths: tuple[int, ...]  # of n-grams that occur: ngram, and those of shorter items
    hashes: np.ndarray  # uint64 [G], sorted; an n-gram of two items is there twice
    owners: np.ndarray  # int32 [G], the item that it belongs to
    totals: np.ndarray  # int32 [items], different n-grams
    names: tuple[str, ...]
    too_short: int


def words(text: str) -> np.ndarray:
    """A hash for each word, uint64: a Han or kana character, or a run of other letters and digits."""
    clipped_N = np.minimum(codes(text), TABLE_SIZE - 1)
    folded_N = fold_table()[clipped_N]
    inside = folded_N > 0
    alone = inside & np.isin(kind_table()[clipped_N], ALONE)
    before_inside = np.concatenate([[False], (inside & ~alone)[:-1]])
    starts = np.flatnonzero(inside & (alone | ~before_inside))
    if len(starts) == 0:
        return np.zeros(0, np.uint64)
    # the place inside the word makes anagrams differ
    word_of = np.searchsorted(starts, np.arange(len(folded_N)), side="right") - 1
    place = np.arange(len(folded_N)) - starts[np.maximum(word_of, 0)]
    letters = mix(folded_N.astype(np.uint64) + place.astype(np.uint64) * STEP)
    letters[~inside] = 0
    return mix(np.add.reduceat(letters, starts))


def gather(named_texts: Iterable[tuple[str, str]], ngram: int, min_words: int) -> Items:
    """The n-grams of (name, text) items."""
    hashes, owners, totals, names, lengths, short = [], [], [], [], set(), 0
    for name, text in named_texts:
        found = words(text)
        if len(found) < min_words:
            short += 1
            continue
        lengths.add(min(ngram, len(found)))
        unique = np.unique(grams(found, ngram))
        hashes.append(unique)
        owners.append(np.full(len(unique), len(names), np.int32))
        totals.append(len(unique))
        names.append(name)
    if not names:
        raise DataError(f"the evaluation sets hold no item of {min_words} words or more")
    joined = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")
    return Items(
        tuple(sorted(lengths)),
        joined[order],
        np.concatenate(owners)[order],
        np.array(totals, np.int32),
        tuple(names),
        short,
    )


def contamination(items: Items, text: str) -> tuple[float, str]:
    """The largest share of an item's n-grams that the text holds, and the item's name."""
    found = words(text)
    present = [grams(found, length) for length in items.lengths if len(found) >= length]
    if not present:
        return 0.0, ""
    candidates = np.unique(np.concatenate(present))
    left = np.searchsorted(items.hashes, candidates, side="left")
    right = np.searchsorted(items.hashes, candidates, side="right")
    hits = np.flatnonzero(right > left)
    if len(hits) == 0:
        return 0.0, ""
    places = np.concatenate([np.arange(left[hit], right[hit]) for hit in hits])
    held = np.bincount(items.owners[places], minlength=len(items.totals)) / items.totals
    worst = int(np.argmax(held))
    return float(held[worst]), items.names[worst]


def contamination_stage(
    config: ContaminationStage, progress: Callable[[str, str], None] = lambda _name, _text: None
) -> dict[str, Any]:
    """Writes the sources without documents that hold an item; returns the manifest.

    Raises:
      DataError: as `sift`; evaluation sets without a usable item.
    """

    def evaluation() -> Iterable[tuple[str, str]]:
        for source in config.against:
            for document in read_documents(source, Rejects()):
                yield f"{source.name}/{document.id}", document.text

    items = gather(evaluation(), config.ngram, config.min_words)
    records = {source.name: input_record(source) for source in config.against}
    return sift(
        *("decontaminate", config, config, contamination_judge, (items, config.share), progress),
        against={"files": records, "items": len(items.names), "too_short": items.too_short},
    )


def contamination_judge(items: Items, share: float) -> Judge:
    """The judge that workers build."""
    return partial(_judge, items, share)


def _judge(items: Items, share: float, text: str) -> Judgement:
    held, name = contamination(items, text)
    if held < share:
        return Judgement(True, "clean")
    return Judgement(False, "holds an item", detail=f"{held:.0%} of the n-grams of {name}")
