"""Train or held out, dealt as `shard_writer.HoldOut` deals them in reading order.

That class keeps one document back while one split of a source is still empty: the nearest to the border so
far. When a nearer one comes, the one kept is settled there and then, so it stands later in its split than
it was read; when the second split gets its first document, or at the end, the last one kept is settled. What
it depends on is small: the first document of each split, and the chain of ever nearer ones before that.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam

from llm_jax.data.shards import HELDOUT, SPLITS, TRAIN

END = b"\xff" * 32  # after every order key
Meta = tuple[str, bytes, float]  # output source, order key, position


class Moved(NamedTuple):
    """Where a document that was kept back ends up."""

    split: str
    order: bytes


def split_of(position: float, fraction: float) -> str:
    """Where a document belongs by its position alone."""
    return HELDOUT if position < fraction else TRAIN


def least_and_count(values: Iterable[tuple[bytes, int]]) -> tuple[bytes, int]:
    """First key and number of documents; associative."""
    first, count = END, 0
    for key, number in values:
        first, count = min(first, key), count + number
    return first, count


def nearer_and_nearer(chains: Iterable[list[tuple[bytes, float]]]) -> list[tuple[bytes, float]]:
    """Of (key, distance) in order of key those nearer than all before; associative."""
    kept: list[tuple[bytes, float]] = []
    for key, distance in sorted(pair for chain in chains for pair in chain):
        if not kept or distance < kept[-1][1]:
            kept.append((key, distance))
    return kept


def switch_of(output: str, firsts: dict[tuple[str, str], tuple[bytes, int]]) -> bytes:
    """Key of the document that gives a source its second split; END when it has one split alone."""
    return max(firsts.get((output, split), (END, 0))[0] for split in SPLITS)


def moves(
    output: str,
    chain: list[tuple[bytes, float]],
    firsts: dict[tuple[str, str], tuple[bytes, int]],
) -> dict[bytes, Moved]:
    """Where the documents of a chain end up, by their key."""
    switch = switch_of(output, firsts)
    split = next(s for s in SPLITS if firsts.get((output, s), (END, 0))[0] <= chain[0][0])
    settled = [key for key, _ in chain[1:]] + [switch]
    # before the document whose coming settled it, which a longer key follows
    moved = {key: Moved(split, at + b"\0") for (key, _), at in zip(chain, settled, strict=True)}
    if switch == END:
        other = HELDOUT if split == TRAIN else TRAIN
        count = firsts[output, split][1]
        last = chain[-1][0]
        moved[last] = Moved(other if count > 1 else TRAIN, END)
    return moved


def _with_distance(
    meta: Meta, fraction: float, firsts: dict[tuple[str, str], tuple[bytes, int]]
) -> Iterator[tuple[str, list[tuple[bytes, float]]]]:
    output, key, position = meta
    if key < switch_of(output, firsts):
        yield output, [(key, abs(position - fraction))]


def moved_documents(metas: Any, fraction: float) -> Any:
    """Pairs (output source, {order key: Moved}); of the sources that keep something back."""
    firsts = (
        metas
        | "by split" >> beam.Map(lambda m: ((m[0], split_of(m[2], fraction)), (m[1], 1)))
        | "first of a split" >> beam.CombinePerKey(least_and_count)
    )
    known = beam.pvalue.AsDict(firsts)
    return (
        metas
        | "before the second split" >> beam.FlatMap(_with_distance, fraction, firsts=known)
        | "ever nearer" >> beam.CombinePerKey(nearer_and_nearer)
        | "moves" >> beam.Map(lambda of, firsts: (of[0], moves(of[0], of[1], firsts)), firsts=known)
    )
