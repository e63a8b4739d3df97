"""Seconds to compile the training step of 4 and of 48 layers, alternating, medians, and their ratio.

Run:     python tools/bench_compile.py
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from llm_jax.data.batch import Batch
from llm_jax.model import ModelConfig
from llm_jax.train import (
    OptimizerConfig,
    StepConfig,
    make_optimizer,
    make_schedule,
    new_state,
    train_step,
)

MODEL = ModelConfig(
    vocab_size=4096,
    embed_dim=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    mlp_dim=640,
    max_seq_len=256,
)


def seconds_to_compile(num_layers: int) -> float:
    """Traces, lowers and compiles one step from nothing."""
    jax.clear_caches()
    model = dataclasses.replace(MODEL, num_layers=num_layers)
    config = OptimizerConfig(warmup_steps=2)
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda: new_state(model, optimizer, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct((8, 256), jnp.float32))
    step = functools.partial(
        train_step,
        model=model,
        config=StepConfig(batch_size=8),
        optimizer=optimizer,
        schedule=make_schedule(config, 10),
        clip_norm=1.0,
    )
    begin = time.perf_counter()
    jax.jit(step).lower(state, batch).compile()
    return time.perf_counter() - begin


def main() -> None:
    """Prints the table."""
    times: dict[int, list[float]] = {4: [], 48: []}
    for _ in range(5):
        for layers, seconds in times.items():
            seconds.append(seconds_to_compile(layers))
    medians = {layers: statistics.median(seconds) for layers, seconds in times.items()}
    for layers, median in medians.items():
        print(f"{layers:3d} layers  {median:.2f} s")
    print(f"ratio       {medians[48] / medians[4]:.2f}")


if __name__ == "__main__":
    main()
