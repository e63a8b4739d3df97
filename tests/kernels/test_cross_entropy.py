"""The fused head and loss against numpy in float64, and that it never holds the logits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.kernels.cross_entropy import cross_entropy, reference, token_nats, xla_tiled
from tests.shapes import largest_array
from tests.virtual_devices import with_devices

B, T, D, V = 3, 17, 12, 53  # 51 tokens are no multiple of a tile, 53 columns none of a slab


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Four tiles of 16 rows, of which the last is ragged; slabs of 10 columns."""
    monkeypatch.setattr(xla_tiled, "TILE_BYTES", 4 * 16 * V)
    monkeypatch.setattr(xla_tiled, "SLAB_BYTES", 4 * D * 10)


def inputs(seed, shape=(B, T, D, V)) -> Any:
    """x, head, targets and fractional weights, a third of them 0; logits of some ten."""
    random, (B, T, D, V) = np.random.default_rng(seed), shape
    x = random.normal(size=(B, T, D)).astype(np.float32)
    head = random.normal(size=(D, V)).astype(np.float32)
    targets = random.integers(0, V, (B, T)).astype(np.int32)
    weights = random.uniform(size=(B, T)) * (random.uniform(size=(B, T)) > 1 / 3)
    return x, head, targets, weights.astype(np.float32)


def exact(x, head, targets, pull, soft_cap=0.0):
    """float64: nats, log Z, dx, dhead; `pull(log_z)` are the gradients by nats and by log Z."""
    x, head = np.asarray(x, np.float64), np.asarray(head, np.float64)
    logits, slope = x @ head, 1.0
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
        slope = 1 - (logits / soft_cap) ** 2
    peak = logits.max(axis=-1, keepdims=True)
    log_z = (peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True)))[..., 0]
    one_hot = np.eye(head.shape[1])[targets]
    by_nats, by_log_z = (np.asarray(g, np.float64)[..., None] for g in pull(log_z))
    share = np.exp(logits - log_z[..., None])
    grad = (by_nats * (share - one_hot) + by_log_z * share) * slope
    nats = log_z - (logits * one_hot).sum(axis=-1)
    return nats, log_z, grad @ head.T, np.einsum("btd,btv->dv", x, grad)


def exact_loss(x, head, targets, weights, z_loss=0.0, soft_cap=0.0):
    """float64: the objective, dx, dhead, and (nats, z-penalty, targets)."""
    weights = np.asarray(weights, np.float64)
    pull = lambda log_z: (weights, 2 * z_loss * weights * log_z)  # noqa: E731
    nats, log_z, dx, dhead = exact(x, head, targets, pull, soft_cap)
    sums = ((weights * nats).sum(), (weights * log_z**2).sum(), weights.sum())
    return sums[0] + z_loss * sums[1], dx, dhead, sums


def loss_and_gradients(*given, **options):
    def loss(x, head, targets, weights):
        return cross_entropy(x, head, targets, weights, **options)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_loss_and_gradients_are_those_of_float64(z_loss, soft_cap):
    given = inputs(seed=int(10 * z_loss + soft_cap))
    (value, sums), (dx, dhead) = loss_and_gradients(*given, z_loss=z_loss, soft_cap=soft_cap)
    wanted, wanted_dx, wanted_dhead, wanted_sums = exact_loss(
        *given, z_loss=z_loss, soft_cap=soft_cap
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(sums, wanted_sums, rtol=1e-5)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dhead, wanted_dhead, rtol=1e-4, atol=1e-5)
    alone, _ = cross_entropy(*given, z_loss=z_loss, soft_cap=soft_cap)
    np.testing.assert_allclose(alone, value, rtol=1e-6, err_msg="the value without gradients")


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_a_bias_of_the_head_is_an_input_that_is_always_one(soft_cap):
    x, head, targets, weights = inputs(seed=11)
    bias = np.random.default_rng(12).normal(size=V).astype(np.float32)
    pulls = tuple(np.random.default_rng(13).normal(size=(2, B, T)).astype(np.float32))
    as_input = np.concatenate([x, np.ones((B, T, 1))], axis=2), np.concatenate([head, bias[None]])

    def loss(x, head, bias):
        return cross_entropy(x, head, targets, weights, bias_V=bias, z_loss=0.3, soft_cap=soft_cap)[
            0
        ]

    def pulled(x, head, bias):
        nats, log_z = token_nats(x, head, targets, bias_V=bias, soft_cap=soft_cap)
        return (nats * pulls[0] + log_z * pulls[1]).sum()

    _, dx, dhead, _ = exact_loss(*as_input, targets, weights, z_loss=0.3, soft_cap=soft_cap)
    _, _, pulled_dx, pulled_dhead = exact(*as_input, targets, lambda _: pulls, soft_cap)
    for function, by_x, by_head in ((loss, dx, dhead), (pulled, pulled_dx, pulled_dhead)):
        got = jax.jit(jax.grad(function, (0, 1, 2)))(x, head, bias)
        wanted = (by_x[..., :D], by_head[:D], by_head[D])
        for gradient, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)
    nats, _ = token_nats(x, head, targets, bias_V=bias, soft_cap=soft_cap)
    defined, _ = reference.token_nats(x, head, targets, soft_cap, jnp.asarray(bias))
    np.testing.assert_allclose(nats, defined, rtol=1e-4, atol=1e-5)


