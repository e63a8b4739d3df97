"""The loop, handed plain functions and a list of batches: what happens when, and what is written down."""

import dataclasses
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError, TrainingError
from llm_jax.train import BadStepsError, Reporter, TrainConfig, TrainState, run
from llm_jax.train.metrics import LiveLine, MetricsWriter, Throughput, lost

EMPTY = Batch(*(np.zeros((1, 1)) for _ in Batch._fields))


def new_state(step: int = 0) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState({"w": jnp.zeros(())}, (), jnp.asarray(step, jnp.int32), zero, zero)


class Diary:
    """A step function and hooks that write down what is asked of them, in order."""

    def __init__(self, **asked):
        self.calls: list[str] = []
        self.saved: list[tuple[int, int, dict]] = []  # step of the call, of the state, metrics
        self.bad = asked.get("bad", ())  # steps whose loss is not finite
        self.stop_at = asked.get("stop_at", 0)
        self.save_every = asked.get("save_every", 1000)
        self.save_asked_at = asked.get("save_asked_at", 0)
        self.worse_at = asked.get("worse_at", -1)

    def batches(self, start=0):
        for step in range(start + 1, 10_000):
            self.calls.append(f"batch {step}")
            yield EMPTY

    def step(self, state, batch):
        """Counts as `train_step` does; the parameter is the number of good steps."""
        assert batch is EMPTY
        step = int(state.step) + 1
        self.calls.append(f"step {step}")
        bad = step in self.bad
        state = TrainState(
            {"w": state.params["w"] + (not bad)}, (), state.step + 1, state.skipped + bad,
            (state.skipped_in_row + 1) * bad,
        )  # fmt: skip
        metrics = {
            "loss": math.nan if bad else 1 / step,
            "target_tokens": 100.0,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
        }
        return state, {name: jnp.asarray(value) for name, value in metrics.items()}

    def is_worse(self, metrics, step):
        return step == self.worse_at

    def evaluate(self, params, step):
        self.calls.append(f"evaluate {step}")
        return {"eval/bits_per_character": 2.5}

    def check_replicas(self, state, step):
        self.calls.append(f"check {step}")

    def sample(self, params, step):
        self.calls.append(f"sample {step}")

    def save(self, state, step, metrics):
        self.calls.append(f"save {step}")
        self.saved.append((step, int(state.step), metrics))

    def save_due(self, step):
        return step % self.save_every == 0

    def describe_step(self, step):
        return f"mix of {step}"

    def should_stop(self, step):
        return step == self.stop_at

    def should_save(self, step):
        return step == self.save_asked_at


@pytest.fixture
def reporter(tmp_path):
    """Writes metrics.jsonl and, as to a file, plain lines to `reporter.live.console.file`."""
    console = Console(file=io.StringIO(), width=200)
    live = LiveLine(10, 0, console)
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    reporter = Reporter(
        writer, live, Throughput(flops_per_token=1.0), bytes_per_token=lambda step: 2.0
    )
    yield reporter
    reporter.close()


def train(diary: Diary, reporter: Reporter, start: int = 0, **settings) -> TrainState:
    config = TrainConfig(**{"steps": 6, "log_every_steps": 1, **settings})
    return run(new_state(start), diary.step, diary.batches(start), config, diary, reporter)


def rows(tmp_path) -> list[dict]:
    found = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "time"} for row in found]


def shown(reporter: Reporter) -> list[str]:
    assert reporter.live
    assert isinstance(reporter.live.console.file, io.StringIO)
    return reporter.live.console.file.getvalue().splitlines()


def test_what_is_due_happens_after_its_step_in_the_order_evaluate_check_sample_save(reporter):
    diary = Diary(save_every=2)
    often = {"eval_every_steps": 2, "sample_every_steps": 4, "replica_check_every_steps": 3}
    train(diary, reporter, steps=4, **often)
    assert diary.calls == [
        *("batch 1", "step 1"),
        *("batch 2", "step 2", "evaluate 2", "save 2"),
        *("batch 3", "step 3", "check 3"),
        *("batch 4", "step 4", "evaluate 4", "sample 4", "save 4"),
    ]
    assert diary.saved == [(step, step, {"eval/bits_per_character": 2.5}) for step in (2, 4)]


