"""Time, traffic and the search: by hand where hands can, and in the right order elsewhere."""

import dataclasses
import itertools
import math

import pytest

from llm_jax.errors import ConfigError
from llm_jax.model import flops_per_token
from llm_jax.plan import estimate, parse_topology, search
from llm_jax.plan.roofline import ATTENTION, EFFICIENCY
from llm_jax.plan.traffic import by_axis, estimate_traffic, slow_share
from llm_jax.sharding import MeshConfig
from tests.plan.requests import LLAMA_2_7B, SMALL, ask

V5E = parse_topology("v5e:4x4")
LAYERS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008)  # entries of 7B's layer matrices
END = 32_000 * 4096


def test_fsdp_gathers_every_matrix_twice_and_scatters_its_gradient_once():
    moved = by_axis(estimate_traffic(ask(LLAMA_2_7B, batch_size=16, seq_len=4096), V5E))
    assert moved.keys() == {"fsdp"}
    gathered = 2 * 2 * LAYERS + 3 * 2 * END
    scattered = 2 * LAYERS + 2 * 4 * END
    assert moved["fsdp"] == pytest.approx(15 / 16 * (gathered + scattered))


def test_each_axis_moves_what_it_splits():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2, context=2)
    moved = by_axis(estimate_traffic(ask(mesh=mesh), parse_topology("v5e:4x4")))
    assert moved.keys() == {"data", "fsdp", "tensor", "context"}
    activation = 8 * 256 * 256 * 4  # rows, tokens, D of one device
    assert moved["tensor"] == 4 * 4 * activation  # two sums each way in 4 layers, 2 (n-1)/n = 1
    assert estimate_traffic(ask(mesh=MeshConfig()), parse_topology("cpu:1")) == []


def test_micro_batches_move_the_weights_again_for_each():
    once = by_axis(estimate_traffic(ask(), V5E))["fsdp"]
    assert by_axis(estimate_traffic(ask(micro_batches=2), V5E))["fsdp"] == 2 * once


def test_a_slow_network_carries_what_is_stated_or_everything():
    hosts = parse_topology("h100:2x8")
    hsdp = ask(mesh=MeshConfig(data=1, fsdp=8, dcn_data=2))
    assert slow_share(hsdp, hosts, "data") == 1  # both replicas lie on different hosts
    assert slow_share(hsdp, hosts, "fsdp") == 0
    over_hosts = ask(mesh=MeshConfig(data=1, fsdp=16))
    assert slow_share(over_hosts, hosts, "fsdp") == 1
    assert estimate(hsdp, hosts).time.traffic < estimate(over_hosts, hosts).time.traffic


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("2*v5e:4x4", MeshConfig(data=1, fsdp=32)),  # slices are never one flat mesh
        ("h100:2x8", MeshConfig(fsdp=4, dcn_data=4)),
        ("cpu:8", MeshConfig(fsdp=4, dcn_fsdp=2)),
    ],
)
def test_a_slow_network_that_the_hardware_does_not_have_is_refused(topology, mesh):
    with pytest.raises(ConfigError, match=r"mesh\.dcn_data=\d x mesh\.dcn_fsdp=\d must be \d"):
        estimate(ask(batch_size=64, mesh=mesh), parse_topology(topology))


def test_a_step_takes_its_operations_at_the_stated_efficiency():
    request = ask(LLAMA_2_7B, batch_size=256, seq_len=4096, remat="dots")
    time = estimate(request, V5E).time
    tokens = 256 * 4096
    products = 6 * (LAYERS + END) * tokens
    attention = 6 * 2 * 32 * 32 * 128 * (4096 + 1) / 2 * tokens
    assert time.flops == pytest.approx(products + attention)
    assert time.flops == pytest.approx(flops_per_token(LLAMA_2_7B, 4096) * tokens)
    peak = 16 * 197e12
    expected = products / EFFICIENCY["tpu"] / peak + attention / ATTENTION["tpu"] / peak
    assert time.products == pytest.approx(expected)
    assert time.recomputed == 0
    assert time.mfu == pytest.approx(time.flops / (time.seconds * peak))
    assert time.days == pytest.approx(1000 * time.seconds / 86_400)
    full = estimate(dataclasses.replace(request, model=LLAMA_2_7B), V5E).time
    never_again = END + 32 * 4096 * 11_008  # the head, and each layer's last product
    assert full.recomputed == pytest.approx((products + attention) / 3 - 2 * never_again * tokens)


@pytest.mark.slow
def test_the_search_proposes_what_fits_fastest_first_and_keeps_the_batch():
    request = ask(LLAMA_2_7B, batch_size=64, seq_len=4096, remat="none")
    assert estimate(request, V5E).memory.total > V5E.usable
    found = search(request, V5E)
    assert all(one.memory.total <= 0.95 * V5E.usable for one in found)
    assert all(one.request.step.batch_size == 64 for one in found)
    times = [one.time.seconds for one in found]
    assert all(b > a * 0.98 for a, b in itertools.pairwise(times))
    best = found[0].request
    assert math.prod((best.mesh.data, best.mesh.fsdp, best.mesh.tensor)) == 16


def test_a_search_in_vain_says_how_much_is_missing():
    with pytest.raises(
        ConfigError, match=r"no mesh, micro-batch and remat fits .* use more devices"
    ):
        search(ask(LLAMA_2_7B, batch_size=4, seq_len=4096), parse_topology("v5e:1x1"))


def test_a_search_on_several_hosts_keeps_parameters_inside_one():
    found = search(ask(SMALL, batch_size=64), parse_topology("h100:2x8"))
    assert {one.request.mesh.dcn_data for one in found} == {2}
