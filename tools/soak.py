"""Kills a training run at random moments until it has ended in spite of it, and compares it with one left alone.

    python tools/soak.py                       32 kills, 8 virtual devices: one process, then two
    python tools/soak.py --kills 8 --seed 2 --output tools/results/soak.md

SIGKILL and SIGTERM, each at any step and aimed at a save, an evaluation and a compilation; with two processes
one of them gets it. Afterwards parameters, optimizer state, logged numbers and file names must be those of the
run left alone, and no process of any launch may be alive.

Aimed means: the first process is stopped (SIGSTOP) when its files say that it is in that phase, the files are
read again while it stands still, and only if they say the same does the signal go out; else it goes on and the
next moment is waited for. The table has the phase that was found at the kill, not the one that was meant.
"""

import argparse
import datetime
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from llm_jax.run import cli, data, tokenizer  # noqa: E402
from tests.run.conftest import english_documents, write_jsonl  # noqa: E402
from tests.run.tiny_runs import Process, Run  # noqa: E402

STEPS, EVAL_EVERY, SAVE_EVERY = 120, 20, 4
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
SETTINGS = (*MESH, "--train.steps", str(STEPS), "--train.eval-every-steps", str(EVAL_EVERY))
AIMS = ("any", "save", "eval", "compile")
PHASES = ("step", "save", "eval", "compile")


class Kind(NamedTuple):
    """A signal, and the phase that it is aimed at; "any" is a random moment after the first step."""

    signal: signal.Signals
    aim: str


KINDS = tuple(Kind(number, aim) for aim in AIMS for number in (signal.SIGKILL, signal.SIGTERM))


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


def phases(run: Run, process: Process) -> set[str]:
    """What the first process of a launch is in the middle of, by what it wrote.

    Compiling begins with the line about the run and ends with the first step that is told (this step included);
    a checkpoint on its way is a folder `N.partial`; an evaluation is due after a step in `metrics.jsonl` and
    the next line is its result.
    """
    if "run        " not in process.output():
        return {"start"}
    if not process.step():
        return {"compile"}
    found = set()
    if any((run.folder / "checkpoints").glob("*.partial")):
        found.add("save")
    last = run.metrics()[-1]
    if "loss" in last and last["step"] % EVAL_EVERY == 0:
        found.add("eval")
    return found or {"step"}


def stand_still(process: Process) -> None:
    """SIGSTOP, until the kernel says that it holds."""
    process.send(signal.SIGSTOP)
    while process.running() and state(process.pid) not in "TZ":
        time.sleep(0.0005)


