"""`llm-jax data inspect`: the mixture in numbers, and rows as training sees them."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llm_jax import tokenizer as tokenizers
from llm_jax.data.batch import Batch
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.shards import open_prepared
from llm_jax.run import cli, data, data_inspect

CONFIG = str(Path(__file__).with_name("tiny_pretrain.py"))
PHASE = {"from_step": 10, "sources": [{"name": "zh"}], "ramp_steps": 5}


@pytest.fixture
def shown(capsys, two_sources):
    """Standard output of `data inspect` on the two sources."""

    def inspect(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert cli.run(data.main, ["inspect", str(two_sources), *words]) == status
        captured = capsys.readouterr()
        assert status == 0 or captured.err.count("\n") == 1
        return captured.err if status else captured.out

    return inspect


def numbers(out: str, source: str) -> list[float]:
    """What stands behind the name of a source in the table of the mixture, the last one of the output."""
    line = re.findall(rf"^{source} .*$", out, re.MULTILINE)[-1]
    return [float(word.strip("%").replace(",", "")) for word in line.split()[1:]]


def test_shares_epochs_and_fill_are_those_of_the_plan(shown, two_sources):
    words = ("--weight", "en=3", "--weight", "zh=1", "--steps", "40", "--batch-size", "8")
    out = shown(*words, "--seq-len", "64")
    prepared = open_prepared(two_sources)
    config = DataConfig(prepared=str(two_sources), seq_len=64)
    plan = DataPlan(
        data_inspect.config_files.override(
            config, ["--sources", '[{"name": "en", "weight": 3}, {"name": "zh"}]']
        ),
        prepared,
    )
    for name, share in (("en", 75), ("zh", 25)):
        told, rows, full, epochs = numbers(out, name)
        assert told == share
        assert rows == plan.epoch_rows[name]
        assert full == pytest.approx(100 * plan.fills[name], abs=0.01)
        assert epochs == pytest.approx(plan.epochs_at(320)[name], abs=0.01)
    assert f"plan {plan.digest[:12]}; 40 steps of 8 rows" in out


def test_a_config_gives_mixture_steps_and_batch_size_and_flags_change_them(shown):
    out = shown("--config", CONFIG, "--phases", json.dumps([PHASE]))
    assert "share from step 10 to 15" in out
    assert "80 steps of 8 rows" in out
    assert numbers(out, "en")[:2] == [60, 0]
    assert numbers(out, "zh")[:2] == [40, 100]
    flat = shown("--rule", "temperature", "--temperature", "1e9")
    assert numbers(flat, "en")[0] == numbers(flat, "zh")[0] == 50


def test_a_row_is_shown_as_the_loss_sees_it(two_sources):
    tokenizer = tokenizers.load(open_prepared(two_sources).tokenizer_folder)
    question, answer = tokenizer.encode("The old river"), tokenizer.encode(" 这是")
    ids = [tokenizer.bos_id, *question, *answer, tokenizer.eos_id]
    count = len(ids) - 1
    mask = [0.0] * len(question) + [1.0] * (len(answer) + 1)
    row = Batch(
        *(np.array([*ids[:-1], 0]), np.array([*ids[1:], 0]), np.arange(count + 1)),
        *(np.array([1] * count + [0]), np.array([*mask, 0.0])),
    )
    bos, eos = tokenizer.piece_of(tokenizer.bos_id), tokenizer.piece_of(tokenizer.eos_id)
    told = list(data_inspect.pieces(row, 1, tokenizer))
    assert told == [(f"{bos}The old river", False), (f" 这是{eos}", True)]

    (line,) = data_inspect.segment_lines(row, tokenizer, in_color=False)
    assert (
        line.plain
        == f"  1 ({len(ids)} tokens, {len(answer) + 1} targets) ⟦{bos}The old river⟧ 这是{eos}"
    )
    out = io.StringIO()
    screen = Console(file=out, force_terminal=True, color_system="standard", width=200)
    screen.print(*data_inspect.segment_lines(row, tokenizer, in_color=True), soft_wrap=True)
    assert f"\x1b[2m{bos}The old river\x1b[0m\x1b[32m 这是{eos}\x1b[0m" in out.getvalue()


def test_every_segment_of_a_row_is_a_line_and_all_but_its_first_token_are_targets(shown):
    out = shown("--rows", "2", "--first-row", "3", "--seq-len", "64")
    row = out[out.index("row 3 ·") : out.index("row 4 ·")].splitlines()[1:]
    assert [int(line.split()[0]) for line in row] == list(range(1, len(row) + 1))
    for line in row:  # whatever a segment begins with was not predicted
        ((tokens, targets),) = re.findall(r"\((\d+) tokens, (\d+) targets\)", line)
        assert int(targets) == int(tokens) - 1
    assert sum("⟦<s>⟧" in line for line in row) >= len(row) - 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rows", "-1"), "--rows=-1 must be 0 or more"),
        (("--weight", "en"), "--weight 'en' must be NAME=NUMBER, such as zh=0.3"),
        (("--weight", "fr=1"), "data.sources: 'fr' is not in"),
        (("--phases", json.dumps([PHASE])), "count in steps: give --steps and --batch-size, or"),
        (
            ("--rule", "unimax", "--max-epochs", "4"),
            "count in steps: give --steps and --batch-size, or",
        ),
        (("--packing", "bestfit"), "packing='bestfit' must be one of 'concat', 'best_fit'"),
        (("--phases", "[{]"), "phases='[{]' must be a list"),
        (("--config", "none.py"), "config file 'none.py' does not exist"),
        (("--stepps", "3"), "did you mean '--steps'"),
    ],
)
def test_a_mistake_is_one_line(shown, words, said):
    assert said in shown(*words, status=2)
