"""Adapters in the forward pass: nothing at first, the same as the merged weights later, and where they are."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.model import (
    PROJECTIONS,
    Lora,
    adapters_of,
    count_adapters,
    count_params,
    flops_per_token,
    forward,
    init_params,
    logical_axes,
    merge,
    unmerge,
    without_adapters,
)
from tests.tiny import BLOOM, LLAMA, OLMO, drawn_params, random_batch

BATCH = random_batch(seed=5, rows=2, length=16)
jitted_forward = jax.jit(forward, static_argnames="config")


def logits_of(params, config):
    return jitted_forward(params, config, BATCH.tokens_BT, BATCH.positions_BT, BATCH.segments_BT)[0]


# grouped heads and a gate; biases, one kv head, tied; projections that are normed and clipped
@pytest.mark.parametrize("base", [LLAMA, BLOOM, OLMO], ids=["llama", "bloom", "olmo"])
def test_merged_and_unmerged_logits_are_equal_and_unmerging_gives_the_weights_back(base):
    config = dataclasses.replace(base, lora=Lora(rank=4, alpha=20.0, rank_stabilised=base is BLOOM))
    params = drawn_params(config)
    below, bare = without_adapters(params, config)
    assert bare == base
    merged, merged_config = merge(params, config)
    assert merged_config == base
    with_adapters = logits_of(params, config)
    np.testing.assert_allclose(logits_of(merged, base), with_adapters, rtol=1e-5, atol=1e-5)
    assert np.abs(logits_of(below, base) - with_adapters).max() > 1e-2
    back = unmerge(merged, adapters_of(params), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, params)


def test_a_merged_bfloat16_weight_is_rounded_once():
    config = dataclasses.replace(LLAMA, lora=Lora(rank=4), param_dtype="bfloat16")
    params = drawn_params(config)
    layers = params["layers"]["attention"]
    assert layers["query"].dtype == "bfloat16"
    assert layers["query_lora_a"].dtype == layers["query_lora_b"].dtype == np.float32
    merged, _ = merge(params, config)
    a, b = (np.asarray(layers[f"query_lora_{x}"], np.float64) for x in "ab")
    exact = np.asarray(layers["query"], np.float64) + 4 * np.einsum("LDR,LRNH->LDNH", a, b)
    np.testing.assert_allclose(
        np.asarray(merged["layers"]["attention"]["query"], np.float64), exact, rtol=2**-8
    )


def test_adapters_start_so_that_nothing_changes_and_with_the_spread_of_peft():
    config = dataclasses.replace(LLAMA, lora=Lora(rank=8))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))
    below, _ = without_adapters(params, config)
    np.testing.assert_array_equal(logits_of(params, config), logits_of(below, LLAMA))
    for name, sizes in (("query", 32), ("out", 32)):
        a = np.asarray(params["layers"]["attention"][f"{name}_lora_a"])
        assert np.abs(a).max() <= 1 / math.sqrt(sizes)  # kaiming_uniform with a = sqrt 5
        assert a.std() == pytest.approx(1 / math.sqrt(3 * sizes), rel=0.1)
    assert not np.array_equal(a[0], a[1]), "layers start differently"


def test_only_the_projections_named_have_adapters_and_a_missing_gate_has_none():
    config = dataclasses.replace(LLAMA, lora=Lora(rank=2, targets=("value", "down")))
    axes = adapters_of(logical_axes(config))["layers"]
    assert axes == {
        "attention": {
            "value_lora_a": ("layers", "embed", "rank"),
            "value_lora_b": ("layers", "rank", "kv_heads", "head_dim"),
        },
        "mlp": {
            "down_lora_a": ("layers", "mlp", "rank"),
            "down_lora_b": ("layers", "rank", "embed"),
        },
    }
    # by hand: value 32 in, 16 out; down 48 in, 32 out; two layers
    assert count_adapters(config) == 2 * (2 * (32 + 16) + 2 * (48 + 32))
    assert count_params(config) == count_params(LLAMA) + count_adapters(config)
    plain = adapters_of(logical_axes(dataclasses.replace(BLOOM, lora=Lora(rank=2))))
    assert "gate_lora_a" not in plain["layers"]["mlp"]
    assert "up_lora_a" in plain["layers"]["mlp"]
    assert adapters_of(logical_axes(LLAMA)) == {}


def test_frozen_weights_cost_a_third_less_to_train():
    config = dataclasses.replace(LLAMA, lora=Lora(rank=1, targets=("value",)))
    attention = 2 * 2 * 4 * 8 * (16 * 17 / 2) / 16  # layers, q.k and p.v, heads of 8, causal half
    weights = flops_per_token(LLAMA, 16) / 6 - attention
    expected = 4 * weights + 6 * attention + 6 * 2 * (32 + 16)
    assert flops_per_token(config, 16) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "model.lora.rank=-1 must be 0"),
        ({"alpha": 0.0}, "model.lora.alpha=0.0 must be above 0"),
        ({"targets": ("query", "values")}, "'values' is no projection; did you mean 'value'?"),
        ({"targets": ()}, "model.lora.targets=[] must name projections"),
        ({"targets": ("up", "up")}, "must name projections, each once"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        Lora(**settings)
    assert message in str(caught.value)
    assert Lora().targets == PROJECTIONS
