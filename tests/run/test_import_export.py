"""`llm-jax import` and `llm-jax export` on tiny folders, without torch: round trips, gates, one-line errors."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.checkpoint import read_meta, save_model
from llm_jax.checkpoint.hf_export import ExportConfig
from llm_jax.config import to_dict
from llm_jax.errors import CheckpointError, ConfigError, DataError
from llm_jax.model import ModelConfig, init_params
from llm_jax.run import cli, export, gate, hf_files, verify
from llm_jax.run.import_model import import_model
from llm_jax.tokenizer import TokenizerTrainConfig, train
from llm_jax.tokenizer.sentencepiece import ModelProto, SentencePieceTokenizer
from tests.checkpoint import hf_folders
from tests.checkpoint.hf_folders import BFLOAT16, GPT2, LLAMA
from tests.tiny_text import byte_level, older_files, sentencepiece_bytes

importing = importlib.import_module("llm_jax.run.import")  # `import` is no name in Python
ROOT = Path(__file__).parents[2]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source_folder(folder, config=LLAMA, tokenizer=None, **settings):
    """A Hugging Face folder with its tokenizer, template and generation config."""
    hf_folders.write(folder, config, **settings)
    if tokenizer:
        tokenizer.save(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
        (folder / "generation_config.json").write_text(
            json.dumps({"temperature": 0.6, "eos_token_id": [2, 5], "bos_token_id": 1})
        )
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(source, model folder, export) of a Llama with a SentencePiece tokenizer, in two files."""
    root = tmp_path_factory.mktemp("llama")
    source_folder(root / "hf", tokenizer=sentencepiece_bytes(), shards=2)
    assert cli.run(importing.main, [str(root / "hf"), str(root / "ours")]) == 0
    words = [str(root / "ours"), str(root / "back"), "--max-shard-size", "60KB"]
    assert cli.run(export.main, words) == 0
    return root / "hf", root / "ours", root / "back"


def test_export_gives_back_every_tensor_bit_for_bit(imported):
    source, _, back = imported
    assert hf_folders.equal(hf_folders.read(source), hf_folders.read(back))
    index = read_json(back / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in hf_folders.read(back).values())
    assert len(set(index["weight_map"].values())) > 2


def test_parity_json_names_every_part_and_what_could_not_run(imported):
    _, ours, back = imported
    for folder, command in [(ours, "import"), (back, "export")]:
        report = read_json(folder / "parity.json")
        assert report["command"] == command
        assert tuple(report["parts"]) == gate.ALL_PARTS
        parts = report["parts"]
        assert parts["tensors"]["used"] == len(hf_folders.read(back))
        assert parts["round_trip"] == {"status": "passed", "bitwise": True, "tensors": 30}
        for part in parts.values():
            assert part["status"] == "passed" or part["why"]
        english = parts["bits_per_character"]["english"]
        assert 0 < english["bits_per_character"] < 2 * english["uniform"]


def test_an_imported_model_verifies_loads_scores_and_generates(imported):
    _, ours, _ = imported
    assert cli.run(verify.main, [str(ours), "--quiet"]) == 0
    model = llm_jax.load(ours)
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 336)
    assert model.score(["A line."])[0].nats > 0
    assert len(model.generate("The", max_new_tokens=3, temperature=0)) == 1
    meta = read_meta(ours)
    assert meta["family"] == "llama"
    assert len(meta["source"]["files"]) == 3


