"""Folders that are damaged, contradict themselves, or ask for what transformers refuses: one line, or a reason."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.checkpoint.hf_import import open_source
from llm_jax.checkpoint.parity import compare_logits
from llm_jax.errors import CheckpointError
from llm_jax.run import cli, export, import_model
from tests.checkpoint import hf_folders
from tests.checkpoint.hf_folders import BFLOAT16, LLAMA

importing = importlib.import_module("llm_jax.run.import")  # `import` is no name in Python
ROOT = Path(__file__).parents[2]
TIED = LLAMA | {"tie_word_embeddings": True}
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 336, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


def refused(capsys, main, *words):
    """The one line a command says as it refuses."""
    assert cli.run(main, [str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("config", "head", "embedding"),
    [
        (TIED, "lm_head.weight", "model.embed_tokens.weight"),
        (NEOX, "embed_out.weight", "gpt_neox.embed_in.weight"),
    ],
)
def test_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path, config, head, embedding):
    tensors = hf_folders.weights(config)
    hf_folders.write(tmp_path / "same", config, tensors | {head: tensors[embedding]})
    assert open_source(tmp_path / "same").listed == (head,)
    changed = tensors[embedding].copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    for name, other in [("bit", changed), ("dtype", tensors[embedding].astype(BFLOAT16))]:
        hf_folders.write(tmp_path / name, config, tensors | {head: other})
        with pytest.raises(CheckpointError, match=f"{head} differs from {embedding}; .* set tie"):
            open_source(tmp_path / name)


def test_a_model_of_zeros_is_equal_to_itself():
    zeros = np.zeros((3, 12), np.float32)
    assert compare_logits(zeros, zeros)["max_relative"] == 0
    assert compare_logits(zeros + 1, zeros)["max_relative"] == np.inf


@pytest.mark.oracle
def test_a_model_of_zeros_can_be_imported(tmp_path):
    zeros = {name: np.zeros_like(tensor) for name, tensor in hf_folders.weights(LLAMA).items()}
    hf_folders.write(tmp_path / "hf", LLAMA, zeros)
    report = import_model.import_model(tmp_path / "hf", tmp_path / "ours")
    assert report.parts["logits"]["max_relative"] == 0


@pytest.mark.oracle
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, capsys, value):
    tensors = hf_folders.weights(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    hf_folders.write(tmp_path / "hf", LLAMA, tensors)
    error = refused(capsys, importing.main, tmp_path / "hf", tmp_path / "ours")
    assert "not finite: model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in error
    assert not (tmp_path / "ours").exists()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("file", "fields", "why"),
    [
        ("config.json", {"pad_token_id": 100_000}, "transformers cannot load it: AssertionError"),
        ("config.json", {"use_cache": "no"}, "transformers cannot load it: Strict"),
        ("config.json", {"return_dict": False}, "transformers cannot run it: AttributeError"),
        ("config.json", {"is_encoder_decoder": True}, "transformers cannot run it: ValueError"),
        ("generation_config.json", {"cache_implementation": "no"}, "transformers cannot"),
    ],
)
def test_what_transformers_cannot_do_with_a_folder_of_others_is_said_and_not_compared(
    tmp_path, capsys, file, fields, why
):
    hf_folders.write(tmp_path / "hf", LLAMA)
    said = (LLAMA if file == "config.json" else {}) | fields
    (tmp_path / "hf" / file).write_text(json.dumps(said))
    assert cli.run(importing.main, [str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    part = json.loads((tmp_path / "ours/parity.json").read_text())["parts"]["logits"]
    assert part["status"] == "not run"
    assert part["why"].startswith(why)
    assert "\n" not in part["why"]
    assert f"not run: {part['why']}" in capsys.readouterr().out


@pytest.mark.oracle
def test_what_transformers_cannot_load_of_ours_is_no_export(tmp_path, capsys):
    """An import keeps the generation config, whatever it says; an export writes it for transformers."""
    hf_folders.write(tmp_path / "hf", LLAMA)
    (tmp_path / "hf/generation_config.json").write_text('{"cache_implementation": "no"}')
    import_model.import_model(tmp_path / "hf", tmp_path / "ours", skip="a test")
    error = refused(capsys, export.main, tmp_path / "ours", tmp_path / "back")
    assert "'logits' failed: transformers cannot load it: ValueError: Invalid `cache_imp" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_room_is_asked_for_what_will_be_written(tmp_path, capsys, monkeypatch):
    """float16 is held as float32: twice the bytes of the files."""
    hf_folders.write(tmp_path / "hf", LLAMA, dtype=np.float16)
    count = sum(tensor.size for tensor in hf_folders.weights(LLAMA).values())
    needed = int(1.05 * 4 * count) + import_model.SPARE
    words = [tmp_path / "hf", tmp_path / "ours", "--no-logits"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    error = refused(capsys, importing.main, *words)
    assert f"{needed / 1e6:.1f} MB free on the disk, {needed / 1e6:.1f} MB needed; free" in error
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed))
    assert cli.run(importing.main, [str(word) for word in words]) == 0


LIMITED = """
import resource, sys
from llm_jax.run import cli, export
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(cli.run(export.main, sys.argv[1:]))
"""


def test_an_export_that_the_disk_has_no_room_for_says_where_and_what_to_do(tmp_path):
    hf_folders.write(tmp_path / "hf", LLAMA)
    import_model.import_model(tmp_path / "hf", tmp_path / "ours", skip="a test")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "ours"), str(tmp_path / "a" / "out")],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    place = tmp_path / "a" / "out"
    assert done.stderr.startswith(f"error: {place} could not be written: File too large; free spa")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
