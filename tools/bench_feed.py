"""Feeding: rows a second that the loader delivers beside what the demo's model takes, and 5 GB of shards.

    python tools/bench_feed.py                   # a minute or two; 5 GB of disk space in name only
    python tools/bench_feed.py --gigabytes 0.1   # a smaller set

1. Two sources of random tokens are written to a temporary folder, 16 MB each, and read through
   `loader.batches` as training does, with a ramp of the mixture under way. One process, on the shape
   of the demo's batch (4 x 256) and of a larger one (64 x 1024); the demo's compiled step is timed in
   the same process, after the loader has ended.
2. A set of shards of the size asked for is laid out as sparse files: every length and offset is as in
   written data, and the tokens are holes, which opening and planning never read. It is opened, and
   planned with both packings.

The table is in tools/results/feed.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.data import shards
from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.page_checks import checks_of
from llm_jax.data.phases import Phase
from llm_jax.data.row_order import RowOrder
from llm_jax.data.weights import SourceWeight
from llm_jax.run.demo import demo_config
from llm_jax.sharding import batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.train import (
    StageConfig,
    compile_step,
    init_state,
    make_optimizer,
    plan_stages,
)

VOCAB = 4096
SHARD_TOKENS = 1 << 27
MEAN_TOKENS = 1000  # of a document; lengths are log-normal, as those of web text are
SPREAD = 1.0


def write_prepared(folder: Path, tokens: dict[str, int], dtype: str, sparse: bool) -> None:
    """A folder of prepared data with about this many training tokens of every source."""
    sources = {}
    for seed, (name, total) in enumerate(tokens.items()):
        rng = np.random.default_rng(seed)
        (folder / name).mkdir(parents=True)
        mean = np.log(MEAN_TOKENS) - SPREAD**2 / 2
        lengths = np.maximum(rng.lognormal(mean, SPREAD, total // MEAN_TOKENS).astype(np.int64), 3)
        entries, begin = [], 0
        while begin < len(lengths):
            ends = np.cumsum(lengths[begin:])
            count = max(1, int(np.searchsorted(ends, SHARD_TOKENS, side="right")))
            stem = f"{name}/train-{len(entries):05d}"
            entries.append(_write_shard(folder, stem, ends[:count], dtype, rng, sparse))
            begin += count
        train = _split_entry(entries)
        sources[name] = {"splits": {"train": train, "heldout": _split_entry([])}}
    manifest: dict[str, Any] = {
        "format": shards.FORMAT,
        "dtype": dtype,
        "tokenizer": {"fingerprint": "none", "vocab_size": VOCAB, "bos_id": 1, "eos_id": 2},
        "sources": sources,
    }
    manifest["digest"] = shards.content_digest(manifest)
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))


def _write_shard(
    folder: Path, stem: str, ends: np.ndarray, dtype: str, rng: np.random.Generator, sparse: bool
) -> dict[str, Any]:
    token_file, document_file = f"{stem}.tokens.npy", f"{stem}.documents.npy"
    stored = np.lib.format.open_memmap(
        folder / token_file, mode="w+", dtype=dtype, shape=(int(ends[-1]),)
    )
    if not sparse:
        stored[:] = rng.integers(3, VOCAB, len(stored))
    stored.flush()
    del stored
    np.save(folder / document_file, np.stack([ends, ends * 4, ends * 4], axis=1))
    checks: dict[str, Any] = {}
    if not sparse:  # a hole of gigabytes is not read here
        checks_file = f"{stem}.checks.npy"
        np.save(folder / checks_file, checks_of(folder / token_file))
        size = (folder / checks_file).stat().st_size
        checks = {"checks_file": checks_file, "checks_size": size, "checks_sha256": "not computed"}
    return {
        **checks,
        "tokens_file": token_file,
        "tokens_size": (folder / token_file).stat().st_size,
        "tokens_sha256": "not computed",
        "documents_file": document_file,
        "documents_size": (folder / document_file).stat().st_size,
        "documents_sha256": shards.sha256_of(folder / document_file),
        "num_tokens": int(ends[-1]),
        "num_documents": len(ends),
    }


def _split_entry(entries: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(entry["num_tokens"] for entry in entries)
    documents = sum(entry["num_documents"] for entry in entries)
    counts = {"documents": documents, "tokens": tokens, "bytes": tokens * 4, "characters": tokens}
    return {"shards": entries, **counts}


def rows_per_second(
    prepared: str, batch_size: int, seq_len: int, workers: int, seconds: float
) -> float:
    """Of the loader alone, its first batches left out."""
    weights = (SourceWeight(name="en", weight=0.7), SourceWeight(name="zh", weight=0.3))
    ramp = Phase(from_step=1, sources=weights[::-1], ramp_steps=100_000)
    config = DataConfig(prepared=prepared, sources=weights, seq_len=seq_len, phases=(ramp,))
    plan = DataPlan(config, order=RowOrder(sizes=((0, batch_size),)))
    with batches(plan, batch_size, np.arange(batch_size), workers=workers) as feed:
        for _ in range(4 * max(1, workers) * 3):  # what was read ahead while workers started
            next(feed)
        begin, taken = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            next(feed)
            taken += 1
        return taken * batch_size / (time.perf_counter() - begin)


def demo_rows_per_second(prepared: str, seconds: float) -> float:
    """Of the demo's compiled training step, on batches it already holds."""
    config = demo_config(prepared, "unused")
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer)
    stage = plan_stages(StageConfig(), config.optimizer, config.train.steps, config.model)[0]
    size = config.step.batch_size
    plan = DataPlan(config.data)
    with jax.set_mesh(mesh):
        step = compile_step(
            mesh,
            model=config.model,
            config=config.step,
            optimizer=optimizer,
            schedule=stage.schedule,
            clip_norm=config.optimizer.clip_norm,
        )
        state = init_state(config.model, optimizer, mesh, seed=0)
        sharding = batch_sharding(mesh, size, plan.seq_len)
        rows = local_rows(sharding, size)
        batch = type(plan.rows(rows))(
            *(place_rows(local, rows, size, sharding) for local in plan.rows(rows))
        )
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            done += 1
        return done * size / (time.perf_counter() - begin)


