"""What checkpoints cost: how long steps wait for them, and whether the host's memory grows with their number.

python tools/bench_save.py                  the demo's model: 100 steps, a save every 50; then 200 saves
python tools/bench_save.py --saves 20       shorter
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config as config_files
from llm_jax.checkpoint import CheckpointConfig, RunLock, Store
from llm_jax.data.batch import Batch
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train import compile_step, init_state, make_optimizer, make_schedule

ROOT = Path(__file__).parent.parent


def resident() -> float:
    """Megabytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def demo_batch(config: PretrainConfig) -> Batch:
    """Rows without padding."""
    shape = (config.step.batch_size, config.data.seq_len)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    return Batch(ids, ids, positions, ones, ones.astype(np.float32))


def stall(store: Store, state: Any, step: Any, batch: Batch, steps: int, every: int) -> Any:
    """Prints what share of the time steps wait for saves."""
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    store.save(1, state, {}, {}, {"loss": 1.0})  # compiles the fingerprints, once a run
    store.wait()
    waits, times = [], []
    for number in range(1, steps + 1):
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begun)
        if number % every == 0:
            begun = time.perf_counter()
            store.save(number, state, {}, {}, {"loss": 1.0})
            waits.append(time.perf_counter() - begun)
    plain = statistics.median(times) * steps
    print(f"step          {statistics.median(times) * 1e3:8.1f} ms (median of {steps})")
    print(
        f"save          {statistics.mean(waits) * 1e3:8.1f} ms that the step waits, every {every} steps"
    )
    print(f"save stall    {sum(waits) / (sum(waits) + plain):8.2%} of the time")
    store.wait()
    return state


def memory(store: Store, state: Any, saves: int) -> None:
    """Prints the host's memory over many saves."""
    marks = {}
    for number in range(1, saves + 1):
        store.save(1000 + number, state, {}, {}, {"loss": 1.0})
        store.wait()
        if number in (1, saves // 10, saves // 4, saves // 2, 3 * saves // 4, saves):
            marks[number] = resident()
            print(f"after {number:4} saves {marks[number]:8.1f} MB", flush=True)
    settled = marks[max(1, saves // 10)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(
        f"growth        {marks[saves] - settled:8.1f} MB since save {saves // 10}; one checkpoint is {size:.1f} MB"
    )


def main() -> None:
    """Both measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--saves", type=int, default=200)
    arguments = parser.parse_args()
    config = config_files.load(ROOT / "configs" / "demo.py", PretrainConfig)
    mesh = make_mesh(MeshConfig(data=-1))
    optimizer = make_optimizer(config.optimizer)
    state = init_state(config.model, optimizer, mesh, seed=0)
    step = compile_step(
        mesh,
        model=config.model,
        config=config.step,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, 10_000),
        clip_norm=1.0,
    )
    with (
        tempfile.TemporaryDirectory() as name,
        RunLock(name) as lock,
        Store(Path(name) / "checkpoints", CheckpointConfig(keep_last=2), lock=lock) as store,
        jax.set_mesh(mesh),
    ):
        state = stall(store, state, step, demo_batch(config), arguments.steps, arguments.every)
        memory(store, state, arguments.saves)


if __name__ == "__main__":
    main()
