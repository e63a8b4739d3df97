"""Folders of others as our parameters: every value in its place, whatever the dtype, files and devices."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import names
from llm_jax.checkpoint.fingerprint import named_leaves
from llm_jax.checkpoint.hf_import import differences, lead, open_source, read_params
from llm_jax.errors import ConfigError
from tests.checkpoint import hf_folders
from tests.checkpoint.hf_folders import BFLOAT16, GPT2, LLAMA
from tests.virtual_devices import with_devices

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def sharded(request, tmp_path_factory):
    """A folder of three files, and its tensors."""
    config = {"llama": LLAMA, "gpt2": GPT2}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return folder, hf_folders.write(folder, config, shards=3)


def test_every_tensor_lands_where_the_table_says(sharded):
    folder, tensors = sharded
    source = open_source(folder)
    leaves = named_leaves(read_params(source))
    seen = {path: np.zeros(leaf.shape, bool) for path, leaf in leaves.items()}
    for tensor in names.tensors(source.family, source.config):
        for slot, part in zip(tensor.slots, tensor.split(tensors[tensor.name]), strict=True):
            np.testing.assert_array_equal(leaves[slot.path][lead(slot)], part)
            seen[slot.path][lead(slot)] = True
    assert all(places.all() for places in seen.values())
    assert len(source.tensors) == len(tensors)
    assert source.listed == ()


def test_a_changed_bit_in_the_parameters_or_the_files_is_found(sharded):
    folder, _ = sharded
    source = open_source(folder)
    params = read_params(source)
    assert list(differences(source, params)) == []
    for path in ("embedding", "final_norm/scale"):
        *parents, last = path.split("/")
        changed = jax.tree.map(lambda leaf: leaf, params)
        node = changed
        for parent in parents:
            node = node[parent]
        at = (0,) * node[last].ndim
        node[last] = node[last].at[at].set(np.nextafter(node[last][at], np.float32(9)))
        assert len(list(differences(source, changed))) == 1


@pytest.mark.parametrize(
    ("stored", "asked", "held", "rounded"),
    [
        ("float32", "", "float32", False),
        ("float16", "", "float32", False),
        ("bfloat16", "", "bfloat16", False),
        ("bfloat16", "float32", "float32", False),
        ("float16", "bfloat16", "bfloat16", True),
        ("float32", "bfloat16", "bfloat16", True),
    ],
)
def test_parameters_are_exact_unless_rounding_is_asked_for(tmp_path, stored, asked, held, rounded):
    dtype = BFLOAT16 if stored == "bfloat16" else np.dtype(stored)
    tensors = hf_folders.write(tmp_path, LLAMA, dtype=dtype)
    source = open_source(tmp_path, asked)
    params = read_params(source)
    assert (source.config.param_dtype, source.rounded) == (held, rounded)
    assert list(differences(source, params)) == []
    expected = tensors["model.embed_tokens.weight"].astype(
        BFLOAT16 if held == "bfloat16" else np.float32
    )
    np.testing.assert_array_equal(np.asarray(params["embedding"]), expected)


def test_mixed_dtypes_are_held_exactly(tmp_path):
    tensors = hf_folders.weights(LLAMA, BFLOAT16)
    tensors["model.norm.weight"] = hf_folders.weights(LLAMA)["model.norm.weight"]
    hf_folders.write(tmp_path, LLAMA, tensors)
    source = open_source(tmp_path)
    assert source.config.param_dtype == "float32"
    assert list(differences(source, read_params(source))) == []
    with pytest.raises(ConfigError, match="param_dtype='int8' must be one of float32, bfloat16"):
        open_source(tmp_path, "int8")


def test_buffers_and_tied_heads_of_older_saves_are_listed_and_a_save_without_prefix_is_read(
    tmp_path,
):
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = hf_folders.weights(tied)
    old = tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    hf_folders.write(tmp_path / "llama", tied, old)
    source = open_source(tmp_path / "llama")
    assert set(source.listed) == old.keys() - tensors.keys()
    assert list(differences(source, read_params(source))) == []

    bare = {n.removeprefix("transformer."): t for n, t in hf_folders.weights(GPT2).items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    hf_folders.write(tmp_path / "gpt2", GPT2, bare)
    source = open_source(tmp_path / "gpt2")
    assert len(source.tensors) == len(bare) - 1
    np.testing.assert_array_equal(read_params(source)["embedding"], bare["wte.weight"])


MESH_PROGRAM = """
import sys
import jax, numpy as np
from llm_jax.checkpoint.hf_import import differences, open_source, read_params
from llm_jax.model import abstract_params, logical_axes
from llm_jax.sharding import MeshConfig, make_mesh, tree_shardings

source = open_source(sys.argv[1])
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
shardings = tree_shardings(mesh, abstract_params(source.config), logical_axes(source.config))
sharded, whole = read_params(source, shardings), read_params(source)
for path, (a, b) in enumerate(zip(jax.tree.leaves(sharded), jax.tree.leaves(whole))):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
query = sharded["layers"]["attention"]["query"]
assert query.sharding.shard_shape(query.shape) == (3, 16, 2, 8), query.sharding
assert list(differences(source, sharded)) == []
print("same")
"""


@pytest.mark.multidevice
def test_tensors_go_straight_to_the_shards_of_a_mesh(tmp_path):
    hf_folders.write(tmp_path, LLAMA)
    done = subprocess.run(
        [sys.executable, "-c", MESH_PROGRAM, str(tmp_path)], cwd=ROOT, text=True, check=False,
        env=with_devices(4), capture_output=True,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr
