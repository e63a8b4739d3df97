"""The estimate against the compiled step, on hardware that is not here: tools/results/plan.md.

    python tools/show_plan.py              every row that is not in tools/results/plan.json yet
    python tools/show_plan.py v5e-16 ...   these rows anew

Needs libtpu (pip install -e ".[dev]"); rows for GPUs need jax[cuda13] and are left out without it. A
row is about a minute of compiling on a quiet machine.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import config as config_files
from llm_jax.plan import compile_apart, estimate, parse_topology
from llm_jax.run.cli import leave_out_absent_tpu
from llm_jax.run.plan import as_json, request_of
from llm_jax.run.pretrain import PretrainConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tools" / "results" / "plan.json"
TABLE = RESULTS.with_suffix(".md")
B7 = "pretrain_7b_tpu"


class Row(NamedTuple):
    """One compiled step."""

    config: str
    topology: str
    overrides: tuple[str, ...] = ()


ROWS = {
    "v5e-16": Row(B7, "v5e:4x4", ("--step.batch-size", "16")),
    "v5p-4": Row(B7, "v5p:2x2x1", ("--step.batch-size", "16")),
    "v5e-256": Row(B7, "v5e:16x16", ("--step.batch-size", "1024", "--data.seq-len", "2048")),
    "v5p-64": Row(B7, "v5p:4x4x4"),
    "v6e-64": Row(B7, "v6e:8x8"),
    "1b-v5e-16": Row("pretrain_1b", "v5e:4x4", ("--step.batch-size", "64")),
    "h100-8": Row("pretrain_7b_gpu", "h100:1x8"),
}


def run(row: Row) -> dict[str, Any]:
    """Estimates and compiles."""
    path = ROOT / "configs" / f"{row.config}.py"
    request = request_of(config_files.load(path, PretrainConfig, row.overrides))
    topology = parse_topology(row.topology)
    found = compile_apart(request, topology)
    return as_json(estimate(request, topology), topology, found, [])


def line(name: str, answer: dict[str, Any]) -> str:
    """A row of the table."""
    row, counted, found = ROWS[name], answer["estimate"], answer["compiled"]
    memory = counted["memory"]
    state = memory["parameters"] + memory["optimizer"] + memory["batch"]
    received = sum(one["bytes"] for one in found["collectives"]) / 1e9
    guessed = sum(one["bytes"] for one in counted["traffic"]) / 1e9
    return (
        f"| {row.config} {' '.join(row.overrides)} | {row.topology} | {found['arguments'] / 1e9:.2f} "
        f"| {(found['total'] - found['arguments']) / 1e9:.2f} | {found['temporaries'] / 1e9:.2f} "
        f"| {(memory['total'] - state) / 1e9:.2f} | {memory['total'] / found['total'] - 1:+.1%} "
        f"| {'yes' if found['fits'] else 'no'} | {found['attention']} | {received:.1f} | {guessed:.1f} "
        f"| {counted['time']['seconds']:.2f} | {counted['time']['mfu']:.0%} | {found['seconds']:.0f} |"
    )


def table(answers: dict[str, Any]) -> str:
    """The page."""
    rows = [line(name, answers[name]) for name in ROWS if name in answers]
    return "\n".join(
        [
            "# Planned and compiled",
            "",
            "Command: `python tools/show_plan.py`. GB of one device. *alive* is what the compiler has alive",
            "at once besides the arguments: what counts against the chip's memory. *temp_size* is jax's",
            "`temp_size_in_bytes`, larger on TPUs than what libtpu allocates. Bytes received are of one step.",
            "Step time and MFU are estimates; seconds to compile are of a machine shared with other work.",
            "",
            "| run | topology | arguments | alive | temp_size | alive, estimated | estimate of the total is off "
            "| fits | attention | received | received, estimated | s a step | MFU | compiled in s |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "MaxText's Llama-2-7B at the settings of the rows v5e:4x4, v5p:2x2x1 and v5e:16x16, with the same",
            "libtpu and full rematerialisation: temporaries of 4.70, 17.02 and 4.29 GB. Which of the two measures",
            "that is was not recorded: ours are less by what is alive, and more by `temp_size`.",
            "",
        ]
    )


def main() -> None:
    """Runs what is asked for, keeps it, writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: those that are missing")
    asked = parser.parse_args().rows
    leave_out_absent_tpu()
    answers = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, row in ROWS.items():
        if name not in asked if asked else name in answers:
            continue
        if row.topology.startswith("h") and not importlib.util.find_spec("jax_cuda13_plugin"):
            continue
        answers[name] = run(row)
        print(line(name, answers[name]), flush=True)
        RESULTS.write_text(json.dumps(answers) + "\n", encoding="utf-8")
    TABLE.write_text(table(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
