"""`llm_jax.load`, `llm-jax generate` and `llm-jax eval` on a saved tiny model."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.checkpoint import save_model
from llm_jax.config import to_dict
from llm_jax.data.prepare import PrepareConfig, prepare
from llm_jax.data.sources import parse_source_spec
from llm_jax.errors import CheckpointError, ConfigError, DataError
from llm_jax.model import init_params
from llm_jax.run import cli, eval, generate
from tests.tiny import LLAMA
from tests.tiny_text import CHINESE, ENGLISH, byte_level, sentencepiece_bytes

CONFIG = dataclasses.replace(LLAMA, vocab_size=336)


@functools.cache
def params():
    return jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def save(folder, tokenizer, **changes):
    """A model folder as training or an import leaves it."""
    files = folder.with_name(folder.name + "-tokenizer")
    tokenizer.save(files)
    meta = {
        "config": {"model": to_dict(CONFIG)},
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **changes,
    }
    save_model(folder, params(), meta, {f.name: f.read_bytes() for f in files.iterdir()})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "tiny", sentencepiece_bytes())


@pytest.fixture(scope="module")
def model(folder):
    return llm_jax.load(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two sources with held-out documents."""
    root = tmp_path_factory.mktemp("data")
    sentencepiece_bytes().save(root / "tokenizer")
    sources = []
    for name, lines in {"en": ENGLISH, "zh": CHINESE}.items():
        texts = [json.dumps({"text": f"{n} {text}"}) for n in range(8) for text in lines]
        (root / f"{name}.jsonl").write_text("\n".join(texts), encoding="utf-8")
        sources.append(parse_source_spec(str(root / f"{name}.jsonl")))
    config = PrepareConfig(
        sources=tuple(sources),
        tokenizer=str(root / "tokenizer"),
        output=str(root / "prepared"),
        holdout_fraction=0.3,
    )
    return prepare(config)


def test_a_loaded_model_gives_logits_of_plain_rows(model):
    logits = model.logits([[1, 5, 9], [1, 7, 8]])
    assert logits.shape == (2, 3, 336)
    np.testing.assert_allclose(logits[:1], model.logits(np.array([[1, 5, 9]])), atol=1e-5)
    for bad, said in [([1, 2], r"\[B, T\]"), ([[1, 336]], "from 0 to 335"), ([[0.5]], "float")]:
        with pytest.raises(DataError, match=said):
            model.logits(bad)


