"""Import and export against transformers, live: every family, and a model that our own pretrain trained."""

import json

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.checkpoint.hf_export import ExportConfig
from llm_jax.run import export, transformers_side
from llm_jax.run.import_model import import_model
from llm_jax.tokenizer import probe
from tests.checkpoint import hf_folders
from tests.model.family_cases import CASES
from tests.tiny_text import sentencepiece_bytes
from tools.make_family_goldens import their_model

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", CASES)
def test_a_family_goes_in_and_out_bit_for_bit_with_the_logits_of_transformers(case, tmp_path):
    their_model(case).save_pretrained(tmp_path / "hf")
    report = import_model(tmp_path / "hf", tmp_path / "ours")
    model = llm_jax.load(tmp_path / "ours")
    exported = export.export_model(model, tmp_path / "back", ExportConfig())
    assert hf_folders.equal(hf_folders.read(tmp_path / "hf"), hf_folders.read(tmp_path / "back"))
    for parts in (report.parts, exported.parts):
        assert parts["logits"]["status"] == "passed"
        assert parts["logits"]["max_relative"] < 1e-4
        assert parts["logits"]["top_1"] == 1
        assert parts["round_trip"]["bitwise"]
    ids = np.random.default_rng(1).integers(0, 61, 17).tolist()
    before = transformers_side.TheirModel(tmp_path / "hf").logits(ids)
    after = transformers_side.TheirModel(tmp_path / "back").logits(ids)
    np.testing.assert_array_equal(before, after)


def test_a_wrong_name_table_does_not_pass_the_gate(tmp_path, monkeypatch):
    """Keys and values swapped: fluent in no one's hands, and bitwise the same on the way back."""
    from llm_jax.checkpoint import name_table, names
    from llm_jax.errors import CheckpointError

    swap = {"layers/attention/key": "layers/attention/value"}
    swap |= {b: a for a, b in swap.items()}
    wrong = tuple(
        row._replace(paths=tuple(swap.get(path, path) for path in row.paths))
        for row in name_table.ROWS["llama"]
    )
    monkeypatch.setitem(names.ROWS, "llama", wrong)
    their_model("llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="parity check 'logits' failed"):
        import_model(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_pretrain_trained_loads_in_transformers_with_equal_logits_and_ids(new_run, tmp_path):
    run = new_run()
    process = run.start("--train.steps", "8")
    assert process.wait_for_end() == 0, process.errors()
    model = llm_jax.load(run.folder)
    report = export.export_model(model, tmp_path / "hf", ExportConfig())
    assert report.parts["tensors"]["rows"] == model.tokenizer.vocab_size < model.config.vocab_size
    assert {part["status"] for part in report.parts.values()} == {"passed"}

    theirs = transformers_side.TheirTokenizer(tmp_path / "hf")
    probes = probe.texts(model.tokenizer, salads=50)
    assert [theirs.encode(text) for text in probes] == [model.tokenizer.encode(t) for t in probes]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("The old river 从前有一座山")]
    logits = transformers_side.TheirModel(tmp_path / "hf").logits(ids)
    ours = np.asarray(model.logits([ids]))[0, :, : logits.shape[1]]
    np.testing.assert_allclose(ours, logits, atol=1e-4 * np.abs(logits).max())

    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("The old river")["input_ids"][0] == model.tokenizer.bos_id
    import_model(tmp_path / "hf", tmp_path / "again")
    again = llm_jax.load(tmp_path / "again")
    np.testing.assert_allclose(np.asarray(again.logits([ids]))[0], ours, atol=1e-5)
    assert again.tokenizer.encode("从前 a") == model.tokenizer.encode("从前 a")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_export_and_a_half_precision_import_pass_the_gate(dtype, tmp_path):
    folder = tmp_path / "hf"
    hf_folders.write(folder, hf_folders.LLAMA)
    sentencepiece_bytes().save(folder)
    import_model(folder, tmp_path / "ours")
    model = llm_jax.load(tmp_path / "ours")
    report = export.export_model(model, tmp_path / "half", ExportConfig(dtype=dtype))
    assert report.parts["logits"]["max_relative"] < 1e-4
    assert not report.parts["round_trip"]["bitwise"]
    back = import_model(tmp_path / "half", tmp_path / "back")
    assert back.parts["logits"]["max_relative"] < 1e-4
    assert back.parts["round_trip"]["bitwise"]
    held = "bfloat16" if dtype == "bfloat16" else "float32"
    assert llm_jax.load(tmp_path / "back").config.param_dtype == held
    rounded = import_model(folder, tmp_path / "rounded", param_dtype="bfloat16")
    assert not rounded.parts["round_trip"]["bitwise"]
    assert jax.tree.leaves(llm_jax.load(tmp_path / "rounded").params)[0].dtype == "bfloat16"
    assert json.loads((tmp_path / "rounded/parity.json").read_text())["parts"]["logits"]
