"""The TPU kernels, interpreted on the CPU: numbers, gradients, data races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.attention import flash_attention, pallas_tpu
from tests.kernels.attention_cases import CASES, LONG, check, check_bfloat16


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_outputs_and_gradients_are_those_of_the_oracle(case):
    check(case, LONG, "pallas_tpu", 1e-5)


def test_bfloat16_is_as_exact_as_dense_bfloat16():
    # its weights are summed as they are multiplied, rounded: each is off by 2^-9 at most
    check_bfloat16(CASES[8], LONG, "pallas_tpu", lse_error=2**-11)


@pytest.mark.parametrize("group", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_copy_races_with_another(group, monkeypatch):
    races = pltpu.InterpretParams(detect_races=True)
    monkeypatch.setattr(pallas_tpu, "INTERPRET", races)
    random = np.random.default_rng(0)
    T = 512
    q, k, v = (
        jnp.asarray(random.normal(size=(1, T, n, 64)), jnp.float32)
        for n in (2, 2 // group, 2 // group)
    )
    segments = jnp.repeat(jnp.arange(1, 5), T // 4)[None]  # runs of one tile: the same one twice

    def loss(q, k, v, implementation):
        out = flash_attention(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, implementation=implementation
        )
        return jnp.square(out).sum()

    found = jax.grad(loss, (0, 1, 2))(q, k, v, "pallas_tpu")
    for x, y in zip(found, jax.grad(loss, (0, 1, 2))(q, k, v, "reference"), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    found_races = interpret_pallas_call.races
    assert found_races is not None
    assert not found_races.races_found
