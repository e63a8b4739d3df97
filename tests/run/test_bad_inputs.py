"""What users get wrong: each mistake is one line that names field, value, rule and remedy, exit status 2,
and nothing half-written; or it is counted and reported, where the design says so."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm_jax.data.shards import open_prepared
from llm_jax.run import cli, data, eval, generate, pretrain, tokenizer, verify
from llm_jax.tokenizer import TokenizerTrainConfig, load, train
from tests.run.conftest import english_documents, write_jsonl
from tests.run.tiny_runs import CONFIG, Run

GOOD = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in english_documents(20))
MAINS = {
    "data": data.main, "tokenizer": tokenizer.main, "pretrain": pretrain.main,
    "eval": eval.main, "generate": generate.main, "verify": verify.main,
}  # fmt: skip


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; its exit status, stdout and stderr without log lines."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(MAINS[str(words[0])], [str(word) for word in words[1:]])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if not line.startswith("INFO ")]
        return status, shown.out, "\n".join(lines)

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must refuse; the line it says."""

    def run(*words: str | Path) -> str:
        before = sorted(Path.cwd().rglob("*"))
        status, _, error = command(*words)
        assert status == 2, error
        assert error.startswith("error: ")
        assert "\n" not in error
        assert sorted(Path.cwd().rglob("*")) == before, "something was left behind"
        return error

    return run


# ---- records of a source -------------------------------------------------------------------------

BAD_RECORDS = {
    "broken JSON": (b'{"text": "one"', "not valid JSON"),
    "two objects on a line": (b'{"text": "one"}{"text": "two"}', "not valid JSON"),
    "bad UTF-8": (b'{"text": "caf\xe9"}', "not valid UTF-8"),
    "a list": (b'["one"]', "not a JSON object"),
    "another field": (b'{"txt": "one"}', "no field 'text'"),
    "a number for a text": (b'{"text": 3}', "text is not a string"),
    "no text": (b'{"text": null}', "text is not a string"),
    "an empty text": (b'{"text": " \\n"}', "empty text"),
    "deep nesting": (b'{"text": ' + b"[" * 50_000, "JSON nested too deep"),
    "an endless number": (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "JSON number too long"),
}


def prepare_words(tokenizer: Path, *words: str) -> tuple:
    return ("data", "prepare", "--tokenizer", tokenizer, "--output", "out", *words)


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_is_named_and_stops_or_is_counted(refused, command, tiny_tokenizer, kind):
    record, reason = BAD_RECORDS[kind]
    Path("a.jsonl").write_bytes(GOOD + record + b"\n")
    words = prepare_words(tiny_tokenizer, "--source", "a.jsonl")
    error = refused(*words)
    assert "source 'a': 1 of 21 records rejected, more than max_reject_fraction=0.001" in error
    assert f"{reason!r} (1), first at a.jsonl:21" in error.replace('"', "'").replace(
        "\\'", "'"
    ) or (reason in error and "a.jsonl:21" in error)
    status, out, _ = command(*words, "--max-reject-fraction", "0.1")
    assert status == 0
    assert reason in out
    rejects = open_prepared("out").manifest["sources"]["a"]["rejects"]
    assert rejects == {"records": 21, "rejected": {reason: 1}, "repaired": {}}
    (sample,) = map(json.loads, Path("out/rejects.jsonl").read_text("utf-8").splitlines())
    assert sample["place"] == "a.jsonl:21"


