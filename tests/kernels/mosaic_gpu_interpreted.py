"""Run by test_mosaic_gpu.py, in a process of its own: the Hopper kernels interpreted on the CPU.

The interpreter simulates warpgroups, barriers and TMA with blocking callbacks, each of which holds one
of XLA's CPU threads: with as many threads as a small machine has cores it locks up, hence NPROC.
Float32 throughout, as products are then exact and errors are the algorithm's.
"""

import sys
from typing import NamedTuple

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from llm_jax.kernels.attention import flash_attention, mosaic_gpu, mosaic_gpu_backward
from tests.kernels.attention_oracle import attend as oracle
from tests.kernels.gpu_aot import hopper


class Case(NamedTuple):
    features: str
    T: int
    S: int
    H: int
    B: int = 1
    N: int = 2
    K: int = 1
    split: bool = (
        True  # whether query heads that share keys are split over blocks, as few blocks ask
    )


# All but the first refill slots of shared memory, where a missing fence shows as a race.
CASES = {
    "everything": Case("causal window alibi soft_cap segments slots", 130, 257, 64, N=4, K=2),
    "nothing, several tiles and stages": Case("", 256, 640, 128, K=2),
    "heads of 256": Case("causal alibi segments", 130, 257, 256),
    "padded heads, fewer keys": Case("causal window soft_cap segments", 200, 100, 80, B=2, N=3),
    "both directions, slots": Case("alibi slots", 130, 700, 64),
    "heads that share keys in one block": Case("causal alibi", 130, 257, 64, N=3, split=False),
}


def documents(case: Case, length: int) -> np.ndarray:
    """Documents, one of a single token, with padding behind; other ends in every row."""
    rows = []
    for b in range(case.B):
        starts = [length // 3 + b, length // 3 + 1 + b, length // 2]
        segments = np.searchsorted(starts, np.arange(length), "right") + 1
        segments[length - 7 - b :] = 0
        rows.append(segments)
    return np.stack(rows).astype(np.int32)


def check(case: Case) -> None:
    random, has = np.random.default_rng(0), case.features.split()
    B, T, S, N, K, H = case.B, case.T, case.S, case.N, case.K, case.H
    shapes = ((T, N, H), (S, K, H), (S, K, H), (T, N, H), (T, N))
    q, k, v, *grads = (random.normal(size=(B, *s)).astype(np.float32) for s in shapes)
    slopes = 2.0 ** -np.arange(1, N + 1, dtype=np.float32) if "alibi" in has else None
    segments = tuple(documents(case, n) for n in (T, S)) if "segments" in has else (None, None)
    slots = [np.stack([random.permutation(2 * S)[:n] for _ in range(B)]) for n in (T, S)]
    positions = tuple(slots) if "slots" in has else (None, None)
    rule = {
        "scale": 1.1 * H**-0.5,
        "causal": "causal" in has,
        "window": 40 if "window" in has else 0,
        "soft_cap": 1.5 if "soft_cap" in has else 0.0,
    }
    expected = oracle(
        *(q, k, v, *grads),
        **rule,
        slopes=slopes,
        segments=segments if "segments" in has else None,
        positions=positions if "slots" in has else None,
    )
    grads[1] = np.where(np.isneginf(expected[1]), np.nan, grads[1])  # must not spread

    @jax.jit
    def run(q, k, v):
        def attend(q, k, v):
            return flash_attention(
                q,
                k,
                v,
                **rule,
                alibi_slopes_N=slopes,
                q_segments_BT=segments[0],
                kv_segments_BS=segments[1],
                q_positions_BT=positions[0],
                kv_positions_BS=positions[1],
                implementation="mosaic_gpu",
                return_lse=True,
            )

        results, pull_back = jax.vjp(attend, q, k, v)
        return *results, *pull_back(tuple(grads))

    if not case.split:
        mosaic_gpu_backward.ENOUGH_BLOCKS = 1
    mosaic_gpu.INTERPRET = InterpretGPUParams(detect_races=True)
    with hopper():
        found = run(q, k, v)
    # shares are exponentials of float32 scores, which ALiBi of far slots makes as large as the lse
    tolerance = max(1e-4, 2**-20 * np.abs(expected[1][~np.isneginf(expected[1])]).max())
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)
    races = interpret_pallas_call.get_races()
    assert races is not None
    assert not races.races_found


if __name__ == "__main__":
    check(CASES[sys.argv[1]])
    print("ok")
