"""The attention calls every implementation must answer: each pair of features meets in some case."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.kernels.attention import flash_attention
from llm_jax.model.positions import alibi_slopes
from tests.kernels.attention_oracle import attend as oracle

B, N = 2, 12  # not a power of two, for the rule of ALiBi's slopes


class Case(NamedTuple):
    mask: str
    group: int  # query heads per kv head
    lengths: str
    head_dim: int
    alibi: bool
    soft_cap: bool
    segments: bool
    slots: bool  # explicit positions, in no order, as in the slots of a cache


LEVELS = (
    ("full", "causal", "window"),
    (1, 4, N),
    ("equal", "cache", "fewer"),
    (64, 80, 128, 256),
    *[(False, True)] * 4,
)
# Every pair of levels meets in some case (checked in test_attention.py), in 15 instead of 1728.
CASES = [
    Case("full", 4, "equal", 256, True, False, False, False),
    Case("causal", N, "cache", 128, False, True, True, False),
    Case("window", 1, "equal", 64, True, True, True, True),
    Case("window", 4, "fewer", 80, False, False, False, True),
    Case("full", N, "cache", 80, True, False, True, True),
    Case("full", 4, "fewer", 64, False, True, True, False),
    Case("causal", 1, "fewer", 256, False, False, False, True),
    Case("window", N, "cache", 256, True, True, False, True),
    Case("window", 1, "equal", 128, True, False, False, False),
    Case("causal", N, "equal", 80, False, True, False, False),
    Case("causal", 4, "cache", 64, False, False, False, True),
    Case("full", 4, "fewer", 128, True, False, True, True),
    Case("full", 1, "cache", 256, True, False, True, True),
    Case("causal", N, "fewer", 64, True, False, False, True),
    Case("causal", 1, "fewer", 80, False, False, True, False),
]


class Sizes(NamedTuple):
    """Lengths (T, S) that no tile divides, and a window smaller than a tile."""

    equal: tuple[int, int]
    cache: tuple[int, int]
    fewer: tuple[int, int]
    window: int


SHORT = Sizes((37, 37), (19, 53), (37, 21), window=5)  # for tiles of 16
LONG = Sizes((300, 300), (150, 420), (300, 170), window=70)  # for tiles of 128


class Inputs(NamedTuple):
    arrays: tuple[Any, ...]  # q, k, v and the gradients of out and lse, float32
    slopes: Any = None
    segments: Any = None  # (queries', keys') int32, as the positions
    positions: Any = None


def rule(case: Case, sizes: Sizes) -> dict[str, Any]:
    return {
        "scale": 1.1 * case.head_dim**-0.5,
        "causal": case.mask != "full",
        "window": sizes.window if case.mask == "window" else 0,
        "soft_cap": 1.5 if case.soft_cap else 0.0,
    }


def documents(length: int) -> np.ndarray:
    """Segments of two rows: documents, among them of one token, and four tokens of padding."""
    starts = [[9, 10, 11], [length // 2, length // 2 + 1]]
    segments = np.stack([np.searchsorted(s, np.arange(length), "right") + 1 for s in starts])
    segments[:, -4:] = 0
    return segments.astype(np.int32)


def make_inputs(case: Case, sizes: Sizes = SHORT) -> Inputs:
    random = np.random.default_rng(CASES.index(case))
    (T, S), K, H = getattr(sizes, case.lengths), N // case.group, case.head_dim
    shapes = ((T, N, H), (S, K, H), (S, K, H), (T, N, H), (T, N))
    slots = [np.stack([random.permutation(2 * S)[:n] for _ in range(B)]) for n in (T, S)]
    if T > 2 * S:
        raise ValueError(f"{T} queries have no distinct slots among {2 * S}")
    return Inputs(
        tuple(random.normal(size=(B, *shape)).astype(np.float32) for shape in shapes),
        alibi_slopes(N) if case.alibi else None,
        (documents(T), documents(S)) if case.segments else None,
        tuple(slots) if case.slots else None,
    )


STATIC = ("implementation", "scale", "causal", "window", "soft_cap")


def results_and_gradients(inputs: Inputs, **options: Any) -> tuple[jax.Array, ...]:
    """out, lse and the gradients of q, k, v."""
    (q, k, v, grad_out, grad_lse), slopes, segments, positions = inputs
    q_segments, kv_segments = segments or (None, None)
    q_positions, kv_positions = positions or (None, None)
    attend = partial(
        flash_attention,
        alibi_slopes_N=slopes,
        q_segments_BT=q_segments,
        kv_segments_BS=kv_segments,
        q_positions_BT=q_positions,
        kv_positions_BS=kv_positions,
        return_lse=True,
        **options,
    )
    results, pull_back = jax.vjp(attend, q, k, v)
    return *results, *pull_back((grad_out, grad_lse))


run = jax.jit(results_and_gradients, static_argnames=STATIC)
# with the fused multiply-adds that the tests' programs are otherwise compiled without (tests/conftest.py)
run_optimised = jax.jit(
    results_and_gradients,
    static_argnames=STATIC,
    compiler_options={"xla_backend_optimization_level": 3},
)


def answer(case: Case, sizes: Sizes, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """The oracle's out, lse, dq, dk, dv, in float64."""
    arrays, *rest = inputs
    return oracle(*arrays, **dict(zip(Inputs._fields[1:], rest, strict=True)), **rule(case, sizes))


def check(case: Case, sizes: Sizes, implementation: str, tolerance: float) -> None:
    """Results and gradients are the oracle's, and rows that see nothing give exact zeros."""
    inputs = make_inputs(case, sizes)
    expected = answer(case, sizes, inputs)
    empty = np.isneginf(expected[1])
    # whatever comes back through the log-sum-exp of a row that sees nothing must not spread
    *others, grad_lse = inputs.arrays
    inputs = inputs._replace(arrays=(*others, np.where(empty, np.nan, grad_lse)))
    # the farthest key ahead wins, with a score in the hundreds: so much coarser is float32 there
    coarse = case.alibi and (case.mask == "full" or bool(case.slots))
    tolerance *= 40 if coarse else 1
    compiled = run_optimised if coarse else run
    found = compiled(inputs, implementation=implementation, **rule(case, sizes))
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)
    assert not np.asarray(found[0])[empty].any()
    assert not np.asarray(found[2])[empty].any()


def check_bfloat16(
    case: Case, sizes: Sizes, implementation: str, lse_error: float = 2**-16
) -> None:
    """Its error is at most twice that of dense bfloat16, which is small; that of the log-sum-exp, which is
    float32 in both, at most `lse_error` of it."""
    inputs = make_inputs(case, sizes)
    *others, grad_lse = inputs.arrays
    rounded = [np.asarray(jax.numpy.asarray(x, jax.numpy.bfloat16)) for x in others]
    inputs = inputs._replace(arrays=(*rounded, grad_lse))
    expected = answer(case, sizes, inputs)
    errors = {}
    for name in ("reference", implementation):
        found = run(inputs, implementation=name, **rule(case, sizes))
        assert [x.dtype.name for x in found] == ["bfloat16", "float32"] + ["bfloat16"] * 3
        errors[name] = [
            np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2) / np.mean(y**2))
            for x, y in zip(found, expected, strict=True)
        ]
    assert max(errors["reference"]) < 2**-7, errors
    (out, _, *gradients), (tiled_out, tiled_lse, *tiled_gradients) = errors.values()
    assert tiled_lse <= lse_error, errors
    for dense, tiled in zip([out, *gradients], [tiled_out, *tiled_gradients], strict=True):
        assert tiled <= 2 * dense, errors
