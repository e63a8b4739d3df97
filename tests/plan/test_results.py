"""The kept tables of compiled steps: wholly what their commands write, and what they must show."""

import importlib
import json

import pytest

from llm_jax.plan import estimate
from tests.test_configs import FOLDER

TOOLS = FOLDER.parent / "tools"


@pytest.fixture(params=["show_plan", "show_scaling"])
def tool(request, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module(request.param)


def kept(tool):
    return json.loads(tool.RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_the_commands_own_and_has_every_row(tool):
    answers = kept(tool)
    assert answers.keys() == tool.ROWS.keys()
    assert tool.TABLE.read_text(encoding="utf-8") == tool.table(answers)


def test_every_estimate_is_within_a_tenth_and_every_verdict_right(tool):
    for name, answer in kept(tool).items():
        counted, found = answer["estimate"], answer["compiled"]
        assert counted["fits"] == found["fits"], name
        if found["total"]:
            assert counted["memory"]["total"] == pytest.approx(found["total"], rel=0.1), name
        if found["platform"] == "tpu" and not found["too_large"]:
            assert found["readable"], f"{name}: compile with a jaxlib that can show the program"
            kernels = {"llm_jax_attention_forward", "llm_jax_attention_backward"}
            assert set(found["kernels"]) == kernels, name


def test_the_kept_estimates_are_those_of_today(tool, monkeypatch):
    rows = importlib.import_module("compiled_rows")
    for name, answer in kept(tool).items():
        counted = estimate(*rows.ask(tool.ROWS[name])).memory._asdict()
        assert {k: answer["estimate"]["memory"][k] for k in counted} == counted, name


def test_what_does_not_fit_is_among_the_rows_and_no_row_needs_more_than_its_bar(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("show_plan")
    answers = kept(tool)
    assert not answers["too-large"]["compiled"]["fits"]
    for name, row in tool.ROWS.items():
        if row.bar and row.libtpu == "0.0.52":
            assert answers[name]["compiled"]["temporaries"] <= row.bar * 1e9, name