def bench_loader(seconds: float) -> None:
    """Prints the table of part 1."""
    with tempfile.TemporaryDirectory() as folder:
        write_prepared(Path(folder), {"en": 8 << 20, "zh": 8 << 20}, "uint16", sparse=False)
        print("| batch | worker processes | rows/s | tokens/s | times the demo's model |")
        print("|---|---|---|---|---|")
        measured = [
            (batch, length, workers, rows_per_second(folder, batch, length, workers, seconds))
            for batch, length in ((4, 256), (64, 1024))
            for workers in (0, 1, 2)
        ]
        demo = demo_rows_per_second(folder, seconds)
        for batch, length, workers, rate in measured:
            # a row of 1,024 tokens is four rows of the demo
            times = rate * length / 256 / demo
            print(
                f"| {batch} x {length} | {workers} | {rate:,.0f} | {rate * length:,.0f} | {times:,.0f} |"
            )
        print(f"| demo's step, 4 x 256 | | {demo:,.1f} | {demo * 256:,.0f} | 1 |")


def timed(what: str, action: Any, times: int = 1) -> Any:
    """Runs an action and prints a row of the table of part 2: its fastest time."""
    seconds, result = [], None
    for _ in range(times):
        begin = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - begin)
    print(f"| {what} | {1000 * min(seconds):,.1f} ms |", flush=True)
    return result


def bench_large(gigabytes: float) -> None:
    """Prints the table of part 2."""
    tokens = int(gigabytes * 1e9 / 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        each = {"en": tokens * 6 // 10, "zh": tokens * 4 // 10}
        write_prepared(folder, each, "uint32", sparse=True)
        size = sum(file.stat().st_size for file in folder.rglob("*.npy"))
        prepared = shards.open_prepared(folder)
        documents = sum(splits["train"].num_documents for splits in prepared.sources.values())
        pairs = sum(splits["train"].num_pairs for splits in prepared.sources.values())
        print(f"\n{size / 1e9:.2f} GB: {pairs:,} pairs of {documents:,} documents\n")
        print("| | time |\n|---|---|")
        timed(f"open {len(prepared.shards())} shards", lambda: shards.open_prepared(folder), 5)
        for packing in ("concat", "best_fit"):
            for length in (1024, 4096):
                config = DataConfig(prepared=name, seq_len=length, packing=packing)
                timed(f"plan of {packing}, rows of {length}", lambda c=config: DataPlan(c))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of part 2 (5); 0 skips it")
    parser.add_argument("--seconds", type=float, default=5.0, help="for every rate of part 1 (5)")
    arguments = parser.parse_args()
    bench_loader(arguments.seconds)
    if arguments.gigabytes:
        bench_large(arguments.gigabytes)
