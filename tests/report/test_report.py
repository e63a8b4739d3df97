"""The ledger by hand, and the page from the files of a run that crashed, was hung and wrote hostile text."""

import html.parser
import json

import pytest

from llm_jax.report.chart import line_chart, ticks
from llm_jax.report.goodput import goodput, ledger_lines, sessions, totals
from llm_jax.run import cli, report

HOSTILE = "<script>alert(1)</script> 从前 & </pre>"


def at(second: int, event: str, **facts: object) -> dict:
    return {"time": f"2026-11-26T12:00:{second:02d}+00:00", "event": event, **facts}


# a session that saved at step 10 (8 s) and crashed 3 s and 4 steps later; 5 s of nothing; then a second one,
# 2 s of start included, which went back once (1 s of steps done again) and reached the end
EVENTS = [
    at(2, "start", step=0, host="a"),
    at(10, "ledger", step=10, seconds={"init": 2.0, "compile": 1.0, "step": 6.5, "save": 0.5}),
    at(20, "resume", step=10, host="a", lost_steps=4, lost_seconds=3.0),
    at(25, "rolled back", step=12, lost_steps=2, lost_seconds=1.0),
    at(30, "ledger", step=20, seconds={"init": 2.0, "step": 9.0, "data": 1.0}),
    at(30, "end", step=20, seconds={"init": 2.0, "step": 9.0, "data": 1.0}),
]


def test_every_second_of_a_run_is_in_one_phase_of_the_ledger():
    first, second = sessions(EVENTS)
    assert (first.first_step, first.last_step, first.lost_steps, first.ending) == (
        0,
        10,
        4,
        "crash",
    )
    assert first.seconds == {"init": 2.0, "compile": 1.0, "step": 6.5, "save": 0.5, "lost": 3.0}
    assert (second.first_step, second.last_step, second.lost_steps, second.ending) == (
        10,
        20,
        2,
        "end",
    )
    # alive until 12:00:10 + 3 s; the second began to start at 12:00:20 - 2 s
    assert second.seconds == {"init": 2.0, "step": 8.0, "data": 1.0, "lost": 1.0, "down": 5.0}
    sums = totals([first, second])
    assert sum(sums.values()) == 30.0
    assert goodput(sums) == pytest.approx(14.5 / 30)


def test_a_session_that_went_back_to_an_older_checkpoint_counts_only_up_to_it():
    later = at(12, "ledger", step=14, seconds={"step": 8.0})
    first, _ = sessions([*EVENTS[:2], later, *EVENTS[2:]])
    assert first.last_step == 10
    assert first.seconds["step"] == 6.5


def test_a_hang_and_a_run_still_going_are_told_apart():
    assert sessions([*EVENTS[:2], at(12, "hang", told="")])[0].ending == "hang"
    assert sessions(EVENTS[:2])[0].ending == "not ended"
    assert sessions([]) == []
    assert goodput(totals([])) == 0.0


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.3, 2.4), (0, 100_000), (-3, 7), (5, 5), (0, 0), (1e-5, 3e-4)]
)
def test_ticks_are_few_and_hold_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 13
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12


def test_a_chart_leaves_out_what_is_not_finite_and_an_empty_one_is_nothing():
    chart = line_chart("a < b", {"x": [(0, 1.0), (1, float("nan")), (2, 3.0)]})
    assert "a &lt; b" in chart
    points = chart.partition('points="')[2].partition('"')[0]
    assert len(points.split()) == 3
    assert "nan" not in chart
    assert line_chart("t", {"x": []}) == ""


class Tags(html.parser.HTMLParser):
    """Opened and not closed tags, and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path):
    """A run folder, with a torn last line in each of its logs."""
    rows = [{"step": s, "loss": 5 - s / 10, "grad_norm": 1.0, "time": 1.0} for s in range(1, 21)]
    rows[3]["loss"] = "nan"
    rows.append({"step": 20, "eval/bits_per_character": 2.5, "eval/zh/bits_per_character": 7.25})
    files = {"metrics.jsonl": rows, "events.jsonl": [*EVENTS, at(31, "forgetting", told=HOSTILE)]}
    for name, lines in files.items():
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / name).write_text(text + '\n{"step": 9, "tor')
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 20}, "run": HOSTILE}))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0000020.txt").write_text(HOSTILE)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    return tmp_path


def test_the_page_stands_alone_and_shows_everything_as_text(run, capsys):
    assert cli.run(report.main, [str(run)]) == 0
    assert "goodput                  48.3%" in capsys.readouterr().out
    page = (run / "report.html").read_text("utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    assert "script" not in tags.names
    for shown in (
        "7.25",
        "Step 20 of 20",
        "rolled back",
        "从前",
        "Goodput 48.3%",
        "&lt;script&gt;",
    ):
        assert shown in page
    assert page.count("<polyline") == 4  # loss, gradient norm, held-out text of all and of zh


def test_the_ledger_as_json_writes_no_page(run, capsys):
    assert cli.run(report.main, [str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sessions"] == 2
    assert found["seconds"]["down"] == 5.0
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert cli.run(report.main, [str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no run folder: it has no config.json\n"


def test_the_ledger_names_every_session():
    lines = ledger_lines(sessions(EVENTS))
    assert sum(line.startswith("2026-11-26T") for line in lines) == 2
