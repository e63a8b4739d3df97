"""Broken and hostile model folders: each is refused in one line before anything is read or written."""

import json
import struct

import numpy as np
import pytest

from llm_jax.checkpoint.hf_import import open_source
from llm_jax.checkpoint.safetensors_files import MAX_HEADER, ShardWriter, open_folder
from llm_jax.errors import CheckpointError, ConfigError
from tests.checkpoint import hf_folders
from tests.checkpoint.hf_folders import LLAMA

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


def file_of(header, data=b"", size=None):
    """Bytes of a safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


FILES = {
    "empty": (b"", "truncated or no safetensors"),
    "shorter than its header": (file_of({}, size=999), "truncated or no safetensors"),
    "header beyond the cap": (file_of({}, size=MAX_HEADER + 1), "truncated or no safetensors"),
    "header of 2^63": (file_of({}, size=1 << 63), "truncated or no safetensors"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "header that is no JSON": (file_of(b"{'a': 1}"), "not valid JSON"),
    "header that is no UTF-8": (file_of(b"\xff\xfe"), "not valid JSON"),
    "header nested too deep": (file_of(b"[" * 100_000), "not valid JSON"),
    "header that is a list": (file_of([]), "must hold a JSON object"),
    "a tensor named twice": (
        file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "'a' is there twice",
    ),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps the one before"),
    "the same bytes twice": (file_of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
    "gap": (file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "leaves a gap"),
    "gap at the start": (file_of({"a": entry(4, 12)}, bytes(12)), "leaves a gap"),
    "truncated data": (file_of({"a": entry(0, 8)}, bytes(7)), "truncated or damaged"),
    "bytes behind the last": (file_of({"a": entry(0, 8)}, bytes(9)), "truncated or damaged"),
    "offsets beyond the file": (file_of({"a": entry(0, 1 << 40, (1 << 38,))}, bytes(8)), "truncated"),
    "offsets backwards": (file_of({"a": entry(8, 0)}, bytes(8)), "has -8 bytes"),
    "negative offset": (file_of({"a": entry(-8, 0)}, bytes(8)), "is not valid"),
    "negative shape": (file_of({"a": entry(0, 8, (-1, -2))}, bytes(8)), "is not valid"),
    "shape that overflows": (file_of({"a": entry(0, 8, (1 << 62, 1 << 62))}, bytes(8)), "has 8 bytes"),
    "shape of fractions": (file_of({"a": entry(0, 8, (2.0,))}, bytes(8)), "is not valid"),
    "shape of booleans": (file_of({"a": entry(0, 4, (True,))}, bytes(4)), "is not valid"),
    "size other than shape": (file_of({"a": entry(0, 8, (3,))}, bytes(8)), r"F32\[3\] needs 12"),
    "unknown dtype": (file_of({"a": entry(0, 8, (8,), "F8_E4M3")}, bytes(8)), "quantised"),
    "dtype that is a list": (file_of({"a": entry(0, 8) | {"dtype": []}}, bytes(8)), "dtype"),
    "entry that is a number": (file_of({"a": 3}), "is not valid"),
    "entry without offsets": (file_of({"a": {"dtype": "F32", "shape": [0]}}), "is not valid"),
}  # fmt: skip


def refused(folder, said, kind: type[Exception] = CheckpointError):
    with pytest.raises(kind, match=said) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_breaks_a_rule_is_refused(case, tmp_path):
    content, said = FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_any_cut_or_flipped_header_byte_of_a_good_file_is_refused_or_changes_a_name(tmp_path):
    good = file_of({"abc": entry(0, 8), "d": entry(8, 16)}, bytes(16))
    path = tmp_path / "model.safetensors"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            open_folder(tmp_path)
    draw = np.random.default_rng(0)
    for _ in range(300):
        at, bit = int(draw.integers(len(good) - 16)), int(draw.integers(8))
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
        try:
            found = open_folder(tmp_path)
        except CheckpointError:
            continue
        for stored in found.values():
            assert stored.start + stored.nbytes <= len(good)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "path",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors", "x.bin", 3],
)  # fmt: skip
def test_an_index_that_points_anywhere_but_beside_itself_is_refused(path, tmp_path):
    hf_folders.write(tmp_path / "m", LLAMA, shards=2)
    edit_index(tmp_path / "m", lambda placed: placed.update({"model.norm.weight": path}))
    refused(tmp_path / "m", "must be a .*file beside the index")


def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path):
    for name, change, said in [
        ("gone", lambda placed: placed.pop("model.norm.weight"), "puts nowhere"),
        ("more", lambda placed: placed.update(x=SHARD), "does not hold it"),
        ("file", lambda placed: placed.update(x="none.safetensors"), "No such file"),
        ("none", lambda placed: placed.clear(), "has no weight_map"),
    ]:
        hf_folders.write(tmp_path / name, LLAMA, shards=2)
        edit_index(tmp_path / name, change)
        refused(tmp_path / name, said)


def test_a_link_out_of_the_folder_is_refused_but_not_one_into_the_cache_of_the_hub(tmp_path):
    hf_folders.write(tmp_path / "elsewhere", LLAMA)
    hf_folders.write(tmp_path / "linked", LLAMA)
    (tmp_path / "linked/model.safetensors").unlink()
    (tmp_path / "linked/model.safetensors").symlink_to(tmp_path / "elsewhere/model.safetensors")
    refused(tmp_path / "linked", "link out of its folder")
    (tmp_path / "linked/model.safetensors").unlink()
    (tmp_path / "linked/model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path / "linked", "safetensors")

    snapshot = tmp_path / "models--a--b/snapshots/0123"
    hf_folders.write(snapshot, LLAMA)
    (tmp_path / "models--a--b/blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(tmp_path / "models--a--b/blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert open_source(snapshot).family == "llama"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickle_files_are_never_read(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    refused(tmp_path, "pickle file, which can run code")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "never run"),
        ({"model_type": "llamma"}, "did you mean 'llama'"),
        ({"unheard_of": 3}, "unheard_of"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most"),
        ({"vocab_size": 10**15}, "that is no model"),
        ({"hidden_size": "32"}, "hidden_size|sensible|whole"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_|heads|sensible"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_by_name(config, said, tmp_path):
    hf_folders.write(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    refused(tmp_path, said, ConfigError)


def test_config_files_that_are_missing_broken_or_repeat_a_key_are_refused(tmp_path):
    hf_folders.write(tmp_path, LLAMA)
    for text, said in [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"model_type":"llama","model_type":"gpt2"}', "'model_type' is there twice"),
    ]:
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, said)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no config.json")
    refused(tmp_path / "nothing", "no such folder")


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(NORM), "model.norm.weight .* is missing"),
        (lambda w: [w.pop(n) for n in list(w) if "layers.2." in n], "and 8 more.* is missing"),
        (lambda w: w.update({"model.layers.0.extra.weight": w[NORM]}), "not part of a llama model"),
        (lambda w: w.update({UP: w[UP][:-1]}), "shape .47, 32., config.json asks for .48, 32."),
        (lambda w: w.update({UP: np.ascontiguousarray(w[UP].T)}), "shape .32, 48."),
        (lambda w: w.update({UP: w[UP].astype(np.int8)}), "is int8; weights must be"),
        (lambda w: w.update({UP: w[UP].astype(np.float64)}), "is float64; weights must be"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(change, said, tmp_path):
    weights = hf_folders.weights(LLAMA)
    change(weights)
    hf_folders.write(tmp_path, LLAMA, weights)
    refused(tmp_path, said)


def test_the_writer_makes_files_that_the_library_reads_and_ours_accepts(tmp_path):
    planned = {"a": ("F32", (3, 5)), "b": ("BF16", (7,)), "c": ("F16", ()), "d": ("F32", (2,))}
    kinds = {"F32": np.float32, "BF16": hf_folders.BFLOAT16, "F16": np.float16}
    values = {n: np.arange(np.prod(s)).reshape(s).astype(kinds[d]) for n, (d, s) in planned.items()}
    for limit, files in [(10**9, 1), (70, 2), (16, 3), (1, 4)]:
        folder = tmp_path / str(limit)
        folder.mkdir()
        writer = ShardWriter(folder, planned, limit)
        for name, value in values.items():
            writer.write(name, value)
        writer.close()
        assert len(writer.files) == files
        assert hf_folders.equal(hf_folders.read(folder), values)
        assert open_folder(folder).keys() == values.keys()