HARMLESS = {
    "a byte order mark": (b'\xef\xbb\xbf{"text": "one two"}\n', "one two", {}),
    "Windows line ends": (b'{"text": "one two"}\r\n', "one two", {}),
    "no last line end": (b'{"text": "one two"}', "one two", {}),
    "U+2028 and U+0085 in a text": (
        '{"text": "one\u2028two\x85three"}\n'.encode(),
        "one\u2028two\x85three",
        {},
    ),
    "a lone surrogate": (
        b'{"text": "one \\ud800 two"}\n',
        "one ? two",
        {"lone surrogate replaced by '?'": 1},
    ),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_oddity_is_kept_or_repaired_and_counted(command, tiny_tokenizer, kind):
    content, text, repaired = HARMLESS[kind]
    Path("a.jsonl").write_bytes(content)
    status, _, error = command(*prepare_words(tiny_tokenizer, "--source", "a.jsonl"))
    assert status == 0, error
    prepared = open_prepared("out")
    assert prepared.manifest["sources"]["a"]["rejects"]["repaired"] == repaired
    (split,) = [split for split in prepared.sources["a"].values() if split.num_documents]
    assert load(prepared.tokenizer_folder).decode(split.document(0).tolist()) == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "source 'a' holds no records; give a path with text in it"),
        (b"\n \n", "source 'a' holds no records"),
        (b'{"txt": "a"}\n' * 3, "3 of 3 records rejected, none is usable"),
    ],
)
def test_a_file_without_text_is_refused(refused, tiny_tokenizer, content, said):
    Path("a.jsonl").write_bytes(content)
    assert said in refused(*prepare_words(tiny_tokenizer, "--source", "a.jsonl"))


def test_a_text_file_that_is_not_utf_8_is_refused_with_its_line(refused, tiny_tokenizer):
    Path("a.txt").write_bytes(b"one\ntwo caf\xe9\n")
    error = refused(*prepare_words(tiny_tokenizer, "--source", "a.txt"))
    assert "not valid UTF-8" in error
    assert "a.txt:2" in error


