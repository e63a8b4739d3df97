"""What worker processes bring: `data clean` and `data dedup` with 0, 1 and 2 of them, medians of one run.

    python tools/bench_workers.py CORPUS [--rounds 3]      # CORPUS: a folder of *.jsonl.gz with a field "text"

Wall seconds say what a quiet machine does; on a busy one the CPU seconds of the parent (reading, writing,
counting) and of the workers say what would be: with enough cores the time is that of the slower of the two, so
two workers are at most `1 worker / max(parent, workers / 2)` times one.

Measured on 26 November 2026, 50 MB, two quiet cores, medians of 3: clean 9.96 s with one worker and 5.66 with two
(1.76 times), of them 0.83 s of CPU in the parent; dedup 2.40 and 2.05 s: its parent, which reads everything twice and
writes what stays (1.1 s of CPU), is what to make faster.
"""

import argparse
import gzip
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.data.clean.stage import CleanStage, clean_stage
from llm_jax.data.dedup.stage import DedupStage, dedup_stage
from llm_jax.data.sources import SourceConfig


def gather(corpus: Path, target: Path) -> None:
    """One plain file of all texts, so that unpacking is not measured."""
    with open(target, "w", encoding="utf-8") as out:
        for file in sorted(corpus.glob("*.jsonl.gz")):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    if "text" in row:
                        out.write(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n")


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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gather(arguments.corpus, folder / "raw.jsonl")
        sources = (SourceConfig(name="a", path=str(folder / "raw.jsonl")),)
        told: dict[str, Any] = {"sources": sources, "output": f"{folder}/out", "overwrite": True}
        for stage in ("clean", "dedup"):
            for workers in (0, 1, 2):

                def run(stage: str = stage, workers: int = workers) -> None:
                    if stage == "clean":
                        clean_stage(CleanStage(**told, workers=workers))
                    else:
                        dedup_stage(DedupStage(**told, workers=workers))

                times = zip(*(seconds(run) for _ in range(arguments.rounds)), strict=True)
                wall, parent, below = map(statistics.median, times)
                print(
                    f"{stage:6} {workers} workers: {wall:6.2f} s, CPU of the parent {parent:5.2f}, "
                    f"of the workers {below:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
