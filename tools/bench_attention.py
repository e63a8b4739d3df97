"""Times the attention implementations here: the numbers behind `choose` in kernels/attention.

    python tools/bench_attention.py

Prints the best of several calls in milliseconds, float32, causal, for training (forward and
gradients, S = T) and for decoding against a cache (forward only, S > T).
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.attention import flash_attention

TRAINING = [(8, 16), (8, 32), (8, 64), (8, 128), (8, 256), (4, 512), (2, 1024), (1, 2048)]  # B, T
DECODING = [(8, 1, 512), (8, 1, 4096), (8, 4, 1024), (8, 8, 1024), (8, 16, 1024)]  # B, T, S
N, K, H = 6, 2, 64


def best_ms(call: Callable, *arguments: jax.Array) -> float:
    """The least of 7 calls after a first that compiles."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def arrays(B: int, T: int, S: int) -> tuple[jax.Array, ...]:
    """Random q_BTNH, k_BSKH, v_BSKH."""
    random = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def gradients(implementation: str) -> Callable:
    """The gradients of q, k and v, compiled once per shape."""

    def loss(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        out_BTNH = flash_attention(q_BTNH, k_BSKH, v_BSKH, implementation=implementation)
        return jnp.square(out_BTNH).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def forward(implementation: str) -> Callable:
    """The output, compiled once per shape."""
    return jax.jit(partial(flash_attention, implementation=implementation))


def report(work: str, make: Callable[[str], Callable], B: int, T: int, S: int) -> None:
    """One line: both implementations, side by side."""
    times = [best_ms(make(name), *arrays(B, T, S)) for name in ("reference", "xla_chunked")]
    shape = f"B={B} T={T} S={S}"
    print(
        f"{work:9} {shape:18} reference {times[0]:8.2f}   xla_chunked {times[1]:8.2f}", flush=True
    )


def main() -> None:
    """Times every shape above."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, N={N} K={K} H={H}, ms")
    for B, T in TRAINING:
        report("gradients", gradients, B, T, T)
    for B, T, S in DECODING:
        report("forward", forward, B, T, S)


if __name__ == "__main__":
    main()
