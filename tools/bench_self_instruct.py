"""How fast instructions are compared with a pool: ours, plain rapidfuzz, and rouge-score (if installed).

    python tools/bench_self_instruct.py                       sentences made of seeds' words
    python tools/bench_self_instruct.py ../shared/corpus      lines of its English-Chinese pairs

Prints pairs per second of one core's time (all three run on one thread), and whether all give the same highest scores.
"""

import argparse
import gzip
import importlib.util
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from llm_jax.data.rouge import f_measure
from llm_jax.instruct.self_instruct.novelty import (
    FIRST_SURROGATE,
    NUM_SURROGATES,
    Pool,
    tokens,
)
from llm_jax.instruct.self_instruct.tasks import read_seeds

MAX_CHARACTERS = {"en": 300, "zh": 100}  # of a line of the corpus: instructions are no longer
ROUGE_PAIRS = 3000  # enough to time 5,000 a second


def made_up(language: str, count: int) -> list[str]:
    """Texts of the lengths of the seeds, of random phrases of three tokens from them."""
    rng = random.Random(0)
    known = [tokens(t.instruction, language) for t in read_seeds((), (language,), 8)[language]]
    phrases = [words[n : n + 3] for words in known for n in range(0, len(words), 3)]
    texts = []
    for _ in range(count):
        size = len(rng.choice(known))
        words = [word for _ in range(-(-size // 3)) for word in rng.choice(phrases)]
        texts.append((" " if language == "en" else "").join(words[:size]))
    return texts


def corpus_lines(folder: Path, language: str, count: int) -> list[str]:
    """Distinct lines of the pairs, cut to the length of instructions."""
    with gzip.open(folder / "pairs-python-docs.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = {json.loads(line)[language][: MAX_CHARACTERS[language]] for line in file}
    texts = sorted(text for text in texts if len(tokens(text, language)) >= 4)
    random.Random(0).shuffle(texts)
    return texts[:count]


def timed(work: Callable[[], list], pairs: int) -> tuple[list, float]:
    """The result, and millions of pairs a second of the processor's time: the best of two runs."""
    best, result = float("inf"), []
    for _ in range(2):
        begun = time.process_time()
        result = work()
        best = min(best, time.process_time() - begun)
    return result, pairs / best / 1e6


def rouge_scores(texts: list[str], pool: list[str]) -> list[float]:
    """What rouge-score gives for every pair."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(a, b)["rougeL"].fmeasure for a in texts for b in pool]


def bench(language: str, texts: list[str], queries: int) -> None:
    """Prints a row a method."""
    asked, known = texts[:queries], texts[queries:]
    pool = Pool(language)
    begun = time.process_time()
    for text in known:
        pool.add(text)
    added = time.process_time() - begun
    lengths = np.array([len(tokens(text, language)) for text in known])
    print(
        f"\n{language}: {len(asked)} candidates against {len(known):,} instructions of {lengths.mean():.1f} tokens; "
        f"{len(known) / added / 1e3:.0f} thousand a second are added"
    )
    pairs = len(asked) * len(known)
    ours, speed = timed(lambda: [pool.nearest(text) for text in asked], pairs)
    print(f"  ours, the highest score and where it is   {speed:8.2f} million pairs/s")

    ids: dict[str, int] = {}

    def encode(text: str) -> str:
        numbers = [ids.setdefault(token, len(ids)) for token in tokens(text, language)]
        return "".join(chr(n if n < FIRST_SURROGATE else n + NUM_SURROGATES) for n in numbers)

    encoded, candidates = [encode(text) for text in known], [encode(text) for text in asked]

    def plain() -> list[tuple[float, int]]:
        best = []
        for text in candidates:
            common = process.cdist(
                [text], encoded, scorer=LCSseq.similarity, dtype=np.int32, workers=1
            )[0]
            scores = f_measure(common, len(text), lengths)
            best.append((float(scores.max()), int(scores.argmax())))
        return best

    computed, speed = timed(plain, pairs)
    same = sum(tuple(one) == other for one, other in zip(ours, computed, strict=True))
    print(
        f"  every pair by rapidfuzz                   {speed:8.2f}   equal: {same} of {len(ours)}"
    )
    scores = sorted(nearest.score for nearest in ours)
    print(f"  highest scores: median {scores[len(scores) // 2]:.2f}, top {scores[-1]:.2f}")
    if language == "en" and importlib.util.find_spec("rouge_score"):
        few = known[: ROUGE_PAIRS // 30]
        found, speed = timed(lambda: rouge_scores(asked[:30], few), 30 * len(few))
        own = Pool(language)
        for text in few:
            own.add(text)
        highest = np.array(found).reshape(30, -1).max(axis=1)
        same = sum(own.nearest(t).score == s for t, s in zip(asked[:30], highest, strict=True))
        print(f"  rouge-score                               {speed:8.4f}   equal: {same} of 30")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=re.sub(r"\n\n.*", "", __doc__ or "", flags=re.S))
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--pool", type=int, default=40_000)
    parser.add_argument("--queries", type=int, default=200)
    arguments = parser.parse_args()
    for language in ("en", "zh"):
        count = arguments.pool + arguments.queries
        texts = (
            corpus_lines(arguments.corpus, language, count)
            if arguments.corpus
            else made_up(language, count)
        )
        bench(language, texts, arguments.queries)


if __name__ == "__main__":
    main()
