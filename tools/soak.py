"""Kills a training run at random moments until it has ended in spite of it, and compares it with one left alone.

    python tools/soak.py                       30 kills, 8 virtual devices: one process, then two
    python tools/soak.py --kills 6 --seed 2

Kinds of kill: SIGKILL and SIGTERM at any moment, SIGKILL while a checkpoint is being written, in an evaluation,
while compiling, and SIGKILL of one of two processes. Afterwards parameters, optimizer state, logged numbers and
file names must be those of the run left alone, and no process of any launch may be alive.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from llm_jax.run import cli, data, tokenizer  # noqa: E402
from tests.run.conftest import english_documents, write_jsonl  # noqa: E402
from tests.run.tiny_runs import Process, Run, wait_until  # noqa: E402

STEPS = 120
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
SETTINGS = (*MESH, "--train.steps", str(STEPS), "--train.eval-every-steps", "20")
ALONE = ("SIGKILL", "SIGTERM", "save", "eval", "compile")


def prepare(folder: Path) -> Path:
    """Token shards of two languages."""
    text = write_jsonl(folder / "en.jsonl", english_documents(300))
    words = ["train", "--input", str(text), "--output", str(folder / "tokenizer")]
    assert cli.run(tokenizer.main, [*words, "--vocab-size", "360"]) == 0
    words = ["prepare", "--source", f"en={text}", "--source", "zh=sample:zh", "--output"]
    words += [str(folder / "data"), "--tokenizer", str(folder / "tokenizer")]
    assert cli.run(data.main, [*words, "--holdout-fraction", "0.03"]) == 0
    return folder / "data"


def start(run: Run, processes: int, workers: int) -> list[Process]:
    """The run on 8 devices."""
    words = (*SETTINGS, "--data.workers", str(workers))
    if processes == 1:
        return [run.start(*words, devices=8)]
    return run.start_processes(*words, devices=4)


def moment(kind: str, run: Run, process: Process, chance: random.Random) -> None:
    """Waits for the moment of this kind of kill; at the latest until the process ends."""
    begun = run.newest()
    going = process.running
    if kind == "compile":
        wait_until(lambda: "run        " in process.output() or not going(), process)
        time.sleep(chance.uniform(0, 1.0))
    elif kind == "save":
        folder = run.folder / "checkpoints"
        aim = begun + 4 * chance.randint(1, 3)
        while (going() and not any(folder.glob("*.partial*"))) or process.step() < min(
            aim, STEPS - 4
        ):
            time.sleep(0.001)
            if not going():
                return
    elif kind == "eval":
        aim = begun - begun % 20 + 20
        while going() and process.step() < aim:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
    else:
        aim = begun + chance.randint(5, 18)
        while going() and process.step() < aim:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))


def members(session: int) -> list[int]:
    """Live processes of the session that a launch began."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def orphans(processes: list[Process]) -> list[int]:
    """What is alive of a launch a few seconds after its processes ended."""
    deadline = time.monotonic() + 20
    while True:
        left = [pid for process in processes for pid in members(process.pid)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def kill_once(run: Run, processes: int, kind: str, chance: random.Random) -> str:
    """One launch, ended by one kill: what happened, in a line of the table."""
    launched = start(run, processes, workers=chance.choice((0, 0, 1)))
    victim = chance.choice(launched)
    # only the first process of a run speaks
    moment(kind, run, launched[0], chance)
    begun = time.monotonic()
    if victim.running():
        victim.send(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
    statuses = [process.wait_for_end() for process in launched]
    took, step, newest = time.monotonic() - begun, launched[0].step(), run.newest()
    left = orphans(launched)
    assert not left, f"orphans: {left}"
    if kind == "SIGTERM":
        assert set(statuses) == {0}, launched[0].errors()
    elif processes > 1:
        assert took < 60, f"the other process lived for {took:.0f} s"
    return f"| {kind} | {step} | {newest} | {' '.join(map(str, statuses))} | {took:.1f} |"


def compare(run: Run, straight: Run) -> None:
    """Raises AssertionError unless the run is that left alone, bit for bit, without debris."""
    assert run.arrays(STEPS) == straight.arrays(STEPS), "arrays differ"
    losses = lambda r: [row for row in r.metrics() if "loss" in row]  # noqa: E731
    assert losses(run) == losses(straight), "logged numbers differ"
    assert run.metrics()[-1] == straight.metrics()[-1], "the last evaluation differs"
    # a stop saves the step it stopped at, which may still be among the newest
    assert all(name.isdecimal() for name in run.saved()), f"debris: {run.saved()}"
    assert len(run.saved()) == len(straight.saved())
    assert set(os.listdir(run.folder)) == set(os.listdir(straight.folder))


def finish(run: Run, processes: int) -> None:
    """Lets the run go on to its end."""
    launched = start(run, processes, workers=0)
    for process in launched:
        assert process.wait_for_end() == 0, process.errors()
    assert not orphans(launched)


def soak(
    folder: Path, prepared: Path, processes: int, kills: int, chance: random.Random
) -> Counter[str]:
    """Kills runs of so many processes until `kills` happened; prints a table."""

    def new(name: str) -> Run:
        (folder / name).mkdir()
        return Run(folder / name / "run", prepared, folder / "compiled")

    straight = new(f"straight-{processes}")
    finish(straight, processes)
    print(f"\n{processes} process(es) of {8 // processes} devices, {STEPS} steps\n", flush=True)
    print(
        "| kind | at step | newest checkpoint | exit statuses | seconds to end |\n|---|---|---|---|---|"
    )
    counts: Counter[str] = Counter()
    number = 0
    while sum(counts.values()) < kills:
        number += 1
        run = new(f"killed-{processes}-{number}")
        while sum(counts.values()) < kills and run.newest() < STEPS - 12:
            kind = min(ALONE, key=lambda k: (counts[k], chance.random()))
            print(kill_once(run, processes, kind, chance), flush=True)
            counts[kind] += 1
        finish(run, processes)
        compare(run, straight)
        print(
            f"\nrun {number}: bitwise equal to the run left alone, no debris, no orphans\n",
            flush=True,
        )
        shutil.rmtree(run.folder)
    return counts


def main() -> None:
    """Both halves, one after the other, in a temporary folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share-of-two", type=float, default=0.4, help="of the kills, with two processes"
    )
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    two = round(arguments.kills * arguments.share_of_two)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepare(folder)
        total: Counter[str] = Counter()
        for processes, kills in ((1, arguments.kills - two), (2, two)):
            if kills:
                total += soak(folder, prepared, processes, kills, chance)
    told = ", ".join(f"{kind} {count}" for kind, count in total.items())
    print(f"{sum(total.values())} kills survived ({told}) in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
