"""What worker processes bring: `data clean` and `data dedup` with 0, 1 and 2 of them, medians of one run.

    python tools/bench_workers.py CORPUS [--rounds 3]      # CORPUS: a folder of *.jsonl.gz with a field "text"

With one worker the parent works beside it, on a core of its own; with two, on two cores, all three share them.
So two workers are at most 2 x workers' CPU / all CPU times one there. What the parent does (cutting the input into
blocks, compressing what is written, counting) also limits how many workers it can feed: their CPU / its own.

Measured on 26 November 2026, 50 MB, CPU seconds at a load of 17, which makes wall seconds worthless: clean, parent 0.40
and two workers 10.3 (at most 1.93 times one on two cores; the parent can feed 26); dedup 0.26 and 2.95 (1.84; 11), of
which each worker spends 0.3 on its imports. Before parsing moved to the workers: clean, parent 0.83; dedup 1.2 and 2.3 (1.31;
2); and on two quiet cores two workers were 1.76 and 1.17 times one.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llm_jax.data.clean.stage import CleanStage, clean_stage
from llm_jax.data.dedup.stage import DedupStage, dedup_stage
from llm_jax.data.sources import SourceConfig

WORKERS = (0, 1, 2)
STAGES: dict[str, Callable[..., Any]] = {
    "clean": lambda **told: clean_stage(CleanStage(**told)),
    "dedup": lambda **told: dedup_stage(DedupStage(**told)),
}


class Shifted(dict[int, int]):
    """A table for `str.translate`: every letter becomes the one `by` places on."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self._by = by

    def __missing__(self, code: int) -> int:
        self[code] = code + self._by * chr(code).isalpha()
        return self[code]


def gather(corpus: Path, target: Path, copies: int) -> None:
    """One plain file of all texts, so that unpacking is not measured; no copy repeats another."""
    with open(target, "w", encoding="utf-8") as out:
        for copy in range(copies):
            table = Shifted(copy)
            for file in sorted(corpus.glob("*.jsonl.gz")):
                with gzip.open(file, "rt", encoding="utf-8") as lines:
                    for row in map(json.loads, lines):
                        if "text" in row:
                            text = row["text"].translate(table)
                            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def seconds(run: Callable[[], Any]) -> tuple[float, float, float]:
    """Wall time, CPU time of this process, CPU time of the workers it started."""

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    wall, cpu, below = time.perf_counter(), time.process_time(), children()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu, children() - below


def main() -> None:
    """Prints a line per stage and number of workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--copies", type=int, default=1, help="times the corpus (dedup only)")
    arguments = parser.parse_args()
    if arguments.copies > 1 and arguments.stages != ["dedup"]:
        parser.error("--copies makes text that no rule keeps; give --stages dedup with it")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gather(arguments.corpus, folder / "raw.jsonl", arguments.copies)
        sources = (SourceConfig(name="a", path=str(folder / "raw.jsonl")),)
        told: dict[str, Any] = {"sources": sources, "output": f"{folder}/out", "overwrite": True}
        for stage in arguments.stages:
            times: dict[int, list[tuple[float, float, float]]] = {w: [] for w in WORKERS}
            # one after another in each round, so that all meet the same load
            for workers in WORKERS * arguments.rounds:
                run = partial(STAGES[stage], workers=workers, **told)
                times[workers].append(seconds(run))
            show(stage, times)


def show(stage: str, times: dict[int, list[tuple[float, float, float]]]) -> None:
    """Prints medians, and what they say of two workers."""
    medians = {
        workers: [statistics.median(column) for column in zip(*runs, strict=True)]
        for workers, runs in times.items()
    }
    for workers, (wall, parent, below) in medians.items():
        print(
            f"{stage:6} {workers} workers: {wall:6.2f} s, CPU of the parent {parent:5.2f}, "
            f"of the workers {below:5.2f}"
        )
    ratio = statistics.median(one[0] / two[0] for one, two in zip(times[1], times[2], strict=True))
    _, parent, below = medians[2]
    print(
        f"{stage:6} two workers are {ratio:.2f} times one; on two cores at most "
        f"{2 * below / (parent + below):.2f}; the parent can feed {below / parent:.0f}; "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