def test_a_factor_on_the_loss_scales_its_gradients_and_the_parts_have_none():
    given = inputs(seed=1)

    def loss(x, head):
        value, sums = cross_entropy(x, head, *given[2:], z_loss=0.1)
        return -2.5 * value + sums.nats * 7 + sums.z_penalty

    dx, dhead = jax.jit(jax.grad(loss, (0, 1)))(*given[:2])
    _, wanted_dx, wanted_dhead, _ = exact_loss(*given, z_loss=0.1)
    np.testing.assert_allclose(dx, -2.5 * wanted_dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dhead, -2.5 * wanted_dhead, rtol=1e-4, atol=1e-5)


def test_without_a_counted_target_loss_and_gradients_are_zero():
    x, head, targets, weights = inputs(seed=2)
    (value, sums), gradients = loss_and_gradients(x, head, targets, 0 * weights, z_loss=0.1)
    assert [float(value), *map(float, sums)] == [0.0] * 4
    assert not any(np.any(g) for g in gradients)


def test_an_id_outside_the_vocabulary_is_ignored_where_its_weight_is_0_and_infinite_elsewhere():
    x, head, targets, weights = inputs(seed=3)
    odd = np.where(weights > 0, targets, np.where(targets % 2, -100, V))
    (value, _), gradients = loss_and_gradients(x, head, odd, weights)
    wanted, *wanted_gradients, _ = exact_loss(x, head, targets, weights)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    odd[0, 0], weights[0, 0] = V, 1
    assert np.isinf(cross_entropy(x, head, odd, weights)[0])


