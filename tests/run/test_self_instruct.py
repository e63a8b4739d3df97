"""`llm-jax self-instruct`: on a stub server and on a tiny model, killed and resumed, and mistakes."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.checkpoint import save_model
from llm_jax.checkpoint.lock import RunLock
from llm_jax.config import to_dict
from llm_jax.instruct.self_instruct import endpoint
from llm_jax.instruct.self_instruct.novelty import rouge_l
from llm_jax.instruct.self_instruct.tasks import read_seeds
from llm_jax.run import cli
from tests.instruct.stub_endpoint import serving
from tests.tiny import LLAMA, drawn_params
from tests.tiny_text import sentencepiece_bytes

ROOT = Path(__file__).parents[2]
CONFIG = str(Path(__file__).with_name("tiny_self_instruct.py"))
FILES = ("tasks.jsonl", "rejects.jsonl")


@pytest.fixture(scope="module")
def stub():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def clean_slate(stub, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    stub.delay, stub.fault = 0.0, lambda key, attempt: ""
    stub.tries.clear()
    stub.answered.clear()


def words(stub, output: Path, *more: str) -> list[str]:
    where = ["--output", str(output), "--endpoint.url", stub.url, "--endpoint.model", "stub"]
    return ["self-instruct", CONFIG, *where, *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def logged(folder: Path) -> list[str]:
    return [row["key"] for row in rows(folder / "requests.jsonl")]


@pytest.fixture(scope="module")
def straight(stub, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("self-instruct") / "straight"
    assert cli.run(cli.dispatch, words(stub, folder)) == 0
    return folder


# ---- what comes out ------------------------------------------------------------------------------


def test_both_languages_reach_their_target_in_alpacas_format(straight):
    report = json.loads((straight / "report.json").read_text("utf-8"))
    tasks = rows(straight / "tasks.jsonl")
    for language, counts in report["languages"].items():
        of_language = [row for row in tasks if row["language"] == language]
        names = {row["instruction"] for row in of_language}
        assert counts["ended"] == "target"
        assert len(names) == counts["result"]["tasks"] >= 24
        assert len(of_language) == counts["instances"]["kept"] == counts["result"]["instances"]
        assert {row["id"].rpartition("-")[0] for row in of_language} == {
            f"{language}-{n:06d}" for n in range(1, len(names) + 1)
        }
        assert {row["is_classification"] for row in of_language} == {True, False}
    assert all(row["output"] and isinstance(row["input"], str) for row in tasks)
    assert {row["source"] for row in tasks} == {"self-instruct"}


def test_no_two_instructions_are_more_alike_than_allowed_nor_like_a_seed(straight):
    seeds = read_seeds((), ("en", "zh"), 8)
    for language in ("en", "zh"):
        tasks = [row for row in rows(straight / "tasks.jsonl") if row["language"] == language]
        texts = list(dict.fromkeys(row["instruction"] for row in tasks))
        known = texts + [seed.instruction for seed in seeds[language]]
        pairs = list(itertools.combinations(known, 2))
        assert max(rouge_l(*pair, language) for pair in pairs) <= 0.7
        for row in tasks:
            assert row["similarity"] == pytest.approx(
                rouge_l(row["instruction"], row["nearest"], language), abs=1e-4
            )


def test_every_candidate_is_counted_once_and_the_planted_flaws_are_found(straight):
    report = json.loads((straight / "report.json").read_text("utf-8"))
    rejects = rows(straight / "rejects.jsonl")
    for language, counts in report["languages"].items():
        for what, key in (("instruction", "instructions"), ("instance", "instances")):
            told = {reason: n for reason, n in counts[key].items() if reason != "kept" and n}
            found = [r["reason"] for r in rejects if (r["what"], r["language"]) == (what, language)]
            assert told == {reason: found.count(reason) for reason in set(found)}
        assert sum(counts["instructions"].values()) == 8 * counts["requests"]["instructions"]
        kept = counts["instructions"]["kept"]
        assert kept == counts["result"]["tasks"] + counts["instructions_without_instance"]
        assert counts["requests"]["class"] == counts["requests"]["instances"] == kept
    planted = ("starts with punctuation", "another language", "asks for more than text", "too similar",
               "output repeats the instruction", "conflicting outputs", "duplicate")  # fmt: skip
    assert set(planted) <= {row["reason"] for row in rejects}


def test_the_report_is_one_page_without_scripts_or_addresses(straight):
    page = (straight / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "http" not in page
    for part in (
        "English",
        "Chinese",
        "too similar",
        "Verbs and their objects",
        "Topics",
        "Samples",
    ):
        assert part in page
    report = json.loads((straight / "report.json").read_text("utf-8"))
    english, chinese = (report["languages"][name]["result"] for name in ("en", "zh"))
    assert sum(entry["tasks"] for entry in english["verbs"].values()) == english["tasks"]
    assert sum(chinese["similarity"].values()) == chinese["tasks"]


def test_the_result_does_not_depend_on_how_many_requests_are_under_way(stub, straight, tmp_path):
    stub.delay = 0.002
    more = ("--endpoint.concurrency", "2")
    assert cli.run(cli.dispatch, words(stub, tmp_path / "run", *more)) == 0
    assert contents(tmp_path / "run") == contents(straight)
    assert stub.answered.most_common(1)[0][1] == 1


def test_another_seed_gives_other_tasks(stub, straight, tmp_path):
    assert cli.run(cli.dispatch, words(stub, tmp_path / "run", "--seed", "1")) == 0
    assert contents(tmp_path / "run")[0] != contents(straight)[0]


# ---- interrupted ---------------------------------------------------------------------------------


def test_an_endpoint_that_fails_for_a_while_costs_nothing_but_the_time(
    stub, straight, tmp_path, capsys
):
    folder = tmp_path / "run"
    for broken in ("en/0/instances/03", "zh/0/instructions/02", "zh/1/class/00"):
        stub.fault = lambda key, attempt, broken=broken: "503" if key == broken else ""
        capsys.readouterr()
        assert cli.run(cli.dispatch, words(stub, folder, "--endpoint.attempts", "2")) == 2
        assert "HTTP 503" in capsys.readouterr().err
        assert not (folder / "tasks.jsonl").exists()
    stub.fault = lambda key, attempt: ""
    assert cli.run(cli.dispatch, words(stub, folder)) == 0
    assert contents(folder) == contents(straight)
    assert sorted(logged(folder)) == sorted(logged(straight))
    assert set(stub.answered.values()) == {1}


def start(stub, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "llm_jax.run.self_instruct", *words(stub, folder)[1:]]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet)


def kill_and_resume(stub, folder: Path, straight: Path, moments: list[int]) -> None:
    """Kills -9 when the server has answered so many requests in all; then lets the run end."""
    stub.delay = 0.01
    for moment in moments:
        known = set(logged(folder)) if (folder / "requests.jsonl").exists() else set()
        before = {key: stub.tries[key] for key in known}
        process = start(stub, folder)
        while stub.answered.total() < moment:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert {key: stub.tries[key] for key in known} == before, "a logged request was asked again"
        log = folder / "requests.jsonl"
        log.write_bytes(log.read_bytes()[:-7])  # as if the kill had come amid a line
    stub.delay = 0.0
    assert cli.run(cli.dispatch, words(stub, folder)) == 0
    assert contents(folder) == contents(straight)
    assert sorted(logged(folder)) == sorted(logged(straight))
    assert len(set(logged(folder))) == len(logged(folder))
    assert set(os.listdir(folder)) == set(os.listdir(straight))
    report = [json.loads((f / "report.json").read_text("utf-8")) for f in (folder, straight)]
    assert report[0]["languages"] == report[1]["languages"]


def test_killed_twice_and_resumed_the_result_is_the_same_file(stub, straight, tmp_path):
    kill_and_resume(stub, tmp_path / "run", straight, [7, 60])
    # no more was asked for twice than was under way at a kill, and one torn line each
    assert stub.tries.total() - len(logged(tmp_path / "run")) <= 2 * (8 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_six_times_at_random_the_result_is_the_same_file(stub, straight, tmp_path, seed):
    total = len(logged(straight))
    moments = sorted(random.Random(seed).sample(range(1, total), 6))
    kill_and_resume(stub, tmp_path / "run", straight, moments)


def test_more_tasks_of_the_same_run_go_on_where_it_ended(stub, straight, tmp_path):
    folder = tmp_path / "run"
    assert cli.run(cli.dispatch, words(stub, folder, "--target", "4", "--max-requests", "30")) == 0
    first, asked = rows(folder / "tasks.jsonl"), set(logged(folder))
    stub.tries.clear()
    assert cli.run(cli.dispatch, words(stub, folder)) == 0
    assert contents(folder) == contents(straight)
    assert not asked & set(stub.tries)
    assert [row for row in rows(folder / "tasks.jsonl") if row in first] == first


def test_the_budget_is_never_exceeded(stub, tmp_path):
    for budget in (1, 6, 11):
        folder = tmp_path / str(budget)
        stub.tries.clear()
        assert cli.run(cli.dispatch, words(stub, folder, "--max-requests", str(budget))) == 0
        assert stub.tries.total() == 2 * budget  # of each language
        report = json.loads((folder / "report.json").read_text("utf-8"))
        assert {counts["ended"] for counts in report["languages"].values()} == {"budget"}


# ---- our own sampler -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Random weights, which write rubbish."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = sentencepiece_bytes()
    tokenizer.save(root / "tokenizer")
    config = dataclasses.replace(LLAMA, vocab_size=336, num_layers=1, max_seq_len=4096)
    meta = {"config": {"model": to_dict(config)}, "tokenizer_fingerprint": tokenizer.fingerprint}
    files = {f.name: f.read_bytes() for f in (root / "tokenizer").iterdir()}
    save_model(root / "tiny", drawn_params(config), meta, files)
    return root / "tiny"


def test_a_model_that_writes_rubbish_ends_by_its_budget_and_resumes_mid_batch(model, tmp_path):
    folder = tmp_path / "run"
    seed = {"id": "a", "instruction": "写诗", "is_classification": False}
    lines = [json.dumps({**seed, "instances": [{"output": "诗"}]})]
    lines += [
        json.dumps(
            {
                **seed,
                "id": "b",
                "is_classification": True,
                "instances": [{"input": "好", "output": "褒"}],
            }
        )
    ]
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ["self-instruct", CONFIG, "--output", str(folder), "--model", str(model)]
    command += ["--seeds", json.dumps([str(tmp_path / "seeds.jsonl")])]
    command += ["--languages", '["zh"]', "--human-examples", "1", "--machine-examples", "0"]
    command += ["--instruction-tokens", "24", "--instance-tokens", "16", "--temperature", "1"]
    command += ["--top-p", "1", "--batch-size", "4", "--max-requests", "16"]
    assert cli.run(cli.dispatch, command) == 0
    report = json.loads((folder / "report.json").read_text("utf-8"))["languages"]["zh"]
    assert report["ended"] in ("budget", "patience")
    assert sum(report["requests"].values()) == len(logged(folder)) <= 16
    assert sum(report["instructions"].values()) > 0
    before, log = contents(folder), folder / "requests.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # torn amid a batch of three
    assert cli.run(cli.dispatch, command) == 0
    assert contents(folder) == before
    assert log.read_bytes() == b"".join(lines)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs a command that must refuse and leave nothing behind; the line it says."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(command: list[str]) -> str:
        capsys.readouterr()
        assert cli.run(cli.dispatch, command) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, error
        assert list(Path.cwd().iterdir()) == [], "something was left behind"
        return lines[0]

    return run


MISTAKES = {
    "nobody writes": ([], "neither is given; one of them writes"),
    "two write": (["--model", "m", "--endpoint.url", "http://h/v1", "--endpoint.model", "x"], "both are given"),
    "no such model": (["--model", "nowhere"], "nowhere"),
    "no key": (["--endpoint.url", "http://h/v1", "--endpoint.model", "x", "--endpoint.key-variable", "NO_KEY_HERE"],
               "'NO_KEY_HERE': that environment variable is not set"),
    "no seeds": (["--seeds", '["nowhere.jsonl"]'], "nowhere.jsonl: cannot be read (No such file or directory)"),
    "more examples than seeds": (["--human-examples", "80"], "at least 82 are needed"),
    "a language twice": (["--languages", '["en", "en"]'], "each once"),
    "an unknown language": (["--languages", '["fr"]'], "languages.0='fr' must be one of 'en', 'zh'"),
    "no target": (["--target", "0"], "target=0 must be at least 1"),
    "a hot sampler": (["--temperature", "3"], "temperature=3.0 must be from 0 to 2"),
    "no top-p": (["--top-p", "0"], "top_p=0.0 must be above 0"),
    "copies allowed": (["--filters.max-similarity", "1"], "filters.max_similarity=1.0 must be above 0 and below 1"),
    "lengths crossed": (["--filters.min-words", "9", "--filters.max-words", "3"], "filters.min_words=9"),
    "an empty keyword": (["--filters.keywords", '[" "]'], "filters.keywords holds an empty word"),
    "a typo": (["--targets", "3"], "did you mean 'target'?"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(refused, mistake):
    given, told = MISTAKES[mistake]
    assert told in refused(["self-instruct", CONFIG, "--output", "out", *given])


def test_a_folder_of_other_settings_another_writer_or_damage_is_refused(
    stub, straight, refused, tmp_path
):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "provenance.json", "requests.jsonl"):
        (folder / name).write_bytes((straight / name).read_bytes())
    told = refused(words(stub, folder, "--temperature", "0.9"))
    assert "this run has temperature=0.7, not 0.9" in told
    assert "generator.model='stub', not 'other'" in refused(
        [*words(stub, folder), "--endpoint.model", "other"]
    ) or "endpoint.model='stub', not 'other'" in refused(
        [*words(stub, folder), "--endpoint.model", "other"]
    )
    with RunLock(folder):
        assert "is in use by process" in refused(words(stub, folder))
    log = folder / "requests.jsonl"
    data = bytearray(log.read_bytes())
    data[data.index(b"\n") + 60] ^= 1
    log.write_bytes(data)
    assert "requests.jsonl:2" in refused(words(stub, folder))


def test_a_config_of_another_command_is_refused(refused):
    told = refused(["self-instruct", str(ROOT / "configs" / "demo.py")])
    assert "returned a PretrainConfig, but this command needs a SelfInstructConfig" in told


def test_the_shipped_page_says_what_to_run_and_expect():
    from llm_jax import config as config_files
    from llm_jax.instruct.self_instruct import SelfInstructConfig

    page = ROOT / "configs" / "self_instruct.py"
    assert config_files.load(page, SelfInstructConfig).target == 1000
    assert "Run: " in page.read_text("utf-8")
    assert "Expect: " in page.read_text("utf-8")
