"""`pretrain --init-from MODEL --model.lora.rank 4`, and its adapters on every way out and back in."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.checkpoint import read_meta
from llm_jax.checkpoint.hf_import import open_source, read_params
from llm_jax.run import cli, export, pretrain, verify
from llm_jax.run import eval as evaluate
from tests.run.test_continuation import write_base
from tests.run.tiny_runs import Run

importing = importlib.import_module("llm_jax.run.import")  # `import` is no name in Python
CONFIG = str(Path(__file__).with_name("tiny_continue.py"))
STEPS = 6
IDS = np.arange(24, dtype=np.int32).reshape(2, 12) * 13


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def words(two_sources):
    """The words of a run on data in the base's own vocabulary."""

    def make(folder: Path, base: Path, *more: str) -> list[str]:
        data = ["--run", str(folder), "--data.prepared", str(two_sources)]
        steps = ["--stages.new-rows-steps", "0", "--train.steps", str(STEPS)]
        return [CONFIG, *data, "--init-from", str(base), *steps, *more]

    return make


# a rate that moves even the model of `write_base`, whose norms let little through
LORA = ("--model.lora.rank", "4", "--step.neftune.alpha", "0.1", "--optimizer.peak-lr", "0.1")


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, words, two_sources, compiled) -> Run:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    assert cli.run(pretrain.main, words(folder, base, *LORA)) == 0
    return Run(folder, two_sources, compiled)


def test_adapters_alone_move_and_have_optimizer_state_and_the_base_stays_bitwise(run, base):
    was, saved = read_meta(base)["arrays"], run.arrays()
    assert {name: saved[name] for name in was} == was
    adapters = {name for name in saved if "_lora_" in name and name.startswith("params/")}
    assert len(adapters) == 2 * 7
    assert saved.keys() >= was.keys() | adapters
    moments = [name for name in saved if name.startswith("opt_state/") and saved[name]["shape"]]
    assert len(moments) == 2 * len(adapters)
    assert all("_lora_" in name for name in moments)
    held_out = [
        r["eval/bits_per_character"] for r in run.metrics() if "eval/bits_per_character" in r
    ]
    assert held_out[-1] < held_out[0] - 0.02


def test_a_run_with_adapters_and_noise_resumes_bitwise_and_keeps_its_rank(
    run, base, words, tmp_path, capsys
):
    again = run.copy(tmp_path)
    for step in (4, 6):
        shutil.rmtree(again.folder / "checkpoints" / str(step))
    assert cli.run(pretrain.main, words(again.folder, base, *LORA)) == 0
    assert again.arrays() == run.arrays()
    assert again.metrics() == run.metrics()
    capsys.readouterr()
    for change, message in (
        (("--model.lora.rank", "8"), "model.lora.rank was 4 at step 6 and is 8 now"),
        ((*LORA, "--stages.train", "adapters"), "stages.train was 'auto' at step 6 and is 'adapters'"),
    ):  # fmt: skip
        assert cli.run(pretrain.main, words(again.folder, base, *change)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_evaluates_generates_and_verifies_as_any_other(run, two_sources, capsys):
    assert cli.run(evaluate.main, [str(run.folder), "--data", str(two_sources)]) == 0
    assert cli.run(verify.main, [str(run.folder)]) == 0
    model = llm_jax.load(run.folder)
    assert model.generate(["The "], temperature=0.0, max_new_tokens=4)[0].ids
    assert "bits" in capsys.readouterr().out
    merged = model.merged()
    assert merged.config.lora.rank == 0
    np.testing.assert_allclose(merged.logits(IDS), model.logits(IDS), rtol=1e-5, atol=1e-5)


def test_export_merges_and_the_adapter_alone_goes_out_to_peft_and_comes_back(
    run, base, tmp_path, capsys
):
    model = llm_jax.load(run.folder)
    assert cli.run(export.main, [str(run.folder), str(tmp_path / "hf"), "--no-logits"]) == 0
    merged = read_params(open_source(tmp_path / "hf"))["layers"]["attention"]["query"]
    np.testing.assert_array_equal(merged, model.merged().params["layers"]["attention"]["query"])
    assert cli.run(export.main, [str(run.folder), str(tmp_path / "peft"), "--adapter"]) == 0
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text("utf-8"))
    assert (said["r"], said["lora_alpha"]) == (4, 16.0)
    assert "self_attn.q_proj" in said["target_modules"]
    words = [str(base), str(tmp_path / "ours"), "--adapter", str(tmp_path / "peft")]
    assert cli.run(importing.main, words) == 0
    back = llm_jax.load(tmp_path / "ours")
    assert back.config.lora == model.config.lora
    np.testing.assert_array_equal(back.logits(IDS), model.logits(IDS))
    assert cli.run(verify.main, [str(tmp_path / "ours")]) == 0
    parts = json.loads((tmp_path / "ours" / "parity.json").read_text("utf-8"))["parts"]
    assert [part["status"] for part in parts.values()] == ["passed", "passed"]
    capsys.readouterr()
    assert cli.run(export.main, [str(base), str(tmp_path / "none"), "--adapter"]) == 2
    assert "has no adapters; export it without --adapter" in capsys.readouterr().err
    words = [str(run.folder), str(tmp_path / "none"), "--adapter", "--dtype", "bfloat16"]
    assert cli.run(export.main, words) == 2
    assert "--dtype says nothing about an adapter" in capsys.readouterr().err
    assert cli.run(importing.main, [str(base), str(tmp_path / "none"), "--adapter", str(base)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


@pytest.mark.slow
def test_a_base_with_adapters_is_merged_and_frozen_weights_may_be_bfloat16(run, words, tmp_path):
    more = (
        "--model.param-dtype",
        "bfloat16",
        "--model.lora.targets",
        '["out"]',
        "--train.steps",
        "3",
    )
    assert cli.run(pretrain.main, words(tmp_path / "next", run.folder, *LORA, *more)) == 0
    meta = read_meta(tmp_path / "next" / "checkpoints" / "3")
    dtypes = {name: facts["dtype"] for name, facts in meta["arrays"].items() if "params/" in name}
    adapters = [name for name in dtypes if "_lora_" in name and name.startswith("params/")]
    assert sorted(adapters) == [f"params/layers/attention/out_lora_{x}" for x in "ab"]
    for name, dtype in dtypes.items():
        assert dtype == ("float32" if "_lora_" in name else "bfloat16"), name
    ended = run.metrics()[-1]["eval/bits_per_character"]
    began = meta["continuation"]["bits_per_character"]["base"]
    assert np.mean(list(began.values())) == pytest.approx(ended, rel=0.3)
    first = json.loads((tmp_path / "next" / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert first["eval/bits_per_character"] == pytest.approx(ended, rel=2e-3)


def test_adapters_without_a_base_and_bfloat16_that_would_be_trained_are_refused(
    base, words, tmp_path, capsys
):
    for more, message in (
        (("--init-from=", "--model.embed-dim", "32"), "puts adapters on frozen weights; give --init"),
        (("--model.lora.targets", '["qkv"]'), "model.lora.targets: 'qkv' is no projection"),
        (("--model.param-dtype", "bfloat16", "--model.lora.rank", "0"), "cannot be trained"),
        (("--stages.train", "all"), "stages.train='all' does not fit model.lora.rank=4"),
        (("--stages.train", "adapters_and_new_rows"), "but there are no new rows to train"),
    ):  # fmt: skip
        assert cli.run(pretrain.main, words(tmp_path / "run", base, *LORA, *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
