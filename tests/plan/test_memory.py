"""The estimate of memory: exact where it can be, within a tenth of the compiled step elsewhere."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.model import Lora, count_params
from llm_jax.plan import compile_apart, estimate, parse_topology
from llm_jax.plan.chips import CHIPS
from llm_jax.plan.memory import estimate_memory, kept_for_backward, matrices_of, share_of_one
from llm_jax.sharding import MeshConfig
from llm_jax.train import Trainable, make_optimizer
from llm_jax.train.state import abstract_state
from tests.plan.requests import LLAMA_2_7B, SMALL, ask
from tests.tiny import FAMILIES


def test_the_state_of_7b_is_twelve_bytes_a_parameter_over_all_chips():
    memory = estimate_memory(
        ask(LLAMA_2_7B, batch_size=16, seq_len=4096), parse_topology("v5e:4x4")
    )
    scales = (2 * 32 + 1) * 4096  # of the norms: whole on every device
    split = count_params(LLAMA_2_7B) - scales
    assert split == 2 * 32_000 * 4096 + 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008)
    assert memory.parameters == 4 * (split // 16 + scales)
    assert memory.optimizer == 8 * (split // 16 + scales) + 4
    assert memory.gradients == memory.parameters
    assert memory.batch == 5 * 4 * 4096
    assert memory.activations == 32 * 4096 * 4096 * 2, "full: each layer's input, in bfloat16"
    assert memory.casts == 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008) // 16


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_the_state_is_what_its_shardings_say(family):
    request = ask(
        FAMILIES[family], batch_size=8, seq_len=16, mesh=MeshConfig(data=2, fsdp=2, tensor=2)
    )
    topology = parse_topology("cpu:8")
    state = abstract_state(
        request.model, make_optimizer(request.optimizer), request.abstract_mesh(topology)
    )

    def on_one(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    memory = estimate_memory(request, topology)
    assert memory.parameters == on_one(state.params)
    assert memory.optimizer == on_one(state.opt_state)


def test_what_forward_keeps_follows_the_remat_policy():
    D, N, K, H, F, L, T = 256, 4, 2, 64, 704, 4, 512
    chip = CHIPS["cpu"]
    kept = {
        remat: kept_for_backward(dataclasses.replace(SMALL, remat=remat), T, chip)
        for remat in ("none", "dots", "full")
    }
    assert kept["full"].layers == 4 * L * T * D, "the input of every layer"
    # the input, q, k, v, attention and its log-sum-exp, what it adds, up and gate
    dots = D + N * H + 2 * K * H + N * H + N + D + 2 * F
    assert kept["dots"].layers == 4 * L * T * dots
    assert kept["none"].layers > kept["dots"].layers
    assert kept["full"].layer == kept["dots"].layer == 4 * T * dots


def test_heads_narrower_than_a_tpus_lanes_are_kept_padded():
    L, T, heads = 4, 512, 2 * 4 + 2 * 2  # q and attention's output, k and v
    v5e = CHIPS["v5e"]

    def kept(**switches):
        return kept_for_backward(dataclasses.replace(SMALL, remat="dots", **switches), T, v5e)

    narrow, wide = kept(), kept(head_dim=128)
    assert narrow.layers == wide.layers, "64 numbers take the place of 128"
    assert wide.layer - narrow.layer == 4 * T * heads * 64
    assert narrow.layers - L * narrow.layer == 4 * L * T * heads * 64


def test_one_device_of_the_tensor_axis_has_its_heads_and_no_less_than_one_kv_head():
    share = share_of_one(SMALL, 4)
    assert (share.num_heads, share.num_kv_heads, share.mlp_dim, share.vocab_size) == (
        1,
        1,
        176,
        1024,
    )
    sizes = {"data": 1, "fsdp": 2, "tensor": 4, "context": 1}
    q_and_out, kv, mlp = 2 * 256 * 256, 2 * 256 * 128, 3 * 256 * 704
    # two kv heads do not divide over four devices: whole on each
    assert matrices_of(SMALL, sizes).one_layer == (q_and_out + mlp) // 4 + kv


def test_micro_batches_trade_activations_for_a_second_copy_of_the_gradients():
    topology = parse_topology("v5e:4x4")
    whole = estimate_memory(ask(LLAMA_2_7B, batch_size=64, seq_len=4096), topology)
    parts = estimate_memory(ask(LLAMA_2_7B, batch_size=64, seq_len=4096, micro_batches=4), topology)
    assert parts.activations == whole.activations // 4
    assert parts.gradients == 2 * whole.gradients
    assert parts.batch == whole.batch


def test_a_batch_that_does_not_divide_says_how_many_micro_batches_may_be():
    with pytest.raises(ConfigError, match=r"in step\.micro_batches=8 parts .* may be up to 4"):
        estimate_memory(ask(batch_size=32, micro_batches=8), parse_topology("cpu:8"))
    with pytest.raises(ConfigError, match=r"embed=256 must be a multiple of mesh\.fsdp=24"):
        estimate_memory(ask(batch_size=48), parse_topology("h100:3x8"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(ask(remat="full"), id="full"),
        pytest.param(ask(remat="none"), id="none", marks=SLOW),
        pytest.param(ask(remat="dots"), id="dots", marks=SLOW),
        pytest.param(
            ask(remat="full", num_layers=12, mesh=MeshConfig(data=2, fsdp=2, tensor=2)),
            id="tensor",
            marks=SLOW,
        ),
        pytest.param(
            dataclasses.replace(ask(lora=Lora(rank=8)), trainable=Trainable("adapters")),
            id="adapters",
        ),
        pytest.param(dataclasses.replace(ask(remat="full"), method="dpo"), id="dpo", marks=SLOW),
        pytest.param(
            dataclasses.replace(ask(remat="full", micro_batches=4), trainable=Trainable("body")),
            id="body",
            marks=SLOW,
        ),
    ],
)
@pytest.mark.multidevice
def test_the_estimate_is_within_a_tenth_of_the_step_compiled_for_eight_devices(asked):
    topology = parse_topology("cpu:8")
    found = compile_apart(asked, topology)
    memory = estimate_memory(asked, topology)
    state = memory.parameters + memory.optimizer + memory.batch
    np.testing.assert_allclose(found.arguments, state, rtol=1e-3)
    np.testing.assert_allclose(memory.total, found.total, rtol=0.1)
    assert found.attention == "xla_chunked"
    assert {one.axes for one in found.collectives} >= {"fsdp"}
    time = estimate(asked, topology).time
    assert found.products, "a CPU's program is readable"
    computed = 8 * found.products.matrices
    np.testing.assert_allclose(computed, time.flops + time.recomputed, rtol=0.1)