def test_a_score_is_the_log_probability_that_the_logits_give(model):
    texts = ["The sky.", "a", "语言"]
    scores = model.score(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
        logs = jax.nn.log_softmax(model.logits([ids])[0])
        expected = -sum(float(logs[at, ids[at + 1]]) for at in range(len(ids) - 1))
        assert score.nats == pytest.approx(expected, rel=1e-5)
        assert (score.tokens, score.characters) == (len(ids) - 1, len(text))
        assert score.bytes == len(text.encode())
    assert model.score([]) == []
    with pytest.raises(DataError, match="text 1 is empty"):
        model.score(["a", ""])


def test_a_loaded_model_generates_with_settings_by_name(model):
    (one,) = model.generate("The", max_new_tokens=5, temperature=0)
    assert one.finished in ("eos", "length")
    assert model.generate(["The"], max_new_tokens=5, temperature=0) == [one]
    with pytest.raises(ConfigError, match="temprature"):
        model.generate("The", temprature=0)


def test_what_is_not_a_model_or_holds_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        llm_jax.load(tmp_path / "nothing")
    other = save(tmp_path / "other", sentencepiece_bytes(), tokenizer_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="is not the tokenizer the model was trained with"):
        llm_jax.load(other)
    bare = save(tmp_path / "bare", sentencepiece_bytes(), config={})
    with pytest.raises(CheckpointError, match="holds no model config"):
        llm_jax.load(bare)
    odd = save(tmp_path / "odd", sentencepiece_bytes(), config={"model": {"layers": 3}})
    with pytest.raises(CheckpointError, match=r"unknown setting 'model\.layers'"):
        llm_jax.load(odd)


def test_generate_prints_the_prompt_and_its_continuation(folder, model, capsys):
    flags = ["--max-new-tokens", "12", "--temperature", "0"]
    generate.main([str(folder), "--prompt", "The [red] sky", *flags])
    (expected,) = model.generate("The [red] sky", max_new_tokens=12, temperature=0)
    assert capsys.readouterr().out == f"The [red] sky{expected.text}\n"


def test_generate_labels_the_blocks_of_several_prompts(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("\ufeff从前", encoding="utf-8")
    generate.main(
        [str(folder), "--prompt", "The", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "4"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "prompt 0: " in out
    assert "prompt 1: " in out
    assert "\n从前" in out


def test_eval_writes_every_source_with_baselines_beside_the_model(folder, prepared, capsys):
    eval.main([str(folder), "--data", str(prepared.folder), "--baselines", "--seq-len", "32"])
    shown = capsys.readouterr().out
    report = json.loads((folder / "eval.json").read_text())
    assert str(folder / "eval.json") in shown
    assert set(report["results"]) == {"en", "zh", "total"}
    for name in ("en", "zh"):
        split = prepared.sources[name]["heldout"]
        found = report["results"][name]
        assert found["documents"] == split.num_documents > 1
        assert found["characters"] == split.num_characters
        assert found["bytes"] == split.num_bytes
        assert found["tokens"] == split.num_tokens - 2 * split.num_documents, "no BOS, no EOS"
        low, high = found["bits_per_character_interval"]
        assert low < found["bits_per_character"] < high
        baselines = report["baselines_bits_per_character"][name]
        assert baselines["xz_primed"] < baselines["xz"]
        assert baselines["trigram"] < 3, "the held-out lines differ from training ones by a number"
        assert f"{found['bits_per_character']:.4f}" in shown
    assert report["config"]["seq_len"] == 32


def test_eval_reads_raw_text_and_writes_where_it_is_told(folder, tmp_path):
    (tmp_path / "story.txt").write_text(ENGLISH[0], encoding="utf-8")
    out = tmp_path / "scores.json"
    eval.main(
        [str(folder), "--text", f"story={tmp_path / 'story.txt'}", "--out", str(out), "--baselines"]
    )
    report = json.loads(out.read_text())
    assert report["results"]["story"]["characters"] == len(ENGLISH[0].rstrip("\n"))
    assert report["results"]["story"]["bits_per_byte_interval"] == [None, None]
    assert set(report["baselines_bits_per_character"]["story"]) == {"xz"}


def test_eval_refuses_data_of_another_tokenizer_in_one_line(folder, tmp_path, capsys):
    byte_level().save(tmp_path / "tokenizer")
    (tmp_path / "en.jsonl").write_text(json.dumps({"text": ENGLISH[0]}), encoding="utf-8")
    config = PrepareConfig(
        sources=(parse_source_spec(str(tmp_path / "en.jsonl")),),
        tokenizer=str(tmp_path / "tokenizer"),
        output=str(tmp_path / "prepared"),
    )
    prepare(config)
    assert cli.run(eval.main, [str(folder), "--data", str(tmp_path / "prepared")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'prepared'}: prepared with tokenizer ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (generate.main, ["MODEL", "--temperature", "-1"], "sampling.temperature=-1.0"),
        (generate.main, ["MODEL", "--prompt-file", "none.txt"], "none.txt"),
        (generate.main, ["MODEL", "--promt", "x"], "--prompt"),
        (eval.main, ["MODEL"], "--data FOLDER, --text SOURCE and --tasks FILE"),
        (eval.main, ["MODEL", "--text", "missing.txt"], "missing.txt"),
        (eval.main, ["MODEL", "--data", "MODEL"], "no prepared data"),
        (eval.main, ["MODEL", "--data", "x", "--seq-len", "4", "--stride", "8"], "eval.stride=8"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(folder, main, arguments, said, capsys):
    words = [str(folder) if word == "MODEL" else word for word in arguments]
    assert cli.run(main, words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
