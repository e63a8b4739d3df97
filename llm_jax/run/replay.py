"""`llm-jax replay RUN --step N`: does a step again and compares it with what was logged and saved.

From the newest good checkpoint before N, the steps up to N: loss, gradient norm and target tokens of every
logged step, and every array of checkpoint N where there is one. On the same kind and number of devices all of
it is equal bit for bit; if not, a chip, a library or the data is not what it was.

Exit status 0 if all is equal, 2 if not. Writes nothing.
"""

import functools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as config_files
from llm_jax.checkpoint.fingerprint import fingerprints
from llm_jax.checkpoint.reading import read_state
from llm_jax.checkpoint.record import DamagedError, read_meta
from llm_jax.checkpoint.run_folder import CHECKPOINTS, steps_in
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.run import cli, launch
from llm_jax.run.course import Stages, make_stages, optimizer_of, placed_batches
from llm_jax.run.kinds import KINDS, parts_of
from llm_jax.run.parts import Parts
from llm_jax.run.preference import load_reference
from llm_jax.sharding import make_mesh
from llm_jax.train import TrainState, enter, staged_step

COMPARED = ("loss", "grad_norm", "target_tokens")
NEAR = 1e-5  # relative; on another mesh sums are taken in another order


def main(argv: list[str]) -> None:
    """The command. Raises CheckpointError naming the first difference."""
    parser = cli.Parser(prog="llm-jax replay", description="Does a step of a run again.")
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, required=True, help="the update to do again")
    launch.add_flags(parser)
    known, overrides = parser.parse_known_args(argv)
    folder = Path(known.run)
    config = config_files.load(folder / "config.json", KINDS, ["--run", known.run, *overrides])
    cluster = launch.find_cluster((known.coordinator, known.processes, known.process_id))
    launch.start_processes(cluster, known.join_seconds)
    problems = replay(parts_of(config), known.step)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{folder}: {problems[0]}{more}; the same code, packages, devices and data give the same bits, so one "
            "of them is another, or a chip miscounts"
        )


def replay(parts: Parts, step: int) -> list[str]:
    """Does the steps from the checkpoint before `step` up to it; a line for each difference."""
    mesh = make_mesh(parts.mesh)
    with jax.set_mesh(mesh):
        stages = make_stages(parts, mesh, optimizer_of(parts))
        if parts.objective:
            stages = stages.with_reference(load_reference(parts, mesh))
        state, record = checkpoint_before(parts, step, stages)
        order = parts.order  # of the newest record, which knows of batches that were left out later
        sizes = {order.size(before) for before in range(record["step"], step)}
        if sizes != {parts.step.batch_size}:
            told = " and ".join(map(str, sorted(sizes)))
            raise ConfigError(
                f"--step={step}: the steps from checkpoint {record['step']} up to it had {told} rows; "
                + (
                    f"replay them with --step.batch-size {told}"
                    if len(sizes) == 1
                    else "replay the last one before the batch size changed, or one behind a later checkpoint"
                )
            )
        same_mesh = record["mesh"] == dict(mesh.shape)
        begin = record["step"]
        print(
            f"steps {begin + 1} to {step} from checkpoint {begin}, "
            + (
                "bit for bit"
                if same_mesh
                else f"within {NEAR:g}: another mesh than {record['mesh']}"
            )
        )
        state, problems = _again(parts, stages, state, step, same_mesh, mesh)
        if same_mesh and step in steps_in(parts.folder / CHECKPOINTS):
            saved = read_meta(parts.folder / CHECKPOINTS / str(step))["arrays"]
            found = fingerprints(state)
            differing = sorted(
                name for name in saved if saved[name]["fingerprint"] != found.get(name)
            )
            problems += [f"step {step}: {name} is not what was saved" for name in differing]
            print(f"step {step}: {len(saved) - len(differing)} of {len(saved)} arrays as saved")
    return problems


def checkpoint_before(parts: Parts, step: int, stages: Stages) -> tuple[TrainState, dict[str, Any]]:
    """The newest good state before `step`. Raises CheckpointError if there is none."""
    folder = parts.folder / CHECKPOINTS
    for saved in reversed([saved for saved in steps_in(folder) if saved < step]):
        try:
            return read_state(folder / str(saved), stages.state_at(saved))
        except DamagedError as error:
            print(f"stepped over: {error}")
    raise CheckpointError(
        f"{parts.folder} has no good checkpoint before step {step}; it has {steps_in(folder)}; keep more of them "
        "with --checkpoint.keep-last"
    )


def _again(
    parts: Parts, stages: Stages, state: TrainState, step: int, same_mesh: bool, mesh: Any
) -> tuple[TrainState, list[str]]:
    logged = logged_rows(parts.folder / "metrics.jsonl")
    begin = int(state.step)
    again = functools.partial(enter, model=parts.model, optimizer=optimizer_of(parts), mesh=mesh)
    one_step = staged_step(stages.plan, stages.steps, begin, again, parts.turns)
    problems, compared = [], 0
    with closing(placed_batches(parts, mesh, begin)) as feed:
        for number, batch in zip(range(begin + 1, step + 1), feed, strict=False):
            state, metrics = one_step(state, batch)
            row = logged.get(number)
            for name in COMPARED if row else ():
                assert row is not None
                told, now = row[name], float(metrics[name])
                compared += 1
                if not equal(told, now, 0.0 if same_mesh else NEAR):
                    problems.append(f"step {number}: {name} was {told!r} and is {now!r} now")
            if row:
                print(f"step {number}: " + ", ".join(f"{name} {row[name]}" for name in COMPARED))
    if not compared:
        raise ConfigError(
            f"--step={step}: none of the steps {begin + 1} to {step} is in metrics.jsonl; take one that was logged"
        )
    return state, problems


def equal(told: Any, now: float, near: float) -> bool:
    """Whether a logged value, which is text if it was not finite, is that of now."""
    if isinstance(told, str):
        return told == str(now)
    return abs(told - now) <= near * abs(told)


def logged_rows(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of training steps by step."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            found[row["step"]] = row
    return found


if __name__ == "__main__":
    from llm_jax.run import replay as imported

    cli.leave(cli.run(imported.main))
