"""Near-duplicates: documents per CPU second beside datasketch and rensa, recall, and memory by count.

    python tools/bench_dedup.py CORPUS              # speed and recall; CORPUS as for bench_clean.py
    python tools/bench_dedup.py --memory 500000 1000000 2000000   # peak memory at these counts

Speed is end to end: reading compressed JSON lines, signatures, clusters, writing what stays, on 2 kB
documents cut from the corpus. The others get the shingling that Python code does for them (a set of
character 5-grams), signatures of 128 and an LSH index at the same threshold, and neither read nor write.
Seconds are CPU seconds of this process. Recall is of copies with 8 % of the sentences dropped and a
header put before. Memory is the peak of a process that indexes random sketches, of which a tenth repeat.

Measured on one of two busy CPU cores, numpy 2.4.6, rensa 0.5.0, datasketch 2.0.0:

    llm_jax, end to end         6,615 to 7,048 documents/s  (20,000 of 2 kB; four runs)
    texts in hand: llm_jax 11,576, rensa 4,346, datasketch 583 documents/s
    recall, zh and en: llm_jax 99.0 % 99.3 %, rensa 76.0 % 92.7 %, datasketch 65.3 % 86.3 %; no side
    calls one of the 300 originals a repeat. The others compare spaces and punctuation too.
    memory: 1 M documents 125 MB, 10 M documents 203 MB (82 s, 1,000,000 near): 9.1 bytes a document
"""

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.data.dedup.planted

from llm_jax.data.dedup.index import Index, Sketch
from llm_jax.data.dedup.minhash import PLACES, choose_rows
from llm_jax.data.dedup.stage import DedupStage, dedup_stage, repeats
from llm_jax.data.sources import SourceConfig

THRESHOLD, SHINGLE, PERMUTATIONS = 0.7, 5, 128
DOCUMENT_BYTES = 2000
OTHERS = 1500  # documents for the slow ones
CHUNK = 10_000
SORT_MEMORY = 64 << 20  # small, so that the slope is that of what grows without bound


def documents(corpus: Path, count: int) -> list[str]:
    """Pieces of 2,000 bytes of all files, in a seeded order."""
    pieces = []
    for file in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                data = json.loads(line).get("text", "").encode()
                pieces += [
                    data[start : start + DOCUMENT_BYTES].decode("utf-8", "ignore")
                    for start in range(0, len(data) - DOCUMENT_BYTES, DOCUMENT_BYTES)
                ]
    random.Random(0).shuffle(pieces)
    return pieces[:count]


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def ours(texts: list[str]) -> float:
    """Documents per CPU second of the whole stage."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.jsonl.gz"
        with gzip.open(file, "wt", encoding="utf-8", compresslevel=1) as stream:
            stream.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        config = DedupStage(
            sources=(SourceConfig(name="x", path=str(file)),), output=str(Path(folder) / "out")
        )
        seconds, _ = cpu_seconds(lambda: dedup_stage(config))
    return len(texts) / seconds


def shingles(text: str) -> set[str]:
    """Character 5-grams, as Python code makes them."""
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


def with_datasketch(texts: list[str]) -> list[bool]:
    """Which texts are repeats of earlier ones, by datasketch."""
    from datasketch import MinHash, MinHashLSH  # pyright: ignore[reportMissingImports]

    index, found = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS), []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        found.append(bool(index.query(sketch)))
        index.insert(number, sketch)
    return found


def with_rensa(texts: list[str]) -> list[bool]:
    """Which texts are repeats of earlier ones, by rensa."""
    from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportMissingImports]

    index, found = RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=32), []
    sketches = []
    for number, text in enumerate(texts):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=42)
        sketch.update(list(shingles(text)))
        near = [i for i in index.query(sketch) if sketches[i].jaccard(sketch) >= THRESHOLD]
        found.append(bool(near))
        index.insert(number, sketch)
        sketches.append(sketch)
    return found


def with_us(texts: list[str]) -> list[bool]:
    """Which texts are repeats of earlier ones, by `llm_jax.data.dedup`."""
    with tempfile.TemporaryDirectory() as folder:
        verdicts = repeats(texts, Path(folder), THRESHOLD, SHINGLE)
    return (verdicts.first != np.arange(len(texts))).tolist()


def compare(corpus: Path) -> None:
    """Prints speeds, then recall and false repeats on planted copies."""
    from tests.data.dedup import planted

    planted.CORPUS = corpus
    texts = documents(corpus, 20_000)
    ours(texts[:500])
    print(f"llm_jax, end to end      {ours(texts):8,.0f} documents/s  ({len(texts):,} of 2 kB)")
    sides = {"llm_jax": with_us, "rensa": with_rensa, "datasketch": with_datasketch}
    installed = {n: f for n, f in sides.items() if n == "llm_jax" or importlib.util.find_spec(n)}
    for name, function in installed.items():
        part = texts if name == "llm_jax" else texts[:OTHERS]
        seconds, _ = cpu_seconds(lambda function=function, part=part: function(part))
        print(f"{name:10} texts in hand {len(part) / seconds:8,.0f} documents/s")
    for language, characters in (("zh", 900), ("en", 2200)):
        originals = planted.corpus_documents(language, 300, characters)
        rng = random.Random(2)
        copies = [planted.repost(text, language, rng) for text in originals]
        for name, function in installed.items():
            found = function(originals + copies)
            recall = np.mean(found[len(originals) :])
            false = sum(found[: len(originals)])
            print(
                f"{name:10} {language} recall {recall:6.1%}, {false} of {len(originals)} originals"
            )


def peak(count: int, queue: Any) -> None:
    """Indexes random sketches; reports peak memory in MB before and after, and CPU seconds."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.process_time()
        index = Index(Path(folder), choose_rows(THRESHOLD), THRESHOLD, SORT_MEMORY)
        for begin in range(0, count, CHUNK):
            size = min(CHUNK, count - begin)
            signatures = rng.integers(0, 1 << 32, (size, PLACES), dtype=np.uint32)
            signatures[: size // 10] = signatures[size // 10 : 2 * (size // 10)]
            hashes = rng.integers(0, 1 << 63, (size, 2), dtype=np.uint64)
            index.add(Sketch.of(hashes, signatures, choose_rows(THRESHOLD)))
        verdicts = index.verdicts()
        near = int(np.count_nonzero(verdicts.kind))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        queue.put((before, after, time.process_time() - start, near))


def memory(counts: list[int]) -> None:
    """Prints peak memory at each count in a process of its own, and what 10 M would take."""
    context, rows = multiprocessing.get_context("spawn"), []
    for count in counts:
        queue = context.Queue()
        process = context.Process(target=peak, args=(count, queue))
        process.start()
        before, after, seconds, near = queue.get()
        process.join()
        rows.append((count, after))
        print(
            f"{count:>11,} documents: {before:.0f} -> {after:.0f} MB, {seconds:.1f} s, {near:,} near"
        )
    if len(rows) > 1:
        slope, start = np.polyfit([r[0] for r in rows], [r[1] for r in rows], 1)
        print(f"slope {slope * 2**20:.1f} bytes a document; at 10 M {start + slope * 1e7:,.0f} MB")


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    if arguments.corpus:
        compare(arguments.corpus)
    memory(arguments.memory)


if __name__ == "__main__":
    main()