def test_a_torn_compressed_file_is_refused(refused, tiny_tokenizer):
    import gzip

    Path("a.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-20])
    error = refused(*prepare_words(tiny_tokenizer, "--source", "a.jsonl.gz"))
    assert "a.jsonl.gz: damaged gzip file" in error


# ---- words of a command --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data prepare --tokenizer TOKENIZER --output out --source empty", "path 'empty' is an empty folder; give one with text in it"),
        ("data prepare --tokenizer TOKENIZER --output out --source none.txt", "none.txt.*does not exist"),
        ("data prepare --tokenizer none --output out --source a.jsonl", "none: no such file; .*llm-jax tokenizer train"),
        ("data prepare --tokenizer empty --output out --source a.jsonl", "empty: .*tokenizer"),
        ("data prepare --tokenizer a.jsonl --output out --source a.jsonl", "a.jsonl: .*tokenizer"),
        ("data prepare --tokenizer TOKENIZER --output full --source a.jsonl", "full.*already exists.*--overwrite"),
        ("data prepare --tokenizer TOKENIZER --output full --overwrite --source a.jsonl", "full exists and is not prepared data; it will not be overwritten"),
        ("data prepare --tokenizer TOKENIZER --output out --source a.jsonl --holdout-fraction 2", "holdout_fraction=2.0 must be between 0 and 0.5"),
        ("data prepare --tokenizer TOKENIZER --output out --source a.jsonl --source a.jsonl", "'a' occurs twice"),
        ("data prepare --tokenizer TOKENIZER --output out --sorce a.jsonl", "arguments are required: --source"),
        ("data inspect full", "full: holds no prepared data"),
        ("tokenizer train --input a.jsonl --output out --vocab-size 100000", "vocab_size=100000 is more than"),
        ("tokenizer train --input a.jsonl --output out --vocab-size 20", "vocab_size=20"),
        ("tokenizer train --input none.txt --output out", "none.txt"),
        ("tokenizer train --input a.jsonl --output TOKENIZER", "already holds tokenizer.model.*--overwrite"),
        ("tokenizer info full", "full: .*tokenizer"),
        ("generate none", "none does not exist; give a run folder"),
        ("generate full", "full holds no model"),
        ("generate a.jsonl", "a.jsonl holds no model"),
        ("generate MODEL --step 3", "no checkpoint of step 3; it has"),
        ("generate MODEL --temperature -1", "sampling.temperature=-1.0 must be 0 .greedy. or above"),
        ("generate MODEL --temperature hot", "--temperature.*'hot'"),
        ("generate MODEL --top-p 0", "sampling.top_p=0.0 must be above 0"),
        ("generate MODEL --max-new-tokens 0", "sampling.max_new_tokens=0 must be at least 1"),
        ("generate MODEL --prompt-file none.txt", "none.txt: No such file"),
        ("generate MODEL --prompt-file binary", "binary: not UTF-8 at byte 0"),
        ("generate MODEL --temprature 1", "did you mean '--temperature'"),
        ("eval MODEL", "--data FOLDER, --text SOURCE and --tasks FILE"),
        ("eval MODEL --text none.txt", "none.txt"),
        ("eval MODEL --data full", "full: holds no prepared data"),
        ("eval full --data PREPARED", "full holds no model"),
        ("verify full", "full holds no model"),
        ("verify none", "none does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_word_on_the_command_line_is_refused(
    refused, straight, tiny_tokenizer, two_sources, words, said
):
    Path("a.jsonl").write_bytes(GOOD)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/diary.md").write_text("not yours")
    places = {"TOKENIZER": tiny_tokenizer, "MODEL": straight.folder, "PREPARED": two_sources}
    error = refused(*(places.get(word, word) for word in words.split()))
    assert re.search(said, error)


# ---- the config of a run -------------------------------------------------------------------------


@pytest.fixture
def pretrain_refused(refused, two_sources):
    """`pretrain` on the tiny config and data, in a run folder that must not come to be."""

    def run(*words: str | Path) -> str:
        return refused("pretrain", CONFIG, "--run", "run", "--data.prepared", two_sources, *words)

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.num-layer 3", "unknown setting --model.num-layer: no 'num_layer'; did you mean 'num_layers'?"),
        ("--modle.num-layers 3", "did you mean 'model'?"),
        ("--train.steps", "--train.steps needs a value"),
        ("--train.steps ten", "--train.steps='ten' must be a number of type int"),
        ("--train.steps 1.5", "--train.steps='1.5' must be a whole number"),
        ("--train.steps inf", "--train.steps='inf' must be a finite number"),
        ("--train.steps 0", "train.steps=0 must be at least 1"),
        ("--optimizer.peak-lr nan", "--optimizer.peak-lr='nan' must be a finite number"),
        ("--optimizer.peak-lr -1", "optimizer.peak_lr=-1.0 must be above 0"),
        ("--optimizer.eps 0", "optimizer.eps=0.0 must be above 0"),
        ("--optimizer.warmup-steps 80", "optimizer.warmup_steps=80 must be below train.steps=80"),
        ("--optimizer.schedule cosin", "did you mean 'cosine'?"),
        ("--model.num-heads 3", "model.num_heads=3 must be a multiple of model.num_kv_heads=2"),
        ("--model.head-dim 7", "model.head_dim=7 rotates 7 dimensions; the number must be even"),
        ("--model.rope-theta 0", "model.rope_theta=0.0 must be above 0"),
        ("--model.vocab-size 100", "model.vocab_size=100 must be at least 360"),
        ("--data.seq-len 128", "data.seq_len=128 must not exceed model.max_seq_len=64"),
        ("--data.packing bestfit", "data.packing='bestfit' must be one of"),
        ("--data.sources.0.name fr", "'fr' is not in"),
        ("--data.sources.0.weight -1", "weight=-1.0 of 'en' must be >= 0"),
        ("--data.sources [{\"name\":\"en\",\"weight\":0}]", "every weight is 0; give one of them"),
        ("--data.prepared none", "none: holds no prepared data (no manifest.json); make it with `llm-jax data prepare`"),
        ("--mesh.data 3", "mesh data=3 x fsdp=-1 x tensor=1 x context=1 does not fit 1 device(s)"),
        ("--step.batch-size 9 --step.micro-batches 2", "step.batch_size=9 must be a multiple of step.micro_batches=2"),
        ("--eval.seq-len 8 --eval.stride 9", "eval.stride=9 must be at most eval.seq_len=8"),
        ("--samples.temperature -1", "samples.temperature=-1.0 must be 0 (greedy) or above"),
        ("--train.seed -1", "train.seed=-1 must be from 0 to 4294967295"),
        ("--checkpoint.keep-last 0", "checkpoint.keep_last=0 must be at least 1"),
        ("--run /dev/null/run", "/dev/null/run: cannot be made a run folder: /dev/null is no folder"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_before_anything_is_written(pretrain_refused, words, said):
    assert said in pretrain_refused(*words.split(" "))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.py", b"def config(:\n", "a.py: SyntaxError: invalid syntax"),
        ("a.py", b"x = 1\n", "a.py: must define a function config() that returns a PretrainConfig"),
        ("a.py", b"config = 3\n", "a.py: TypeError: 'int' object is not callable"),
        ("a.py", b"def config():\n    return 3\n", "config() returned a int, but this command needs a PretrainConfig"),
        ("a.py", b"import nothing_here\n", "a.py:1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("a.py", b"def config():\n    raise ValueError('one\\ntwo')\n", "a.py:2: ValueError: one two"),
        ("a.py", b"raise SystemExit('no')\n", "a.py:1: SystemExit: no"),
        ("a.py", b"\xff\xfe\n", "a.py: SyntaxError: (unicode error)"),
        ("a.json", b"{", "a.json:1: not valid JSON"),
        ("a.json", b"\xff", "a.json: not UTF-8 at byte 0; save it as UTF-8"),
        ("a.json", b"[" * 50_000, "a.json: not a config: JSON nested too deep"),
        ("a.json", b"[]", "a.json: must hold a JSON object"),
        ("a.json", b'{"config": "EvalConfig"}', "a.json: holds a EvalConfig, but this command needs a PretrainConfig"),
        ("a.json", b'{"run": "x"}', "data is missing; it has no default"),
        ("a.json", b'\xef\xbb\xbf{"run": "x", "modle": {}}', "unknown setting 'modle'; did you mean 'model'?"),
        ("a.json", b'{"run": "x", "optimizer": {"peak_lr": NaN}}', "optimizer.peak_lr=nan must be a finite number"),
        ("a.json", b'{"run": "x", "train": {"steps": "9"}}', "train.steps='9' must be of type int, not str"),
        ("a.yaml", b"run: x\n", "'a.yaml' must end in .py or .json"),
    ],
)  # fmt: skip
def test_a_config_file_that_is_none_is_refused(refused, name, content, said):
    Path(name).write_bytes(content)
    assert said in refused("pretrain", name)


def test_a_config_file_that_is_not_there_is_refused(refused):
    assert "'none.py' does not exist; see configs/" in refused("pretrain", "none.py")
    assert "required: CONFIG" in refused("pretrain")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "LLM_JAX_PROCESSES and LLM_JAX_PROCESS_ID must be set to numbers"),
        ({"PROCESSES": "2", "PROCESS_ID": "one"}, "LLM_JAX_PROCESS_ID must be set to numbers"),
        ({"PROCESSES": "2", "PROCESS_ID": "2"}, "LLM_JAX_PROCESS_ID=2 must be from 0 to"),
    ],
)
def test_processes_that_are_not_numbered_rightly_are_refused(
    pretrain_refused, monkeypatch, environment, said
):
    for name, value in {"COORDINATOR": "127.0.0.1:1", **environment}.items():
        monkeypatch.setenv(f"LLM_JAX_{name}", value)
    assert said in pretrain_refused()


