"""The TPU kernels compiled for chips that are not here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import flash_attention
from llm_jax.plan import tpu_devices

pytest.importorskip("libtpu", reason="compiling for TPUs needs the package libtpu")

TOPOLOGIES = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def compile_gradients(
    topology: str, T: int, H: int, dtype: str = "bfloat16", **options: Any
) -> Any:
    """The executable of one row's forward and backward, 4 query heads to one of keys."""
    devices = np.array(tpu_devices(topology)[:1])
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    features = options.pop("features", ())
    extra: dict[str, Any] = {}
    if "segments" in features:
        extra |= {"q_segments_BT": ((1, T), "int32"), "kv_segments_BS": ((1, T), "int32")}
    if "positions" in features:
        extra |= {"q_positions_BT": ((1, T), "int32"), "kv_positions_BS": ((1, T), "int32")}
    if "alibi" in features:
        extra["alibi_slopes_N"] = ((4,), "float32")
    everywhere = NamedSharding(mesh, PartitionSpec())
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    arrays = [struct((1, T, heads, H), dtype) for heads in (4, 1, 1)]
    extra = {name: struct(*x) for name, x in extra.items()}

    def loss(arrays: list[Any], extra: dict[str, Any]) -> jax.Array:
        out: Any = flash_attention(*arrays, **extra, **options)
        return jnp.square(out.astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(arrays, extra).compile()


def test_auto_compiles_both_kernels_for_a_tpu():
    compiled = compile_gradients("v5e:2x2", 512, 128, features=("segments", "alibi"))
    text = compiled.as_text()
    assert "llm_jax_attention_forward" in text
    assert "llm_jax_attention_backward" in text


def test_an_unknown_topology_is_one_clear_line():
    for name in ("v5e:3x1000", "h100:1x8"):
        with pytest.raises(ConfigError, match=f"topology='{name}'") as refusal:
            tpu_devices(name)
        assert "\n" not in str(refusal.value)


def assert_no_scores_are_held(compiled, T):
    scores = 4 * 4 * T * T  # bytes of float32, of four heads
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


EVERYTHING = {"features": ("segments", "alibi"), "window": 1000, "soft_cap": 30.0}


@pytest.mark.tpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "options",
    [{"causal": False}, EVERYTHING, {"features": ("segments", "positions", "alibi")}],
    ids=["full", "all", "positions"],
)
def test_forward_and_backward_compile_for(topology, options):
    compiled = compile_gradients(topology, 4096, 128, implementation="pallas_tpu", **options)
    assert_no_scores_are_held(compiled, 4096)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", TOPOLOGIES[:2])
@pytest.mark.parametrize("H", [64, 80, 256])
def test_other_head_sizes_compile_for(topology, H):
    compiled = compile_gradients(topology, 4096, H, implementation="pallas_tpu", **EVERYTHING)
    assert_no_scores_are_held(compiled, 4096)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_float32_compiles_for(topology):
    compiled = compile_gradients(topology, 3000, 128, "float32", features=("segments", "alibi"))
    assert_no_scores_are_held(compiled, 3000)


@pytest.mark.tpu
def test_memory_grows_linearly_with_length():
    bytes_at = []
    for T in (4096, 8192, 16384):
        memory = compile_gradients(
            "v5e:2x2", T, 128, features=("segments", "alibi")
        ).memory_analysis()
        bytes_at.append(memory.peak_memory_in_bytes)
    assert bytes_at[1] < 2.1 * bytes_at[0]
    assert bytes_at[2] < 2.1 * bytes_at[1]
