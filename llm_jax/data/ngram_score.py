"""How like a reference a text is: bits per character under a small character trigram model.

The user names the reference; nothing is shipped or downloaded. The model is counts in hashed tables
with each order smoothed by the one below (Dirichlet prior; MacKay and Peto 1995), trained at several
million characters a second. Low is like the reference: unlike text, word lists and noise score high.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llm_jax.data.characters import codes
from llm_jax.data.dedup.shingles import STEP, mix
from llm_jax.errors import ConfigError

ORDER_BITS = (17, 21, 22)  # of the tables for one, two and three characters; 25 MB together
PRIOR = 4.0  # characters that the order below is worth
ALPHABET = 1 << 17
UNSEEN = 0.05  # of a count that every character has before any was seen
HELD_OUT = 10  # every tenth text of the reference is scored and not counted
MIN_CHARACTERS = 10_000


@dataclass(frozen=True)
class Reference:
    """A trained model and how texts like those it was trained on score. Picklable."""

    tables: tuple[np.ndarray, ...]  # float32 [2**bits] of each order
    characters: int
    quantiles: dict[str, float]  # of the bits of held-out texts: "50", "90", "99"

    def bits(self, text: str) -> float:
        """Bits per character; 0 for a text without any."""
        codes_N = _prepare(text)
        if len(codes_N) == 0:
            return 0.0
        counts = [table[slots] for table, slots in zip(self.tables, _slots(codes_N), strict=True)]
        probability = (counts[0] + UNSEEN) / (self.characters + UNSEEN * ALPHABET)
        for order in (1, 2):
            # what came before character i of order k is the (k-1)-gram that ends at i - 1
            context = np.concatenate([[0.0], counts[order - 1][:-1]])
            probability = (counts[order] + PRIOR * probability) / (context + PRIOR)
        return float(-np.log2(probability).mean())


def train(texts: Iterable[str]) -> Reference:
    """Counts the texts.

    Raises:
      ConfigError: they are too few to say anything.
    """
    tables = tuple(np.zeros(1 << bits, np.float32) for bits in ORDER_BITS)
    held_out, characters = [], 0
    for number, text in enumerate(texts):
        if number % HELD_OUT == HELD_OUT - 1:
            held_out.append(text)
            continue
        codes_N = _prepare(text)
        characters += len(codes_N)
        for table, slots in zip(tables, _slots(codes_N), strict=True):
            places, times = np.unique(slots, return_counts=True)
            table[places] += times
    if characters < MIN_CHARACTERS or not held_out:
        raise ConfigError(
            f"the reference holds {characters} characters in {len(held_out)} x {HELD_OUT} texts; it "
            f"needs {MIN_CHARACTERS} and {HELD_OUT} texts"
        )
    model = Reference(tables, characters, {})
    scores = [model.bits(text) for text in held_out]
    quantiles = {str(q): round(float(np.percentile(scores, q)), 3) for q in (50, 90, 99)}
    return Reference(tables, characters, quantiles)


def _prepare(text: str) -> np.ndarray:
    """Code points with runs of white space as one space."""
    return codes(" ".join(text.split()))


def _slots(codes_N: np.ndarray) -> list[np.ndarray]:
    """For each order, the table's slot of the gram that ends at each character, int64 [N]."""
    wide = codes_N.astype(np.uint64)
    before = np.concatenate([[np.uint64(0)], wide])[: len(wide)]
    twice = np.concatenate([[np.uint64(0)], before])[: len(wide)]
    two = mix(wide + before * STEP)
    three = mix(two + twice * STEP)
    one = wide & np.uint64((1 << ORDER_BITS[0]) - 1)
    shifted = (
        grams >> np.uint64(64 - b) for grams, b in zip((two, three), ORDER_BITS[1:], strict=True)
    )
    return [one.astype(np.int64), *(grams.astype(np.int64) for grams in shifted)]