# ---- data, models and disks that are damaged or do not fit ---------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("en/train-00000.tokens.npy", r"bytes, but \d+ were written; put a good copy back"),
        ("zh/train-00000.documents.npy", r"bytes, but \d+ were written; put a good copy back"),
        ("manifest.json", "damaged manifest"),
        ("tokenizer/tokenizer.model", "not a SentencePiece model, or a damaged one"),
    ],
)
def test_prepared_data_with_a_truncated_file_is_refused(refused, two_sources, tmp_path, file, said):
    copy = tmp_path / "copy"
    shutil.copytree(two_sources, copy)
    truncate(copy / file)
    error = refused("pretrain", CONFIG, "--run", "run", "--data.prepared", copy)
    assert str((copy / file).parent) in error
    assert re.search(said, error)


def test_prepared_data_edited_by_hand_is_refused(refused, two_sources, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_sources, copy)
    manifest = (copy / "manifest.json").read_text("utf-8")
    vocabulary = '"vocab_size": 360'
    assert vocabulary in manifest
    (copy / "manifest.json").write_text(manifest.replace(vocabulary, '"vocab_size": 384'), "utf-8")
    error = refused("pretrain", CONFIG, "--run", "run", "--data.prepared", copy)
    assert "manifest.json: was changed after it was written; prepare the data again" in error