def test_without_a_schedule_the_last_step_alone_is_evaluated_and_saved(reporter):
    diary = Diary()
    state = train(diary, reporter)
    assert diary.calls[-2:] == ["evaluate 6", "save 6"]
    assert not [call for call in diary.calls[:-2] if call.split()[0] not in ("batch", "step")]
    assert int(state.step) == 6


def test_a_resumed_run_goes_on_with_the_batch_after_its_step(reporter, tmp_path):
    diary = Diary()
    train(diary, reporter, start=4)
    assert diary.calls[:2] == ["batch 5", "step 5"]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [5, 6]


def test_every_logged_step_has_one_whole_row(reporter, tmp_path):
    train(Diary(), reporter, steps=7, log_every_steps=3, eval_every_steps=3)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [3, 3, 6, 6, 7, 7]
    for row in found[::2]:
        assert row["loss"] == pytest.approx(1 / row["step"])
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) / 2.0)
        assert {"target_tokens", "grad_norm", "learning_rate", "skipped"} <= row.keys()
    assert found[1] == {"step": 3, "eval/bits_per_character": 2.5}


def test_asked_to_stop_a_run_saves_that_step_and_neither_evaluates_nor_samples(reporter):
    diary = Diary(stop_at=4)
    state = train(diary, reporter, eval_every_steps=2, sample_every_steps=2)
    assert diary.calls[-3:] == ["batch 4", "step 4", "save 4"]
    assert int(state.step) == 4


def test_asked_to_stop_at_the_last_step_a_run_is_evaluated_all_the_same(reporter):
    diary = Diary(stop_at=6)
    train(diary, reporter)
    assert diary.calls[-2:] == ["evaluate 6", "save 6"]


def test_a_save_on_demand_does_not_stop(reporter):
    diary = Diary(save_asked_at=3)
    train(diary, reporter)
    assert diary.saved[0] == (3, 3, {})
    assert diary.saved[1][0] == 6


def test_skipped_steps_are_logged_whatever_the_schedule_and_training_goes_on(reporter, tmp_path):
    state = train(Diary(bad=(2, 3, 5)), reporter, log_every_steps=6, max_skipped_in_row=3)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [2, 3, 5, 6]
    assert rows(tmp_path)[0]["loss"] == "nan"
    assert float(state.params["w"]) == 3
    assert "skipped 3" in shown(reporter)[-2]


@pytest.mark.parametrize("save_every", [1, 1000])
def test_too_many_bad_steps_in_a_row_stop_the_run_with_good_parameters_saved(
    reporter, tmp_path, save_every
):
    diary = Diary(bad=range(3, 100), save_every=save_every)
    with pytest.raises(TrainingError) as caught:
        train(diary, reporter, steps=50, log_every_steps=10, max_skipped_in_row=4)
    message = str(caught.value)
    assert "\n" not in message
    step, state_step, metrics = diary.saved[-1]
    assert step == state_step
    assert metrics == {}
    # the same ones whether the metrics were read at once or, with nothing due, a step later
    last = 6
    assert (
        f"{last - 2} steps in a row (steps 3 to {last}; batch of step {last}: mix of {last})"
        in message
    )
    assert f"saved as step {step}" in message
    assert step == (6 if save_every == 1 else 7)
    assert [row["step"] for row in rows(tmp_path)] == list(range(3, step + 1)), "none is lost"


def test_a_run_that_recovers_just_after_the_limit_stops_too_and_names_the_bad_steps(reporter):
    diary = Diary(bad=(3, 4))
    with pytest.raises(TrainingError, match=r"2 steps in a row \(steps 3 to 4; .* as step 5;"):
        train(diary, reporter, max_skipped_in_row=2)


def test_off_a_terminal_the_live_line_is_plain_lines(reporter):
    train(Diary(), reporter, steps=10, log_every_steps=5)
    first, last, held_out = shown(reporter)
    assert first.startswith("step 5/10  loss 0.200  0.144 bits/byte  lr 1.0e-03  |g| 1.00")
    assert "tok/s" in first
    assert "ETA" in first
    assert last.startswith("step 10/10  loss 0.100")
    assert held_out == "step 10  held out: eval/bits_per_character 2.5000"
    assert "\x1b" not in "".join(shown(reporter))


