"""The decoder against independent maths, and the properties every model must have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import from_dict, to_dict
from llm_jax.errors import ConfigError
from llm_jax.model import (
    Alibi,
    Local,
    ModelConfig,
    RopeScaling,
    abstract_params,
    count_params,
    flops_per_token,
    forward,
    init_cache,
    init_params,
    logical_axes,
    target_loss,
)
from llm_jax.model.layers import Norm
from llm_jax.model.positions import (
    alibi_slopes,
    config_slopes,
    document_frequencies,
    document_lengths,
    rope_amplitude,
    rope_frequencies,
)
from tests.model import numpy_decoder
from tests.tiny import BLOOM, FAMILIES, GEMMA, GPT2, LLAMA, SWITCHED, random_batch, some

jitted_forward = jax.jit(forward, static_argnames="config")


def noisy_params(config, seed=0):
    """Random biases and scales too: at their initial 0 and 1 a forgotten one would not show."""
    params = init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize("family", some(FAMILIES, "llama"))
def test_packed_rows_give_each_document_the_logits_of_independent_maths(family):
    config = FAMILIES[family]
    params = noisy_params(config)
    batch = random_batch(seed=3, rows=2, length=24)
    logits_BTV, _ = jitted_forward(
        params, config, batch.tokens_BT, batch.positions_BT, batch.segments_BT
    )
    for row in range(2):
        for segment in range(1, batch.segments_BT[row].max() + 1):
            at = np.flatnonzero(batch.segments_BT[row] == segment)
            expected = numpy_decoder.logits(params, config, batch.tokens_BT[row, at].tolist())
            np.testing.assert_allclose(logits_BTV[row, at], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", some(FAMILIES, "llama", "bloom"))
def test_cached_decoding_equals_the_full_forward(family):
    cached_decoding_equals_the_full_forward(FAMILIES[family])


def cached_decoding_equals_the_full_forward(config):
    params = noisy_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 12), dtype=np.int32)
    positions_BT = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    ones_BT = np.ones_like(tokens_BT)
    full_BTV, _ = jitted_forward(params, config, tokens_BT, positions_BT, ones_BT)
    cache, pieces = init_cache(config, 2, 16), []
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, 12)]:
        part = np.s_[:, start:stop]
        out, cache = jitted_forward(
            params, config, tokens_BT[part], positions_BT[part], ones_BT[part], cache
        )
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full_BTV, rtol=1e-5, atol=1e-5)


def test_remat_and_scan_change_neither_loss_nor_gradients():
    batch = random_batch(seed=1, rows=2, length=16)

    def loss(params, config):
        logits, _ = forward(params, config, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 5] * batch.loss_mask_BT)

    params = noisy_params(LLAMA)
    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, LLAMA)
    for remat in ("dots", "full"):
        config = dataclasses.replace(LLAMA, remat=remat)
        other = jax.jit(jax.grad(loss), static_argnums=1)(params, config)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other
        )


def test_bfloat16_computes_in_bfloat16_over_float32_parameters():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = random_batch(seed=1, rows=1, length=8)
    args = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    rough, _ = jitted_forward(params, config, *args)
    exact, _ = jitted_forward(params, LLAMA, *args)
    assert rough.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(rough - exact))) < 0.05


@pytest.mark.slow  # the quick one is the greedy decoding of test_family_goldens
@pytest.mark.parametrize("family", SWITCHED)
def test_cached_decoding_with_every_switch_equals_the_full_forward(family):
    cached_decoding_equals_the_full_forward(SWITCHED[family])


def training_gradients(config):
    batch = random_batch(seed=5, rows=2, length=16)

    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract_params(config)
    )

    @jax.jit
    def gradients(params):
        return jax.value_and_grad(lambda params: target_loss(params, config, *batch)[0])(params)

    return gradients(params)


@pytest.mark.parametrize("family", SWITCHED)
def test_a_training_step_of_every_switch_has_gradients_for_all_parameters(family):
    value, gradients = training_gradients(
        dataclasses.replace(SWITCHED[family], attention="reference")
    )
    assert np.isfinite(value)
    jax.tree.map(lambda g: pytest.fail("no gradient") if not np.any(g) else None, gradients)


@pytest.mark.slow
def test_remat_keeps_the_gradients_of_a_model_with_layers_of_two_kinds():
    config = dataclasses.replace(GEMMA, attention="reference")
    _, plain = training_gradients(config)
    _, other = training_gradients(dataclasses.replace(config, remat="dots"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, other)


@pytest.mark.parametrize("family", some(SWITCHED, "gemma", "cohere"))
def test_a_fresh_model_of_every_switch_starts_near_a_uniform_guess(family):
    config = dataclasses.replace(SWITCHED[family], attention="reference")
    batch = random_batch(seed=6, rows=4, length=32)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))
    _, sums = jax.jit(target_loss, static_argnums=1)(params, config, *batch)
    assert float(sums.nats / sums.targets) == pytest.approx(math.log(64), abs=0.6)


def test_every_parameter_has_one_logical_axis_per_dimension():
    for config in (*FAMILIES.values(), *SWITCHED.values()):
        axes, shapes = logical_axes(config), abstract_params(config)
        jax.tree.map(
            lambda leaf, names: pytest.fail(str(names)) if len(names) != leaf.ndim else None,
            shapes,
            axes,
        )
        assert axes["layers"]["attention"]["query"] == ("layers", "embed", "heads", "head_dim")


def test_parameter_count_is_the_sum_written_out_by_hand():
    attention = 32 * 4 * 8 + 2 * 32 * 2 * 8 + 4 * 8 * 32
    layer = attention + 3 * 32 * 48 + 2 * 32
    assert count_params(LLAMA) == 64 * 32 + 2 * layer + 32 + 32 * 64
    assert count_params(GPT2) == count_params(LLAMA) + 64 * 32 + 2 * (48 + 48 + 32)


def test_flops_count_the_causal_half_of_attention_once():
    projections, mlp, head = 2 * 32 * 8 * (4 + 2 + 2 + 4), 2 * 3 * 32 * 48, 2 * 32 * 64
    scores_and_values = 2 * 2 * 4 * 8 * (1 + 2 + 3 + 4) / 4  # T = 4: 1, 2, 3 and 4 keys
    assert flops_per_token(LLAMA, 4) == 3 * (2 * (projections + mlp + scores_and_values) + head)


def test_flops_of_local_layers_count_the_keys_in_the_window():
    windowed = dataclasses.replace(LLAMA, local=Local(window=2, first=1))  # the second of two
    saved = 2 * 2 * 4 * 8 * ((1 + 2 + 3 + 4) - (1 + 2 + 2 + 2)) / 4
    assert flops_per_token(windowed, 4) == flops_per_token(LLAMA, 4) - 3 * saved
    assert flops_per_token(dataclasses.replace(LLAMA, local=Local(window=9)), 4) == flops_per_token(LLAMA, 4)  # fmt: skip


def test_local_layers_are_those_past_the_first_that_no_full_one_interrupts():
    def layers(**local):
        return dataclasses.replace(LLAMA, num_layers=6, local=Local(**local)).local_layers

    assert layers(first=2) == (False,) * 6, "no window, no local layer"
    assert layers(window=3) == (True,) * 6
    assert layers(window=3, full_every=3) == (True, True, False) * 2
    assert layers(window=3, first=3, full_every=2) == (False, False, False, False, True, False)


def test_document_lengths_are_those_of_each_document_so_far():
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0], [4, 5, 6, 7, 8, 9, 10]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7])
    lengths = document_lengths(positions, segments)
    assert lengths[0, :5].tolist() == [3, 3, 3, 2, 2]
    assert lengths[1].tolist() == [11] * 7


def test_dynamic_scaling_raises_theta_beyond_the_length_it_was_trained_on():
    # transformers' rule by hand, for 8 dimensions: theta (4 * 64 / 32 - 3)^(8 / 6) at twice the length
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_max_seq_len=32)
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    short, long = document_frequencies(config, jnp.array([[20, 64]]))[0]
    np.testing.assert_allclose(short, rope_frequencies(LLAMA), rtol=1e-6)
    theta = 1e4 * (4 * 64 / 32 - 3) ** (8 / 6)
    np.testing.assert_allclose(long, theta ** (-np.arange(0, 8, 2) / 8), rtol=1e-5)


def test_longrope_divides_by_other_factors_in_longer_documents():
    scaling = RopeScaling(
        kind="longrope", factor=4.0, original_max_seq_len=16,
        short_factors=(1.0, 1.0, 1.0, 2.0), long_factors=(1.0, 2.0, 4.0, 8.0),
    )  # fmt: skip
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    short, long = document_frequencies(config, jnp.array([[16, 17]]))[0]
    np.testing.assert_allclose(short, rope_frequencies(LLAMA) / np.array([1, 1, 1, 2]), rtol=1e-6)
    np.testing.assert_allclose(long, rope_frequencies(LLAMA) / np.array([1, 2, 4, 8]), rtol=1e-6)
    assert rope_amplitude(config) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"local": {"window": -1}}, "model.local.window=-1 must not be negative"),
        ({"attention_soft_cap": -1.0}, "model.attention_soft_cap=-1.0 must be 0"),
        ({"logit_multiplier": 0.0}, "model.logit_multiplier=0.0 must be above 0"),
        ({"alibi": {"max": 0.0}}, "model.alibi.max=0.0 must be above 0"),
        (
            {"norm_placement": "both", "residual": "parallel_one_norm"},
            "model.norm_placement='both' needs model.residual='sequential'",
        ),
        (
            {"position": "none", "local": {"window": 4, "rope_theta": 1e4}},
            "model.local.rope_theta=10000.0 needs model.position='rope'",
        ),
        (
            {"rope_scaling": {"kind": "longrope", "factor": 4.0, "original_max_seq_len": 8}},
            "short_factors has 0 numbers; longrope needs one for each of the 4",
        ),
    ],
)  # fmt: skip
def test_switches_that_do_not_fit_together_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        from_dict(ModelConfig, to_dict(LLAMA) | changes)


def test_alibi_slopes_follow_the_paper_for_powers_of_two_and_bloom_for_the_rest():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(1) == pytest.approx([2**-8])
    np.testing.assert_allclose(alibi_slopes(4, Alibi(max=16)), [2**-4, 2**-8, 2**-12, 2**-16])
    falcon = dataclasses.replace(LLAMA, position="alibi", alibi=Alibi(scaled=True))
    np.testing.assert_allclose(config_slopes(falcon), alibi_slopes(4) / math.sqrt(8))


def test_rope_scaling_stretches_long_waves_and_keeps_short_ones():
    plain = rope_frequencies(dataclasses.replace(LLAMA, head_dim=64, rope_theta=500_000.0))

    def scaled(**scaling):
        scaling = RopeScaling(**scaling)
        return rope_frequencies(
            dataclasses.replace(LLAMA, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
        )

    np.testing.assert_allclose(scaled(kind="linear", factor=4.0), plain / 4)
    for kind in ("llama3", "yarn"):
        other = scaled(kind=kind, factor=8.0, original_max_seq_len=8192)
        wavelength = 2 * math.pi / plain
        np.testing.assert_allclose(
            other[wavelength < 8192 / 40], plain[wavelength < 8192 / 40], rtol=1e-6
        )
        np.testing.assert_allclose(
            other[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6
        )
        assert np.all(np.diff(other) < 0)


def test_llama3_scaling_gives_the_published_blend_in_the_middle():
    # theta chosen so that the second pair has wavelength 4096: two turns in 8192 positions, so by
    # Llama 3.1's rule it keeps (2 - 1) / (4 - 1) = 1/3 of itself
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192)
    theta = (4096 / (2 * math.pi)) ** 2
    config = dataclasses.replace(LLAMA, head_dim=4, rope_theta=theta, rope_scaling=scaling)
    expected = 2 * math.pi / 4096 * (1 / 3 + 2 / 3 / 8)
    np.testing.assert_allclose(rope_frequencies(config)[1], expected, rtol=1e-6)


def test_yarn_blends_linearly_between_its_two_dimensions_and_warms_attention():
    # by hand, for 64 rotated dimensions, theta 5e5, 8192 positions: 32 turns fall on dimension
    # 64 ln(8192 / (32 * 2 pi)) / (2 ln 5e5) = 9.04 -> 9, one turn on 17.49 -> 18; pair 12 is a third of the way
    scaling = RopeScaling(kind="yarn", factor=8.0, original_max_seq_len=8192)
    config = dataclasses.replace(LLAMA, head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    plain = 5e5 ** (-2 * 12 / 64)
    np.testing.assert_allclose(rope_frequencies(config)[12], plain * (2 / 3 + 1 / 3 / 8), rtol=1e-6)
    assert rope_amplitude(config) == pytest.approx(1 + 0.1 * math.log(8))
    assert rope_amplitude(LLAMA) == 1


def test_in_bfloat16_gradients_that_are_sums_over_tokens_keep_counting_past_256():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    ones_BTD = jnp.ones((4, 1024, 32), jnp.bfloat16)
    norm = Norm(config)
    variables = norm.init(jax.random.key(0), ones_BTD)

    def total(variables):
        return jnp.sum(jnp.asarray(norm.apply(variables, ones_BTD), jnp.float32))

    gradient = jax.grad(total)(variables)
    np.testing.assert_allclose(gradient["params"]["scale"].unbox(), 4 * 1024, rtol=1e-3)


@pytest.mark.slow
def test_in_bfloat16_a_frequent_token_keeps_its_gradient():
    batch = random_batch(seed=9, rows=8, length=64)
    batch.tokens_BT[:, ::2] = 7

    def gradient(config):
        def loss(params):
            return target_loss(params, config, *batch)[0]

        params = init_params(LLAMA, jax.random.key(0))
        return np.asarray(jax.jit(jax.grad(loss))(params)["embedding"][7])

    exact, rough = gradient(LLAMA), gradient(dataclasses.replace(LLAMA, dtype="bfloat16"))
    assert np.linalg.norm(rough - exact) < 0.02 * np.linalg.norm(exact)


def test_wrong_shapes_are_told_before_any_maths():
    params = init_params(LLAMA, jax.random.key(0))
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(
        ConfigError, match=r"positions_BT has shape \(1, 3\); it must match tokens_BT"
    ):
        forward(params, LLAMA, tokens, tokens[:, :3], tokens)
    long = np.zeros((1, 65), np.int32)
    with pytest.raises(
        ConfigError, match=r"model.max_seq_len=64 is all that learned positions know"
    ):
        forward(params, GPT2, long, long, long)


def test_deep_models_compile_about_as_fast_as_shallow_ones():
    """The traced program of 48 layers is as long as that of 4; tools/bench_compile.py has the seconds."""

    def program(layers):
        config = dataclasses.replace(BLOOM, num_layers=layers)
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return (
            jax.jit(lambda p, t: forward(p, config, t, t, t))
            .lower(abstract_params(config), ids)
            .as_text()
        )

    shallow, deep = program(4), program(48)
    assert deep.count("\n") == shallow.count("\n")
