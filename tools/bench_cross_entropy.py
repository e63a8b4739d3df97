"""The fused head and cross-entropy against the plain one: correctness, then peak memory, then time.

    python tools/bench_cross_entropy.py            # times a scaled-down size
    python tools/bench_cross_entropy.py --full     # times the size whose memory is shown

All three give the loss, dx and dhead of the same x, head and targets, jitted:

    plain   logits [M, V], jax.nn.logsumexp, take_along_axis; XLA keeps the logits for backward
    remat   the same in chunks of 1024 tokens under jax.checkpoint: what a user writes to save memory
    fused   llm_jax.kernels.cross_entropy

Memory is `compiled.memory_analysis().temp_size_in_bytes`: all that XLA allocates besides arguments
(x, head, targets, weights) and results (loss, dx, dhead), which are the same for all three. It is
compiled for, and not run at, V=151,936 M=8192 D=2048. Times are medians of calls that alternate;
CPU seconds are those of all this process's threads, which wait for no other process.

Measured on two busy CPU cores, jax 0.10.2, float32, 5 rounds:

    temporaries, M=8192 D=2048 V=151936
      plain       9496 MiB   1/1.0 of plain
      remat       1853 MiB   1/5.1 of plain
      fused        666 MiB   1/14.3 of plain
    time, M=2048 D=512 V=151936
      plain    27.6 s   1.00 of plain   17.6 CPU s, 1.00 of plain
      remat    27.8 s   1.01 of plain   17.6 CPU s, 1.00 of plain
      fused    21.5 s   0.78 of plain   12.8 CPU s, 0.73 of plain

At the full size one call of each: plain 321 s (202 CPU s), fused 195 s (171 CPU s).

Compiled ahead of time for a TPU v5e and a v5p, bfloat16, one device: temporaries of the same size
9496, 1784 and 1141 MiB (1/8.3 of plain), of which 593 MiB are the head in bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cross_entropy import cross_entropy, reference

Size = tuple[int, int, int]
FULL: Size = (8192, 2048, 151_936)  # M tokens, D, V
CHUNK = 1024
Z_LOSS = 1e-4


def plain(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """All logits at once."""
    sums = reference.weigh(*reference.token_nats(x, head, targets), weights)
    return sums.nats + Z_LOSS * sums.z_penalty


def remat(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """`plain` of one chunk after the other, computed again in backward."""
    cut = lambda a: a.reshape(-1, 1, min(CHUNK, a.shape[1]), *a.shape[2:])  # noqa: E731
    chunks = jax.tree.map(cut, (x, targets, weights))

    @jax.checkpoint
    def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        x, targets, weights = chunk
        return total + plain(x, head, targets, weights), None

    return jax.lax.scan(add, jnp.zeros(()), chunks)[0]


def fused(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Ours."""
    return cross_entropy(x, head, targets, weights, z_loss=Z_LOSS)[0]


LOSSES = {"plain": plain, "remat": remat, "fused": fused}


def compiled(loss: Callable, size: Size, dtype: str) -> jax.stages.Compiled:
    """Mean loss and gradients at a size, ahead of time. The head is float32, as parameters are."""
    M, D, V = size
    arguments = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((1, M, D), dtype), ((D, V), "float32"), ((1, M), "int32"), ((1, M), "float32"),
        )
    ]  # fmt: skip
    mean = lambda x, h, y, w: loss(x, h, y, w / jnp.maximum(w.sum(), 1.0))  # noqa: E731
    return jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*arguments).compile()


def arrays(size: Size, dtype: str) -> tuple[jax.Array, ...]:
    """Normed hidden states, a head of a model's scale, random targets, one in eight not counted."""
    M, D, V = size
    x, head, targets, weights = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(x, (1, M, D), dtype),
        jax.random.normal(head, (D, V)) * 0.02,
        jax.random.randint(targets, (1, M), 0, V),
        (jax.random.uniform(weights, (1, M)) > 1 / 8).astype(jnp.float32),
    )


def show_errors(dtype: str) -> None:
    """Against float64 by numpy: the largest error of each result, relative to its largest entry."""
    size = (2048, 96, 4096)
    given = arrays(size, dtype)
    x, head, targets, weights = (np.asarray(a, np.float64) for a in given)
    x, targets, weights = x[0], targets[0].astype(int), weights[0] / weights.sum()
    logits = x @ head
    log_z = np.log(np.exp(logits).sum(axis=1))
    one_hot = np.eye(size[2])[targets]
    loss = (weights * (log_z - (logits * one_hot).sum(axis=1) + Z_LOSS * log_z**2)).sum()
    pull = np.exp(logits - log_z[:, None]) * (1 + 2 * Z_LOSS * log_z[:, None]) - one_hot
    pull *= weights[:, None]
    exact = (loss, pull @ head.T, x.T @ pull)
    for name, function in LOSSES.items():
        value, (dx, dhead) = compiled(function, size, dtype)(*given)
        errors = [
            np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
            for got, want in zip((value, dx[0], dhead), exact, strict=True)
        ]
        print(f"  {name:6} loss {errors[0]:.1e}  dx {errors[1]:.1e}  dhead {errors[2]:.1e}")


def show_memory(size: Size, dtype: str) -> None:
    """Temporaries, and how many times smaller than the plain version's."""
    peaks = {}
    for name, function in LOSSES.items():
        analysis = compiled(function, size, dtype).memory_analysis()
        assert analysis is not None, "this backend does not tell its memory"
        peaks[name] = analysis.temp_size_in_bytes
        ratio = peaks["plain"] / peaks[name]
        print(f"  {name:6} {peaks[name] / 2**20:9.0f} MiB   1/{ratio:.1f} of plain", flush=True)


def show_times(size: Size, dtype: str, rounds: int) -> None:
    """Medians of alternating calls, after one of each that is not counted."""
    programs = {name: compiled(function, size, dtype) for name, function in LOSSES.items()}
    given = arrays(size, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*given))
            if turn:
                seconds[name].append(time.perf_counter() - begin)
                cpu_seconds[name].append(time.process_time() - cpu_begin)
    cpu_medians = {name: statistics.median(times) for name, times in cpu_seconds.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    products = 6 * size[0] * size[1] * size[2]  # three matrix products, whatever is recomputed
    for name, median in medians.items():
        print(
            f"  {name:6} {median:9.4f} s   {median / medians['plain']:.2f} of plain   "
            f"{products / median / 1e12:.3f} TFLOP/s   {cpu_medians[name]:.4f} CPU s, "
            f"{cpu_medians[name] / cpu_medians['plain']:.2f} of plain"
        )


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description="fused head and cross-entropy against the plain")
    parser.add_argument("--tokens", type=int, default=2048, help="M, a multiple of 1024")
    parser.add_argument("--embed", type=int, default=512, help="D")
    parser.add_argument("--vocab", type=int, default=FULL[2], help="V")
    parser.add_argument("--dtype", default="float32", help="of the hidden states")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="time the full size")
    options = parser.parse_args()
    size = FULL if options.full else (options.tokens, options.embed, options.vocab)
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {options.dtype}")
    print("error against float64, M=2048 D=96 V=4096")
    show_errors(options.dtype)
    print("temporaries, M={} D={} V={}".format(*FULL))
    show_memory(FULL, options.dtype)
    print("time, M={} D={} V={}".format(*size))
    show_times(size, options.dtype, options.rounds)


if __name__ == "__main__":
    main()
