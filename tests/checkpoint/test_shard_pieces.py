"""Filling arrays by the way for accelerators and the way for CPUs: the same bits, piece by piece."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax.checkpoint import shard_pieces
from llm_jax.checkpoint.shard_pieces import Filled, HostFilled, filled


@pytest.mark.parametrize("kind", [Filled, HostFilled])
@pytest.mark.parametrize(
    ("stored", "held"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_turned_layers_in_many_pieces_are_the_array_that_was_put(kind, stored, held, monkeypatch):
    monkeypatch.setattr(shard_pieces, "HOST_PIECE_BYTES", 256)
    monkeypatch.setattr(shard_pieces.pieces, "__defaults__", (256,))  # the limit of `Filled`
    random = np.random.default_rng(0)
    theirs = [random.normal(size=(6, 37)).astype(np.dtype(stored)) for _ in range(3)]
    leaf = jax.ShapeDtypeStruct((3, 37, 6), jnp.dtype(held))
    filling = kind(leaf, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    for layer, array in enumerate(theirs):
        filling.put((layer,), array.T)
    filling.wait()
    expected = np.stack([np.ascontiguousarray(x.T).astype(np.dtype(held)) for x in theirs])
    found = np.asarray(filling.array())
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_on_a_cpu_the_host_memory_is_the_array():
    leaf = jax.ShapeDtypeStruct((4, 4), jnp.dtype(ml_dtypes.bfloat16))
    filling = filled(leaf, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert isinstance(filling, HostFilled)
    (buffer,) = filling._buffers.values()
    filling.put((), np.ones((4, 4), ml_dtypes.bfloat16))
    array = filling.array()
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