def test_logits_that_would_overflow_exp_do_not():
    x, head, targets, weights = inputs(seed=4)
    (value, _), (dx, dhead) = loss_and_gradients(100 * x, head, targets, weights)
    wanted, wanted_dx, wanted_dhead, _ = exact_loss(100 * x, head, targets, weights)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dhead, wanted_dhead, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_nats_and_log_z_of_every_token_pass_back_any_gradient(soft_cap):
    x, head, targets, _ = inputs(seed=5)
    random = np.random.default_rng(6)
    pulls = tuple(random.normal(size=(B, T)).astype(np.float32) for _ in range(2))

    def weighed(x, head):
        nats, log_z = token_nats(x, head, targets, soft_cap=soft_cap)
        return (nats * pulls[0] + log_z * pulls[1]).sum(), (nats, log_z)

    gradient = jax.jit(jax.value_and_grad(weighed, (0, 1), has_aux=True))
    (_, (nats, log_z)), (dx, dhead) = gradient(x, head)
    wanted = exact(x, head, targets, lambda _: pulls, soft_cap)
    for got, want in zip((nats, log_z, dx, dhead), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("head_dtype", ["bfloat16", "float32"])
def test_bfloat16_is_within_twice_the_error_of_a_plain_bfloat16_version(head_dtype):
    shape = (2, 65, 48, V)
    x, head, targets, weights = inputs(seed=7, shape=shape)
    x = jnp.asarray(x, jnp.bfloat16)
    head = jnp.asarray(head / 3, jnp.bfloat16).astype(head_dtype)

    def plain(x, head, targets, weights):
        logits = (x @ head.astype(x.dtype)).astype(jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return ((log_z - picked + 0.1 * log_z**2) * weights).sum()

    value, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, head, targets, weights)
    (ours, _), our_gradients = loss_and_gradients(x, head, targets, weights, z_loss=0.1)
    assert [g.dtype for g in our_gradients] == [jnp.bfloat16, head_dtype]
    wanted, *wanted_gradients, _ = exact_loss(x, head, targets, weights, z_loss=0.1)
    assert abs(ours - wanted) <= 2 * abs(value - wanted) + 1e-5 * wanted
    for got, rough, want in zip(our_gradients, gradients, wanted_gradients, strict=True):
        error, allowed = (np.linalg.norm(np.asarray(g, np.float64) - want) for g in (got, rough))
        assert error <= 2 * allowed


def test_gradients_come_at_three_matrix_products_and_the_value_alone_at_one(monkeypatch):
    monkeypatch.setattr(xla_tiled, "SLAB_BYTES", 4 * D * V)
    x, head, *rest = inputs(seed=8)

    def products(function):
        return str(jax.make_jaxpr(function)(x, head)).count("dot_general")

    loss = lambda x, head: cross_entropy(x, head, *rest)[0]  # noqa: E731
    nats = lambda x, head: token_nats(x, head, rest[0])[0].sum()  # noqa: E731
    assert products(loss) == products(nats) == 1
    assert products(jax.grad(loss, (0, 1))) == 3
    assert products(jax.grad(nats, (0, 1))) == 4


def test_neither_form_holds_the_logits_of_all_tokens():
    x, head, *rest = inputs(seed=9, shape=(4, 64, 8, V))  # 256 tokens, 16 tiles
    loss = lambda x, head: cross_entropy(x, head, *rest, soft_cap=9.0)[0]  # noqa: E731
    nats = lambda x, head: token_nats(x, head, rest[0])[0].sum()  # noqa: E731
    plain = lambda x, head: reference.token_nats(x, head, rest[0])[0].sum()  # noqa: E731
    largest = [
        largest_array(jax.jit(jax.grad(f, (0, 1))).lower(x, head).compile())
        for f in (plain, loss, nats)
    ]
    assert largest[0] == 256 * V, "the plain version does, and is seen"
    assert max(largest[1:]) <= 256 * V / 4


@pytest.mark.parametrize(
    ("tokens", "vocab", "rows"),
    [
        (8192, 151_936, 832),  # a large vocabulary: 482 MiB of logits
        (8192, 1000, 1024),
        (1000, 1000, 1000),
        (1100, 1000, 560),  # two near-equal tiles of a multiple of 16
        (64, 10**9, 16),
    ],
)
def test_tiles_are_as_long_as_the_budget_allows(monkeypatch, tokens, vocab, rows):
    monkeypatch.undo()
    assert xla_tiled.tile_rows(tokens, vocab) == rows


def test_on_every_mesh_the_result_is_that_of_one_device():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels.cross_entropy_on_a_mesh"],
        env=with_devices(8), cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same on") == 7, done.stdout


def with_argument(name, value):
    """Arguments of which one is wrong."""
    x, head, targets, weights = inputs(seed=0)
    return {"x": x, "head": head, "targets": targets, "weights": weights} | {name: value}


WRONG = [
    ("x", np.ones((T, D), np.float32), "x_BTD has shape (17, 12); it must have 3 axes (B, T, D)"),
    ("x", np.ones((B, T, 0), np.float32), "x_BTD has shape (3, 17, 0); it must have 3 axes"),
    ("x", np.ones((B, T, D), np.int32), "x_BTD is int32; it must be float32 or narrower"),
    ("head", np.ones((V, D), np.float32), "head_DV has shape (53, 12); with x_BTD (3, 17, 12) it"),
    ("head", np.ones((D, V), np.float16), "head_DV is float16 and x_BTD float32; the head must be"),
    ("targets", np.ones((B, 5), np.int32), "targets_BT is int32 (3, 5); it must hold whole"),
    ("targets", np.ones((B, T), np.float32), "targets_BT is float32 (3, 17); it must hold whole"),
    ("weights", np.ones((B,), np.float32), "weights_BT is float32 (3,); it must be floating"),
    ("weights", np.ones((B, T), bool), "weights_BT is bool (3, 17); it must be floating"),
    ("z_loss", -1.0, "z_loss=-1.0 must be finite and 0 (off) or above"),
    ("soft_cap", float("nan"), "soft_cap=nan must be finite and 0 (off) or above"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_argument_is_told_in_one_line_before_anything_is_compiled(name, value, message):
    given = with_argument(name, value)
    arrays = [given.pop(key) for key in ("x", "head", "targets", "weights")]
    with pytest.raises(ConfigError) as caught:
        jax.eval_shape(lambda: cross_entropy(*arrays, **given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
