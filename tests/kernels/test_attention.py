"""Attention against its definition: numbers, gradients, memory, sharding, refused arguments."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import Request, Rule, choose, flash_attention, xla_chunked
from llm_jax.kernels.attention.plan import Tiles
from llm_jax.kernels.device import Device
from tests.kernels.attention_cases import (
    CASES,
    LEVELS,
    SHORT,
    Inputs,
    answer,
    check,
    check_bfloat16,
    make_inputs,
    run,
)
from tests.virtual_devices import with_devices

IMPLEMENTATIONS = ["reference", "xla_chunked"]
N, H = 6, 8


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 x 16, so that short rows have several and a ragged last one."""
    monkeypatch.setattr(xla_chunked, "CPU_TILES", Tiles(16, 16))


def test_the_cases_join_every_pair_of_features():
    for i, j in itertools.combinations(range(len(LEVELS)), 2):
        met = {(case[i], case[j]) for case in CASES}
        assert met == set(itertools.product(LEVELS[i], LEVELS[j]))


def test_the_oracle_agrees_with_finite_differences():
    case = CASES[2]
    inputs = make_inputs(case)
    *qkv, grad_out, grad_lse = (x.astype(np.float64) for x in inputs.arrays)
    _, lse, *grads = answer(case, SHORT, inputs)
    empty = np.isneginf(lse)
    assert empty.any(), "the case must hold queries that see nothing"
    assert not empty.all()

    def loss(*qkv: np.ndarray) -> float:
        out, lse, *_ = answer(case, SHORT, inputs._replace(arrays=(*qkv, grad_out, grad_lse)))
        return (out * grad_out).sum() + (np.where(empty, 0, lse) * grad_lse).sum()

    random = np.random.default_rng(0)
    for which, grad in enumerate(grads):
        step = 1e-5 * random.normal(size=grad.shape)
        ahead, behind = (
            loss(*(x + sign * step if i == which else x for i, x in enumerate(qkv)))
            for sign in (1, -1)
        )
        np.testing.assert_allclose((ahead - behind) / 2, (grad * step).sum(), rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_outputs_and_gradients_are_those_of_the_oracle(case, implementation):
    check(case, SHORT, implementation, 1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_bfloat16_tiles_are_as_exact_as_dense_bfloat16():
    check_bfloat16(CASES[8], SHORT, "xla_chunked")


def test_plain_attention_is_that_of_jax_nn():
    q, k, v = make_inputs(CASES[9]).arrays[:3]
    for causal, scale in ((True, 0.3), (False, None)):
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        found = flash_attention(q, k, v, scale=scale, causal=causal, implementation="reference")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_the_same_documents_alone(implementation):
    lengths, T = (20, 1, 20, 1, 7), 53
    random = np.random.default_rng(0)
    ends = np.cumsum(lengths)
    segments = np.zeros((1, T), np.int32)
    for number, (start, end) in enumerate(zip(ends - lengths, ends, strict=True), start=1):
        segments[:, start:end] = number
    q, grad_out = (random.normal(size=(1, T, N, H)).astype(np.float32) for _ in range(2))
    k, v = (random.normal(size=(1, T, 2, H)).astype(np.float32) for _ in range(2))
    slopes, grad_lse = np.linspace(0.1, 1, N, dtype=np.float32), np.zeros((1, T, N), np.float32)
    rule = {"scale": None, "causal": True, "window": 12, "soft_cap": 0.0}
    packed = run(
        Inputs((q, k, v, grad_out, grad_lse), slopes, (segments, segments)),
        implementation=implementation,
        **rule,
    )
    for start, end in zip(ends - lengths, ends, strict=True):
        arrays = tuple(x[:, start:end] for x in (q, k, v, grad_out, grad_lse))
        alone = run(Inputs(arrays, slopes), implementation="reference", **rule)
        for x, y in zip(packed, alone, strict=True):
            np.testing.assert_allclose(x[:, start:end], y, rtol=1e-5, atol=1e-5)
    for x in packed[2:]:
        assert not np.asarray(x)[:, ends[-1] :].any(), "padding takes no part"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slopes_get_no_gradient(implementation):
    q, k, v = make_inputs(CASES[9]).arrays[:3]

    def loss(slopes):
        return flash_attention(q, k, v, alibi_slopes_N=slopes, implementation=implementation).sum()

    assert not jax.jit(jax.grad(loss))(jnp.full(q.shape[2], 0.5)).any()


def request(**changes: Any) -> Request:
    """A plain causal call in bfloat16."""
    sizes = {"B": 1, "T": 4096, "S": 4096, "N": 8, "K": 2, "H": 128}
    features = {"alibi": False, "segments": False, "positions": False, "lse": False}
    rule = Rule(scale=1.0, causal=True, window=0, soft_cap=0.0)
    return Request(**{**sizes, **features, "dtype": "bfloat16", "rule": rule, **changes})


def temporary_bytes(function: Callable, *arguments: jax.ShapeDtypeStruct) -> int:
    """What XLA sets aside beside inputs and outputs."""
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def gradient_memory(T: int, implementation: str) -> int:

    def loss(q, k, v):
        return flash_attention(q, k, v, implementation=implementation).sum()

    q, k = (jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (2, 1))
    return temporary_bytes(jax.grad(loss, (0, 1, 2)), q, k, k)


def test_memory_of_tiles_grows_linearly_with_length():
    small, middle, large = (gradient_memory(T, "xla_chunked") for T in (1024, 2048, 4096))
    assert middle < 2.2 * small
    assert large < 2.2 * middle
    assert gradient_memory(4096, "reference") > 10 * large


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_multi_query_attention_never_repeats_keys(implementation):
    N, S, H = 16, 4096, 64
    q, k = (jax.ShapeDtypeStruct((1, n, h, H), jnp.float32) for n, h in ((1, N), (S, 1)))
    attend = partial(flash_attention, implementation=implementation)
    repeated = N * S * H * 4
    assert temporary_bytes(attend, q, k, k) < repeated / 4


def test_saving_the_named_results_spares_a_second_forward():
    names = ("attention_out", "attention_lse")
    q = jnp.ones((1, 8, 1, 4))
    attend = partial(flash_attention, implementation="xla_chunked")

    def loops(policy) -> int:
        remat = jax.checkpoint(lambda q: attend(q, q, q).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(remat))(q)).count(" while[")

    policies = jax.checkpoint_policies
    assert loops(policies.nothing_saveable) == 3  # forward, forward again, backward
    assert loops(policies.save_only_these_names(*names)) == 2


@pytest.mark.multidevice
def test_sharded_over_batch_and_heads_it_needs_no_gathering():
    script = Path(__file__).with_name("attend_on_a_mesh.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=with_devices(4),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "xla_chunked ok\nreference ok\n"


def test_the_choice_follows_the_number_of_queries():
    cpu = Device("cpu", "cpu")
    names = [choose(request(T=T), cpu).name for T in (1, 8, 9)]
    assert names == ["reference"] * 2 + ["xla_chunked"]
    assert choose(request(T=1), cpu).reason == "at most 8 queries: dense scores are small"
    assert "no fused kernel for cpu" in choose(request(T=4096), cpu).reason


@pytest.mark.parametrize(
    ("T", "implementation", "loops"),
    [(1, "auto", False), (64, "auto", True), (1, "xla_chunked", True), (64, "reference", False)],
)
def test_a_named_implementation_is_never_replaced(T, implementation, loops):
    q = jnp.ones((1, T, 1, 4))
    attend = partial(flash_attention, implementation=implementation)
    assert ("while[" in str(jax.make_jaxpr(attend)(q, q, q))) == loops


def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


whole = partial(array, dtype=jnp.int32)
Q, KV = array(2, 7, 6, 8), array(2, 9, 3, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BTNH": array(2, 7, 6)}, r"q_BTNH has shape \(2, 7, 6\); it must have 4 axes"),
        ({"q_BTNH": array(2, 0, 6, 8)}, r"q_BTNH has shape .*none empty"),
        ({"k_BSKH": array(3, 9, 3, 8)}, r"k_BSKH has shape .* must be \(2, 9, 3, 8\)"),
        ({"k_BSKH": array(2, 9, 3, 4)}, r"k_BSKH has shape .* must be \(2, 9, 3, 8\)"),
        ({"v_BSKH": array(2, 8, 3, 8)}, r"v_BSKH has shape .* must be \(2, 9, 3, 8\)"),
        ({"q_BTNH": array(2, 7, 4, 8)}, "N=4 heads and k_BSKH K=3; N must be a multiple"),
        ({"v_BSKH": array(2, 9, 3, 8, dtype=jnp.bfloat16)}, "float32, float32, bfloat16; .* cast"),
        ({n: whole(2, 9, 3, 8) for n in ("q_BTNH", "k_BSKH", "v_BSKH")}, "one floating type"),
        ({"scale": 0.0}, r"scale=0\.0 must be finite and above 0"),
        ({"scale": float("nan")}, "scale=nan must be finite"),
        ({"soft_cap": -1.0}, r"soft_cap=-1\.0 must be finite and 0"),
        ({"window": -1}, "window=-1 must be 0"),
        ({"window": 4, "causal": False}, "window=4 needs causal=True"),
        ({"alibi_slopes_N": array(3)}, r"alibi_slopes_N has shape \(3,\); it must be \(6,\)"),
        ({"q_segments_BT": whole(2, 7)}, "q_segments_BT is given without kv_segments_BS"),
        ({"kv_positions_BS": whole(2, 9)}, "kv_positions_BS is given without q_positions_BT"),
        (
            {"q_segments_BT": whole(2, 7), "kv_segments_BS": whole(2, 7)},
            r"kv_segments_BS has shape \(2, 7\); it must be \(2, 9\)",
        ),
        (
            {"q_positions_BT": array(2, 7), "kv_positions_BS": whole(2, 9)},
            "q_positions_BT has dtype float32; it must hold whole numbers",
        ),
        ({"implementation": "xla_chunkd"}, "'xla_chunkd' is unknown; did you mean 'xla_chunked'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_told_in_one_line(changes, message):
    arguments = {"q_BTNH": Q, "k_BSKH": KV, "v_BSKH": KV, **changes}
    with pytest.raises(ConfigError, match=message) as caught:
        flash_attention(**arguments)
    assert "\n" not in str(caught.value)
