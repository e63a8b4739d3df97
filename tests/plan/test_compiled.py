"""Whole steps compiled for absent chips, with our kernels in them: what the compiler says against the estimate."""

import importlib.util
import os

import pytest

from llm_jax.errors import ConfigError
from llm_jax.plan import compile_apart, estimate, parse_topology
from llm_jax.sharding import MeshConfig
from tests.plan.requests import LLAMA_2_7B, SMALL, ask

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13], and no GPU"
)


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "asked"),
    [
        ("v5e:4x4", ask(LLAMA_2_7B, batch_size=16, seq_len=4096)),
        ("v5p:4x4x4", ask(LLAMA_2_7B, batch_size=1024, seq_len=4096)),
        ("v6e:8x8", ask(LLAMA_2_7B, batch_size=256, seq_len=4096)),
    ],
    ids=["v5e-16", "v5p-64", "v6e-64"],
)
def test_7b_on_a_slice_of_tpus_is_as_estimated(topology, asked):
    where = parse_topology(topology)
    found = compile_apart(asked, where)
    assert found.attention == "pallas_tpu"
    if found.readable:
        assert set(found.kernels) == {"llm_jax_attention_forward", "llm_jax_attention_backward"}
        assert "fsdp" in {one.axes for one in found.collectives}
    counted = estimate(asked, where).memory
    assert counted.total == pytest.approx(found.total, rel=0.1)
    assert found.total <= where.usable


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
def test_what_is_too_large_for_its_slice_is_refused_by_the_compiler_and_by_the_estimate():
    where, asked = parse_topology("v5e:2x2"), ask(LLAMA_2_7B, batch_size=4, seq_len=4096)
    assert estimate(asked, where).memory.total > where.usable
    assert "exceeds" in compile_apart(asked, where).too_large


@pytest.mark.gpu
@pytest.mark.slow
@needs_cuda
def test_7b_on_eight_gpus_is_as_estimated():
    where = parse_topology("h100:1x8")
    asked = ask(LLAMA_2_7B, batch_size=256, seq_len=4096, micro_batches=16)
    found = compile_apart(asked, where)
    assert found.attention == "mosaic_gpu"
    counted = estimate(asked, where).memory
    assert counted.total == pytest.approx(found.total, rel=0.1)
    assert found.total <= where.usable


def test_a_mesh_for_another_number_of_devices_is_refused_before_anything_starts():
    where = parse_topology("cpu:8")
    with pytest.raises(ConfigError, match=r"mesh data=1 x fsdp=3 .* does not fit 8 device"):
        estimate(ask(mesh=MeshConfig(fsdp=3)), where)


def test_a_refusal_in_the_compiling_process_is_the_users_one_line(monkeypatch):
    monkeypatch.setitem(os.environ, "XLA_FLAGS", "")
    with pytest.raises(ConfigError, match=r"^mesh data=1 x fsdp=3 .* does not fit 8 device"):
        compile_apart(ask(SMALL, mesh=MeshConfig(fsdp=3)), parse_topology("cpu:8"))
