"""A run whose mixture changes on the way: by a phase that was planned, by one that was added, or not at all."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from llm_jax.checkpoint import read_meta
from llm_jax.run import cli, data, pretrain
from tests.run.conftest import english_documents, write_jsonl
from tests.run.tiny_runs import Run

STEPS, CHANGE = 16, 8
PHASE = {
    "from_step": CHANGE,
    "sources": [{"name": "en", "weight": 0.1}, {"name": "zh", "weight": 0.9}],
    "ramp_steps": 4,
}
# a constant rate, so that a run to step 8 is the beginning of a run to step 16
LENGTH = (
    *("--optimizer.final-lr-fraction", "1", "--optimizer.warmup-steps", "2"),
    *("--train.eval-every-steps", "0", "--data.sources", "[]"),
)


@pytest.fixture(scope="module", autouse=True)
def compile_once(compiled) -> Iterator[None]:
    """Sessions in this process share compiled programs through files."""
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def train(run: Run, *words: str, steps: int = STEPS) -> int:
    return cli.run(pretrain.main, run.words(*LENGTH, "--train.steps", str(steps), *words))


def phases(*written: dict) -> tuple[str, str]:
    return "--data.phases", json.dumps(written)


@pytest.fixture(scope="module")
def planned(new_run) -> Run:
    """The phase is in the config from the start, and nothing interrupts."""
    run = new_run()
    assert train(run, *phases(PHASE)) == 0
    return run


@pytest.fixture(scope="module")
def begun(new_run) -> Run:
    """Both sources by their size, up to the step of the change."""
    run = new_run()
    assert train(run, steps=CHANGE) == 0
    return run


def test_a_phase_added_to_a_run_goes_on_bitwise_as_if_it_had_been_planned(
    begun, planned, tmp_path, capsys
):
    run = begun.copy(tmp_path)
    assert train(run, *phases(PHASE)) == 0
    assert f"from step {CHANGE} to {CHANGE + 4}, changing into: en 10.0%" in capsys.readouterr().out
    assert run.arrays(STEPS) == planned.arrays(STEPS)
    losses = {row["step"]: row["loss"] for row in planned.metrics() if "loss" in row}
    assert {row["step"]: row["loss"] for row in run.metrics() if "loss" in row} == losses
    (event,) = [event for event in run.events() if event["event"] == "data phases"]
    assert event["step"] == CHANGE
    assert [phase["from_step"] for phase in event["before"]] == [0]
    assert [phase["from_step"] for phase in event["now"]] == [0, CHANGE]
    record = read_meta(run.folder / "checkpoints" / str(STEPS))
    assert record["mixture"] == event["now"]
    assert record["mixture"][1]["weights"] == {"en": 0.1, "zh": 0.9}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (phases({**PHASE, "from_step": CHANGE - 1}), "(data.phases [] -> "),
        (("--data.sources", json.dumps(PHASE["sources"])), "(data.sources "),
        (("--data.rule", "temperature", "--data.temperature", "3"), "rule"),
    ],
)
def test_a_change_of_rows_that_were_seen_is_refused_with_what_to_type(
    begun, tmp_path, capsys, words, said
):
    run = begun.copy(tmp_path)
    before = run.files()
    capsys.readouterr()
    assert train(run, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run.folder}: the data changed since step {CHANGE} " in error
    assert said in error
    assert run.files() == before
    told = re.search(r"--data\.phases '(.*?)'", error)
    assert told
    (phase,) = json.loads(told[1])
    assert phase["from_step"] == CHANGE
    if "rule" in said:
        assert train(run, "--data.phases", told[1]) == 0
        assert run.newest() == STEPS


def test_data_that_grew_by_a_source_joins_as_a_phase(begun, two_sources, tmp_path, capsys):
    run = begun.copy(tmp_path)
    sources = [{"name": name} for name in ("en", "zh", "more")]
    words = (
        *("--data.prepared", grow(two_sources, tmp_path)),
        *phases({"from_step": CHANGE, "sources": sources}),
    )
    capsys.readouterr()
    assert train(run, *words) == 2  # every source counts by its size: by which ones?
    told = re.search(r"--data\.sources '(.*?)'", capsys.readouterr().err)
    assert told
    assert train(run, *words, "--data.sources", told[1]) == 0
    (event,) = [event for event in run.events() if event["event"] == "data phases"]
    assert event["now"][1]["weights"] == {"en": 1.0, "zh": 1.0, "more": 1.0}


def grow(two_sources: Path, folder: Path) -> str:
    """The same sources and one more, prepared again."""
    config = json.loads((two_sources / "manifest.json").read_text(encoding="utf-8"))["config"]
    text = write_jsonl(folder / "more.jsonl", english_documents(50, seed=5))
    words = ["prepare", "--tokenizer", config["tokenizer"], "--output", str(folder / "grown")]
    words += ["--holdout-fraction", str(config["holdout_fraction"])]
    words += ["--source", f"en={config['sources'][0]['path']}", "--source", "zh=sample:zh"]
    assert cli.run(data.main, [*words, "--source", f"more={text}"]) == 0
    return str(folder / "grown")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (phases({**PHASE, "from_step": 0}), "from_step=0 must be at least 1"),
        (phases({**PHASE, "ramp_steps": -1}), "ramp_steps=-1; it must be 0 or more"),
        (phases({"from_step": 3, "sources": []}), "the phase from step 3 has no sources"),
        (phases({"from_step": 3}), "data.phases.0.sources is missing"),
        (
            phases({"from_step": 3, "sources": [{"name": "fr"}]}),
            "data.phases.0.sources: 'fr' is not in",
        ),
        (
            phases({"from_step": 3, "sources": [{"name": "en", "weight": 0}]}),
            "the phase from step 3: every weight is 0",
        ),
        (
            phases({**PHASE, "from_step": 9}, PHASE),
            "from_step=8 comes after from_step=9; write them in the order of their steps",
        ),
        (("--data.phases.0.from-step", "9"), "'0' must be an index below 0"),
        (
            ("--data.rule", "unimax"),
            "data.max_epochs=0 must be above 0 for data.rule='unimax', as in --data.max-epochs 4",
        ),
        (
            ("--data.temperature", "2"),
            "data.temperature=2 belongs to data.rule='temperature', but data.rule='fixed'",
        ),
        (
            (
                *("--data.sources", json.dumps(PHASE["sources"])),
                *("--data.rule", "temperature", "--data.temperature", "2"),
            ),
            "weight=0.1 of 'en', but data.rule='temperature' finds the weights",
        ),
        (
            ("--data.rule", "unimax", "--data.max-epochs", "0.001"),
            "data.max_epochs=0.001: at this cap the sources last for ",
        ),
        (("--data.rule", "unimix"), "data.rule='unimix' must be one of"),
    ],
)
def test_a_wrong_phase_or_rule_is_one_line(new_run, capsys, words, said):
    run = new_run()
    capsys.readouterr()
    assert train(run, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not run.folder.exists()
