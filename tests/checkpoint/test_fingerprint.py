"""The fingerprint finds every small change and does not depend on where an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.checkpoint import differences, fingerprint, fingerprints
from llm_jax.checkpoint.fingerprint import LARGE, fingerprint_in_blocks, named_leaves

BASE = np.random.default_rng(0).integers(0, 2**32, (7, 9), dtype=np.uint32)
one = jax.jit(fingerprint)


def by_hand(words: np.ndarray) -> str:
    """The definition again, in Python integers, one word at a time."""

    def mix(v: int) -> int:
        v = (v ^ (v >> 16)) * 0x7FEB352D % 2**32
        v = (v ^ (v >> 15)) * 0x846CA68B % 2**32
        return v ^ (v >> 16)

    first = second = 0
    for i, word in enumerate(words.reshape(-1).tolist()):
        first += mix(word ^ mix(i))
        second += mix((word + mix(i ^ 0x9E3779B9)) % 2**32)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "float8_e4m3fn", "int32"])
def test_every_dtype_agrees_with_the_definition(dtype):
    array = jnp.asarray(BASE % 2 if dtype == "bool" else BASE % 100).astype(dtype)
    width = array.dtype.itemsize
    words = np.asarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[width])
    assert fingerprints({"x": array})["x"] == by_hand(words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 1000, 1001), (LARGE + 3,)])
def test_a_large_array_is_read_in_blocks_and_has_the_same_fingerprint(dtype, shape):
    array = jnp.asarray(np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) % 251).astype(
        dtype
    )
    assert len(fingerprint_in_blocks(array)) > 1
    first, second = np.asarray(one(array)).tolist()
    assert fingerprints({"x": array})["x"] == f"{first:08x}{second:08x}"


def test_eight_byte_numbers_are_read_whole():
    array = np.array([1.0, 2.0, -3.5])
    assert fingerprints({"x": array})["x"] == by_hand(array.view(np.uint32))
    changed = array.copy()
    changed.view(np.uint64)[1] ^= 1  # the last bit of the mantissa, which float32 does not have
    assert differences(fingerprints({"x": array}), fingerprints({"x": changed})) == ["x"]


def test_keys_scalars_and_empty_arrays_have_fingerprints():
    tree = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3), 2),
        "none": jnp.zeros((0, 4)),
        "scalar": jnp.float32(2),
    }
    prints = fingerprints(tree)
    assert prints["key"] == by_hand(np.asarray(jax.random.key_data(tree["key"])))
    assert prints["none"] == "0" * 16
    assert prints["scalar"] == by_hand(np.array([2], np.float32).view(np.uint32))
    assert len(set(prints.values())) == 4


@settings(max_examples=200, deadline=None)
@given(st.integers(0, BASE.size - 1), st.integers(0, 31))
def test_any_flipped_bit_is_seen(where, bit):
    changed = BASE.copy()
    changed.reshape(-1)[where] ^= np.uint32(1 << bit)
    assert not np.array_equal(one(changed), one(BASE))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, BASE.size - 1), st.integers(0, BASE.size - 1))
def test_any_two_swapped_elements_are_seen(a, b):
    changed = BASE.copy().reshape(-1)
    changed[[a, b]] = changed[[b, a]]
    assert np.array_equal(one(changed.reshape(BASE.shape)), one(BASE)) == (a == b)


def test_leaves_are_named_by_their_path():
    tree = {"params": {"embed": 1}, "opt_state": ({"mu": 2}, ())}
    assert named_leaves(tree) == {"params/embed": 1, "opt_state/0/mu": 2}


@pytest.mark.parametrize("tree", [{"a/b": 1}, {"": 1}, {"a": {"1": 1, 1: 2}}, 5])
def test_names_that_could_be_confused_are_refused(tree):
    with pytest.raises((ValueError, TypeError)):
        named_leaves(tree)


def test_differences_names_changed_missing_and_extra_leaves():
    assert differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == [
        "b",
        "c",
        "d",
    ]