def test_on_a_terminal_the_live_line_is_one_bar(tmp_path):
    screen = io.StringIO()
    live = LiveLine(6, 0, Console(file=screen, width=200, force_terminal=True))
    reporter = Reporter(None, live, Throughput(1.0), lambda step: 2.0)
    train(Diary(), reporter)
    reporter.close()
    assert "6/6" in screen.getvalue()
    assert "step 3/6" not in screen.getvalue()


def test_a_process_that_does_not_report_trains_as_well(tmp_path):
    reporter = Reporter(None, None, Throughput(1.0), lambda step: 2.0)
    assert int(train(Diary(), reporter).step) == 6
    reporter.close()


def test_without_held_out_text_no_evaluation_is_logged(reporter, tmp_path):
    diary = Diary()
    diary.evaluate = lambda params, step: {}
    train(diary, reporter)
    assert all("loss" in row for row in rows(tmp_path))


def test_rows_after_the_step_a_run_resumes_from_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n{"step": 3}\n{"st')
    writer = MetricsWriter(path, start_step=2)
    writer.write({"step": 3, "loss": math.inf})
    writer.close()
    assert rows(tmp_path)[:3] == [{"step": 1}, {"step": 2}, {"step": 2, "eval": 1}]
    assert rows(tmp_path)[3:] == [{"step": 3, "loss": "inf"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(
            ("steps", 0),
            ("log_every_steps", 0),
            ("max_skipped_in_row", 0),
            ("eval_every_steps", -1),
        ),
        *(("max_rollbacks", -1), ("watchdog_seconds", -1), ("watchdog_slow_seconds", 0)),
        ("replica_check_every_steps", -1),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ConfigError, match=f"train.{setting}={value} must"):
        dataclasses.replace(TrainConfig(), **{setting: value})


def test_an_evaluation_that_should_end_the_run_is_followed_by_a_save_and_the_end(reporter):
    diary = Diary(worse_at=4)
    state = train(diary, reporter, steps=10, eval_every_steps=2)
    assert int(state.step) == 4
    assert diary.calls[-2:] == ["evaluate 4", "save 4"]
    assert diary.saved == [(4, 4, {"eval/bits_per_character": 2.5})]


@pytest.mark.parametrize("save_every", [1, 1000])
def test_with_going_back_allowed_bad_steps_are_named_and_not_saved(reporter, save_every):
    """The same steps, whether their metrics were read at once or a step later."""
    diary = Diary(bad=(3, 4, 5), save_every=save_every)
    with pytest.raises(BadStepsError, match="steps 3 to 4; batch of step 4: mix of 4") as raised:
        train(diary, reporter, max_skipped_in_row=2, max_rollbacks=1)
    assert (raised.value.first, raised.value.last) == (3, 4)
    assert max([0, *(step for step, _, _ in diary.saved)]) < 4


def test_every_phase_of_a_run_is_entered_and_the_first_step_of_a_program_is_a_compile(reporter):
    entered = []
    enter = reporter.phases.enter
    reporter.phases.enter = lambda phase: (entered.append(phase), enter(phase))
    run(new_state(), (diary := Diary()).step, diary.batches(),
        TrainConfig(steps=3, sample_every_steps=2), diary, reporter, compiles=(3,))  # fmt: skip
    first, second, third = (
        ["data", "compile", "step"],
        ["data", "step"],
        ["data", "compile"],
    )
    assert entered == [*first, *second, "sample", *third, "step", "eval", "save", "save"]


def test_a_request_to_stop_during_an_evaluation_is_followed_by_a_save_and_the_end(reporter):
    diary = Diary()
    evaluate = diary.evaluate

    def interrupted(params, step):
        evaluate(params, step)
        diary.stop_at = step
        return {}

    diary.evaluate = interrupted
    state = train(diary, reporter, eval_every_steps=2)
    assert int(state.step) == 2
    assert diary.calls[-2:] == ["evaluate 2", "save 2"]
    assert diary.saved == [(2, 2, {})]


def test_what_was_logged_beyond_a_checkpoint_is_lost_in_steps_and_seconds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert lost(path, 0) == (0, 0.0)
    rows = [{"step": step, "time": 100.0 + step} for step in range(1, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    assert lost(path, 4) == (3, 3.0)
    assert lost(path, 7) == (0, 0.0)
    assert lost(path, 0) == (7, 0.0), "since when is not known"