def test_a_sentencepiece_model_is_exported_in_both_forms_with_the_same_ids(imported):
    source, _, back = imported
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert (back / "tokenizer.json").is_file()
    converted = read_json(back / "parity.json")["parts"]["tokenizer"]["converted"]
    assert converted["different"] == 0
    assert converted["texts"] > 1500
    assert (back / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_special_tokens_agree_in_all_four_places(imported):
    _, _, back = imported
    tokenizer = sentencepiece_bytes()
    for name in ("config.json", "generation_config.json"):
        data = read_json(back / name)
        assert data["bos_token_id"] == tokenizer.bos_id
        assert data["eos_token_id"] == [2, 5], "a source that stops at several keeps them"
        assert data["pad_token_id"] == tokenizer.pad_id
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        data = read_json(back / name)
        pieces = [data[f"{role}_token"] for role in ("bos", "eos", "pad", "unk")]
        assert pieces == ["<s>", "</s>", "<pad>", "<unk>"]
    assert read_json(back / "generation_config.json")["temperature"] == 0.6
    said = {"eos": {"config.json": 2, "generation_config.json": 3, "tokenizer_config.json": 2}}
    assert hf_files.disagreements(said) == [
        "eos: config.json 2, generation_config.json 3, tokenizer_config.json 2"
    ]


def test_a_folder_of_vocab_json_and_merges_txt_brings_its_tokenizer(tmp_path, capsys):
    source_folder(tmp_path / "hf", GPT2, dtype=BFLOAT16)
    for name, content in older_files().items():
        (tmp_path / "hf" / name).write_bytes(content)
    words = [str(tmp_path / "hf"), str(tmp_path / "ours"), "--no-logits"]
    assert cli.run(importing.main, words) == 0
    part = read_json(tmp_path / "ours/parity.json")["parts"]["tokenizer"]
    assert (part["status"], part["ids"]) == ("passed", 300)
    assert llm_jax.load(tmp_path / "ours").tokenizer.encode("The") == byte_level().encode("The")
    words = [str(tmp_path / "ours"), str(tmp_path / "back"), "--no-logits"]
    assert cli.run(export.main, words) == 0
    assert (tmp_path / "back/tokenizer.json").is_file()
    (tmp_path / "hf/merges.txt").write_text("no\n")
    assert cli.run(importing.main, [str(tmp_path / "hf"), str(tmp_path / "again")]) == 2
    assert "merges.txt:1: 'no' is no pair of pieces" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_model_without_tokenizer_has_logits_and_says_why_it_has_no_text(tmp_path, capsys):
    source_folder(tmp_path / "hf", GPT2, dtype=BFLOAT16)
    assert cli.run(importing.main, [str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    parts = read_json(tmp_path / "ours/parity.json")["parts"]
    assert parts["tokenizer"]["status"] == "not run"
    assert "no tokenizer.json" in parts["tokenizer"]["why"]
    model = llm_jax.load(tmp_path / "ours")
    assert model.config.param_dtype == "bfloat16"
    assert model.logits([[1, 2]]).shape == (1, 2, 300)
    for use in (lambda: model.generate("a"), lambda: model.score("a")):
        with pytest.raises(CheckpointError, match="imported without a tokenizer"):
            use()
    words = [str(tmp_path / "ours"), str(tmp_path / "back"), "--no-logits"]
    assert cli.run(export.main, words) == 0
    assert hf_folders.equal(hf_folders.read(tmp_path / "hf"), hf_folders.read(tmp_path / "back"))
    parts = read_json(tmp_path / "back/parity.json")["parts"]
    assert parts["logits"] == {"status": "not run", "why": "--no-logits was given"}
    assert "--no-logits was given" in capsys.readouterr().out


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model of our own whose embedding has 384 rows for a tokenizer of 330."""
    folder = tmp_path_factory.mktemp("own") / "model"
    config = ModelConfig(
        vocab_size=384, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
        max_seq_len=64,
    )  # fmt: skip
    tokenizer = sentencepiece_bytes()
    meta = {
        "config": {"model": to_dict(config)},
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    save_model(folder, params, meta, tokenizer.files)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_padding_is_trimmed_and_values_are_rounded_as_asked(padded, tmp_path, dtype):
    model = llm_jax.load(padded)
    report = export.export_model(model, tmp_path / "out", ExportConfig(dtype=dtype), skip="a test")
    config = read_json(tmp_path / "out/config.json")
    assert config["vocab_size"] == 330
    assert config["dtype"] == dtype
    assert report.parts["round_trip"]["bitwise"] is (dtype == "float32")
    wanted = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    expected = np.asarray(model.params["embedding"])[:330].astype(wanted)
    found = hf_folders.read(tmp_path / "out")["model.embed_tokens.weight"]
    assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())
    again = import_model(tmp_path / "out", tmp_path / "again", skip="a test")
    assert again.parts["round_trip"]["status"] == "passed"


def test_a_byte_level_tokenizer_goes_through_unchanged(tmp_path):
    source_folder(tmp_path / "hf", GPT2, tokenizer=byte_level())
    import_model(tmp_path / "hf", tmp_path / "ours", skip="a test")
    export.export_model(
        llm_jax.load(tmp_path / "ours"), tmp_path / "back", ExportConfig(), skip="x"
    )
    name = "tokenizer.json"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert "bos_token" in read_json(tmp_path / "back/tokenizer_config.json")


def test_a_tokenizer_whose_json_would_give_other_ids_is_not_exported():
    """All scores zero, as vocabularies are extended by hand: the libraries break ties differently."""
    text = Path(hf_files.__file__).read_text(encoding="utf-8")
    made = train(TokenizerTrainConfig(vocab_size=700, threads=1), [text])
    proto = ModelProto.FromString(made.files["tokenizer.model"])
    for piece in proto.pieces:
        piece.score = 0.0
    tied = SentencePieceTokenizer({"tokenizer.model": proto.SerializeToString()})
    assert "tokenizer.json" in hf_files.tokenizer_for_export(made, made.files, 64)[0]
    with pytest.raises(
        DataError, match=r"probe texts differ, first .*; export with --no-tokenizer"
    ):
        hf_files.tokenizer_for_export(tied, tied.files, 64)


def hostile(folder, case):
    source_folder(folder, tokenizer=sentencepiece_bytes())
    config = read_json(folder / "config.json")
    if case == "code":
        config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    if case == "tokenizer":
        config["vocab_size"] = 320
        hf_folders.write(folder, config)
    if case == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if case == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-1])
    if case == "damaged tokenizer":
        (folder / "tokenizer.model").write_bytes(b"nonsense")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("code", "auto_map"),
        ("tokenizer", "the tokenizer has 330 ids, but the embedding 320 rows"),
        ("pickle", "pickle"),
        ("truncated", "truncated"),
        ("damaged tokenizer", "SentencePiece"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(case, said, tmp_path, capsys):
    hostile(tmp_path / "hf", case)
    assert cli.run(importing.main, [str(tmp_path / "hf"), str(tmp_path / "out/ours")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_check_that_fails_ends_the_command_and_leaves_no_output(tmp_path, capsys, monkeypatch):
    """One changed number between writing and reading: the disk, or a bug in a name table."""
    source_folder(tmp_path / "hf")
    from llm_jax.checkpoint import hf_import

    def read_wrong(source, shardings=None):
        params = read(source, shardings)
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].multiply(1.001)
        return params

    read = hf_import.read_params
    monkeypatch.setattr(hf_import, "read_params", read_wrong)
    assert cli.run(importing.main, [str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert "parity check 'round_trip' failed: ['model.norm.weight'] differ" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (importing.main, ["none", "OUT"], "none: no such folder"),
        (importing.main, ["PADDED", "OUT"], "a run of llm-jax already; use it as it is"),
        (
            importing.main,
            ["PADDED/meta.json", "OUT"],
            "is a file; give a Hugging Face model folder",
        ),
        (importing.main, ["", "OUT"], "HF_DIR is empty"),
        (importing.main, ["none", "OUT", "--param-dtype", "bf16"], "--param-dtype='bf16' must be"),
        (importing.main, ["none", "PADDED"], "exists already"),
        (export.main, ["none", "OUT"], "does not exist"),
        (export.main, ["PADDED", "PADDED"], "exists already"),
        (export.main, ["PADDED", "OUT", "--dtype", "int8"], "dtype='int8'"),
        (export.main, ["PADDED", "OUT", "--max-shard-size", "big"], "such as 5GB"),
        (export.main, ["PADDED", "OUT", "--max-shard-size", "9" * 5000], "such as 5GB"),
        (export.main, ["PADDED", "OUT", "--step", "-5"], "step=-5 must be 0 or above"),
        (export.main, ["PADDED", "PADDED/meta.json/out"], "meta.json is no folder"),
        (importing.main, ["none", "PADDED/meta.json/out"], "meta.json is no folder"),
        (export.main, ["PADDED", "OUT", "--dtyp", "x"], "--dtype"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(padded, tmp_path, main, words, said, capsys):
    out = tmp_path / "out"
    given = [word.replace("PADDED", str(padded)).replace("OUT", str(out)) for word in words]
    assert cli.run(main, given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert len(error) < 400
    assert not out.exists()


def test_a_hub_name_without_the_hub_is_one_line(tmp_path, monkeypatch):
    from llm_jax.run.import_model import local_folder

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"org/model: no such folder.*(hub|network)"):
        local_folder("org/model")


def test_both_verbs_are_programs_of_their_own():
    for verb in ("import", "export"):
        done = subprocess.run(
            [sys.executable, "-m", f"llm_jax.run.{verb}", "nothing", "out"], cwd=ROOT, check=False,
            capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("error: nothing")