def test_a_shard_with_a_flipped_byte_is_named_by_inspect(refused, two_sources, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_sources, copy)
    path = copy / "zh/train-00000.tokens.npy"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    assert f"{path}: content differs" in refused("data", "inspect", copy, "--verify")


def test_data_of_another_tokenizer_is_refused_for_a_model(refused, command, straight, tmp_path):
    text = write_jsonl(tmp_path / "en.jsonl", english_documents(100, seed=2))
    other, prepared = tmp_path / "other", tmp_path / "prepared"
    words = ("tokenizer", "train", "--input", text, "--output", other, "--vocab-size", "300")
    assert command(*words)[0] == 0
    prepare = ("data", "prepare", "--source", text, "--tokenizer", other, "--output", prepared)
    assert command(*prepare)[0] == 0
    assert "prepared with tokenizer" in refused("eval", straight.folder, "--data", prepared)


def test_prepared_data_with_a_tokenizer_put_in_its_place_is_refused(refused, two_sources, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_sources, copy)
    shutil.rmtree(copy / "tokenizer")
    config = TokenizerTrainConfig(vocab_size=320, threads=1)
    train(config, english_documents(80)).save(copy / "tokenizer")
    error = refused("pretrain", CONFIG, "--run", "run", "--data.prepared", copy)
    assert "tokenizer: not the tokenizer that the data was prepared with (fingerprint " in error


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_kept(refused, straight, tmp_path):
    run = straight.copy(tmp_path)
    for step in run.saved():
        truncate(run.folder / "checkpoints" / step / "meta.json")
    saved = run.saved()
    error = refused("pretrain", *run.words())
    assert "no good checkpoint in" in error
    assert "meta.json is damaged" in error
    assert run.saved() == saved


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_and_others_are_offered(
    refused, straight, tmp_path
):
    run = straight.copy(tmp_path)
    newest = run.newest()
    truncate(run.folder / "checkpoints" / str(newest) / "meta.json")
    saved = run.saved()
    error = refused("pretrain", *run.words(), "--step", str(newest))
    assert "meta.json is damaged" in error
    assert error.endswith("leave --step out to go on from the newest good one")
    assert run.saved() == saved


def test_a_batch_that_does_not_divide_the_mesh_is_refused(new_run):
    run: Run = new_run()
    process = run.start("--step.batch-size", "6", devices=4)
    assert process.wait_for_end() == 2
    errors = process.errors().splitlines()
    assert errors == ["error: step.batch_size: batch=6 must be a multiple of mesh.fsdp=4"]
    assert not run.folder.exists()


def test_a_disk_that_takes_no_checkpoint_stops_the_run_after_three(new_run):
    """The kernel refuses to write files beyond 100 KB, as a full disk does in the middle of one."""
    run: Run = new_run()
    process = run.start("--checkpoint.keep-best", "0", largest_file=100_000)
    assert process.wait_for_end() == 2
    errors = process.errors()
    assert "Traceback" not in errors
    told = [line for line in errors.splitlines() if line.startswith(("ERROR llm_jax", "error"))]
    assert [re.findall(r"Failure (\d) in a row", line) for line in told[:2]] == [["1"], ["2"]]
    assert "File too large" in told[-1]
    assert told[-1].startswith("error: ")
    assert "3 saves in a row failed; step 12 could not be saved: " in told[-1]
    assert run.saved() == []
    assert process.step() >= 11
    assert sorted(os.listdir(run.folder)) == [
        *("checkpoints", "config.json", "env.json", "events.jsonl", "metrics.jsonl", "tokenizer"),
    ]
    assert np.isfinite([row["loss"] for row in run.metrics()]).all()


@pytest.mark.slow
def test_data_without_held_out_text_trains_and_is_not_evaluated(command, new_run, tiny_tokenizer):
    Path("en.jsonl").write_bytes(GOOD)
    words = prepare_words(tiny_tokenizer, "--source", "en.jsonl", "--holdout-fraction", "0")
    assert command(*words)[0] == 0
    run: Run = new_run()
    settings = ("--data.prepared", str(Path("out").absolute()), "--data.sources", "[]")
    process = run.start(*settings, "--train.steps", "6")
    assert process.wait_for_end() == 0, process.errors()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert run.newest() == 6
