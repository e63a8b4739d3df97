"""Signatures: the share of places where two agree estimates the Jaccard similarity of their shingles.

One hash per shingle instead of one per shingle and place: "fast similarity sketching" (Dahlgaard, Knudsen,
Thorup 2017). The hash chooses a place and a value, each place keeps its least value; places left empty are
filled by further rounds, then by a hash of their own. Unbiased like MinHash with as many permutations,
at one pass over the shingles for a text of 2 kB.
"""

import numpy as np

from llm_jax.data.dedup.shingles import STEP, fold, grams, mix

PLACES = 128  # standard error of the similarity at most 0.044
PLACE_BITS = 7
ROUNDS = 6  # before a place gets a hash of its own; 128 ln 128 = 621 shingles fill all in one
EDGES = np.arange(PLACES, dtype=np.uint32) << np.uint32(32 - PLACE_BITS)
VALUE_MASK = np.uint32((1 << (32 - PLACE_BITS)) - 1)
SORTED = (
    12  # of each place; of shingles that all differ, every place has one then 999 times in 1,000
)
SEEDS = np.arange(ROUNDS + PLACES, dtype=np.uint64) * STEP  # of the rounds, then of the places
HIGH = np.uint64(32)
MAX_SHINGLES = 1 << 20  # at once: 50 MB


def signature(text: str, width: int) -> np.ndarray:
    """uint32 [PLACES]; two texts with the same letters have the same. All zero without letters."""
    hashes = grams(fold(text), width)
    if len(hashes) == 0:
        return np.zeros(PLACES, np.uint32)
    values, filled = _least_of_many(hashes)
    for round_ in range(1, ROUNDS):
        if filled.all():
            return values
        more, found = _least(mix(hashes + SEEDS[round_]))
        take = found & ~filled
        values[take] = more[take]
        filled |= found
    empty = np.flatnonzero(~filled)
    if len(empty):
        values[empty] = _own(hashes, empty)
    return values


def _least_of_many(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_least`, which sorts everything; here what cannot be the least is left out first."""
    if len(hashes) > 2 * PLACES * SORTED:
        values = (hashes >> HIGH).astype(np.uint32) & VALUE_MASK
        # the share of hashes that leaves every place this many
        small = hashes[values < np.uint32(int(VALUE_MASK) * PLACES * SORTED // len(hashes))]
        found = _least(small)
        if found[1].all():
            return found
    return _least(hashes)


def _least(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least hash of each place, which its upper 7 bits name, and which places have one."""
    # upper halves only: they sort twice as fast, and 1,500 shingles collide once in 4,000 texts
    ordered = np.sort((hashes >> HIGH).astype(np.uint32))
    first = np.searchsorted(ordered, EDGES)
    values = ordered[np.minimum(first, len(ordered) - 1)]
    filled = (first < len(ordered)) & ((values & ~VALUE_MASK) == EDGES)
    return values, filled


def _own(hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The least of each place's own hash over all shingles."""
    seeds = SEEDS[ROUNDS + places]
    rows = max(1, MAX_SHINGLES // len(hashes))
    found = [
        (mix(hashes[None, :] + seeds[start : start + rows, None]) >> HIGH).min(axis=1)
        for start in range(0, len(seeds), rows)
    ]
    return np.concatenate(found).astype(np.uint32)


def choose_rows(threshold: float, recall: float = 0.98) -> int:
    """The most rows per band at which a pair of similarity `threshold` shares a band this often.

    More rows mean fewer pairs to look at: a band of r rows agrees with probability s ** r.
    """
    best = 1
    for rows in range(1, PLACES + 1):
        bands = PLACES // rows
        if 1 - (1 - threshold**rows) ** bands >= recall:
            best = rows
    return best


def band_keys(signatures: np.ndarray, rows: int) -> np.ndarray:
    """One key for every band of every signature, uint64 [D, PLACES // rows]."""
    bands = PLACES // rows
    parts = signatures[:, : bands * rows].reshape(len(signatures), bands, rows)
    keys = np.arange(bands, dtype=np.uint64)[None, :] * STEP
    for row in range(rows):
        keys = mix(keys + parts[:, :, row])
    return keys