def state(pid: int) -> str:
    """The letter of /proc: R, S, D running or waiting, T stopped, Z or X dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def aim_at(kind: Kind, run: Run, first: Process, chance: random.Random) -> set[str]:
    """Waits for the moment of this kind of kill; the process then stands still in these phases.

    Empty when it ended before.
    """
    begun = run.newest()
    least = {
        "any": begun + chance.randint(5, 18),
        "save": begun + SAVE_EVERY * chance.randint(1, 3),
        "eval": begun + 1,
        "compile": 0,
    }[kind.aim]
    while first.running() and "start" in phases(run, first):
        time.sleep(0.01)
    if kind.aim == "compile":
        time.sleep(chance.uniform(0, 2.0))
    wanted = set(PHASES) if kind.aim == "any" else {kind.aim}
    while first.running():
        if first.step() >= least and wanted & phases(run, first):
            if kind.aim == "any":
                time.sleep(chance.uniform(0, 0.1))
            stand_still(first)
            found = phases(run, first)
            if wanted & found and first.running():
                return found
            if first.running():
                first.send(signal.SIGCONT)
        time.sleep(0.0005 if kind.aim in ("save", "eval") else 0.01)
    return set()


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


def kill_once(
    run: Run, processes: int, kind: Kind, chance: random.Random, cold: Path
) -> tuple[set[str], str]:
    """One launch, ended by one kill: the phases it was found in, and a line of the table."""
    if kind.aim == "compile":  # nothing to be had from the cache
        run = Run(run.folder, run.prepared, cold)
    launched = start(run, processes, workers=chance.choice((0, 0, 1)))
    first, victim = launched[0], chance.choice(launched)  # only the first process of a run speaks
    found = aim_at(kind, run, first, chance)
    step, begun = first.step(), time.monotonic()
    if found:
        victim.send(kind.signal)
        if first.running():  # of a killed process nobody knows it yet
            os.kill(first.pid, signal.SIGCONT)
    statuses = [process.wait_for_end() for process in launched]
    took, newest = time.monotonic() - begun, run.newest()
    left = orphans(launched)
    assert not left, f"orphans: {left}"
    if not found:
        assert set(statuses) == {0}, first.errors()
    elif kind.signal == signal.SIGTERM:
        assert set(statuses) == {0}, first.errors()
        last = run.events()[-1]
        assert last["event"] in ("stop", "end"), last
        assert last["step"] == newest >= step, "a stop saves the very step"
    elif processes > 1:
        assert took < 60, f"the other process lived for {took:.0f} s"
    which = f" to process {launched.index(victim)}" if processes > 1 else ""
    cells = (
        f"{kind.signal.name}{which}",
        kind.aim,
        ", ".join(sorted(found)) or "missed: it ended",
        step,
        newest,
        " ".join(map(str, statuses)),
        f"{took:.1f}",
    )
    return found, "| " + " | ".join(map(str, cells)) + " |"


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


class Page:
    """What is told: at once to the terminal, and in the end as a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Adds a line or more."""
        self.lines.append(text)
        print(text, flush=True)


HEAD = "| signal | aimed at | found in | step told | newest checkpoint after | exit statuses | seconds to end |"
Hits = Counter[tuple[Kind, str]]


def soak(
    folder: Path, prepared: Path, processes: int, kills: int, chance: random.Random, page: Page
) -> Hits:
    """Kills runs of so many processes until `kills` happened; counts the phases they were found in."""

    def new(name: str) -> Run:
        (folder / name).mkdir()
        return Run(folder / name / "run", prepared, folder / "compiled")

    straight = new(f"straight-{processes}")
    finish(straight, processes)
    page.say(f"\n## {processes} process(es) of {8 // processes} devices, {STEPS} steps\n")
    page.say(f"{HEAD}\n|{'---|' * HEAD.count(' | ')}---|")
    tried: Counter[Kind] = Counter()
    hits: Hits = Counter()
    number = 0
    while tried.total() < kills:
        number += 1
        run = new(f"killed-{processes}-{number}")
        while tried.total() < kills and run.newest() < STEPS - 12:
            kind = min(KINDS, key=lambda kind: (tried[kind], chance.random()))
            cold = folder / f"cold-{processes}-{tried.total()}"
            found, line = kill_once(run, processes, kind, chance, cold)
            shutil.rmtree(cold, ignore_errors=True)
            page.say(line)
            tried[kind] += 1
            hits.update((kind, phase) for phase in found)
        finish(run, processes)
        compare(run, straight)
        page.say(
            f"\nRun {number}: bitwise equal to the run left alone, no debris, no orphans.\n"
            + (f"\n{HEAD}\n|{'---|' * HEAD.count(' | ')}---|" if tried.total() < kills else "")
        )
        shutil.rmtree(run.folder)
    for kind, count in tried.items():
        hits[kind, "kills"] = count
    return hits


def summary(hits: Hits) -> str:
    """How often each phase was really hit, by signal and aim."""
    names = (*PHASES, "kills")
    lines = ["| signal, aimed at | " + " | ".join(f"in {name}" for name in PHASES) + " | kills |"]
    lines.append("|---|" + "---|" * len(names))
    for kind in KINDS:
        cells = " | ".join(str(hits[kind, name]) for name in names)
        lines.append(f"| {kind.signal.name}, {kind.aim} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Both halves, one after the other, in a temporary folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share-of-two", type=float, default=0.5, help="of the kills, with two processes"
    )
    parser.add_argument("--output", help="Markdown file to write as well")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    two = round(arguments.kills * arguments.share_of_two)
    begun, page, total = time.monotonic(), Page(), Counter()
    words = shlex.join(["python", "tools/soak.py", *sys.argv[1:]])
    page.say(
        f"# Soak: {arguments.kills} kills\n\n`{words}` on {datetime.date.today():%d %B %Y}; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start, mesh data 2 x fsdp 2 x tensor 2 of 8 virtual CPU devices.\n\n{LEGEND}"
    )
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(Path(name))
        for processes, kills in ((1, arguments.kills - two), (2, two)):
            if kills:
                total += soak(Path(name), prepared, processes, kills, chance, page)
    page.say(f"## How often each phase was really hit\n\n{summary(total)}\n")
    page.say(f"{arguments.kills} kills survived in {time.monotonic() - begun:.0f} s.")
    if arguments.output:
        Path(arguments.output).write_text("\n".join(page.lines) + "\n", encoding="utf-8")


LEGEND = f"""Two packed, mixed sources; a save every {SAVE_EVERY} steps, an evaluation every {EVAL_EVERY}; a third of the launches reads in a process of its own, and those
killed while compiling have an empty compilation cache. Each run is compared with one left alone on the same
devices: parameters, optimizer state and every logged number bit for bit, file names, no process alive of any launch.
"found in" is what the files of the first process said while it stood still (SIGSTOP) right before the signal; a
save goes on beside the steps, so it may be found with an evaluation. A lost process 1 is noticed by its heartbeat (15 s),
a lost process 0 within about a second; -6 is the abort of the survivor."""


if __name__ == "__main__":
    main()
