"""`llm-jax plan CONFIG --topology v5p:4x4x4`: memory, time and traffic of a run on hardware that is not here."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from llm_jax import config as config_files
from llm_jax.errors import ConfigError
from llm_jax.model import count_params
from llm_jax.plan import (
    Collective,
    Compiled,
    Estimate,
    Request,
    Topology,
    compile_apart,
    estimate,
    parse_topology,
    search,
)
from llm_jax.plan.memory import state_bytes
from llm_jax.plan.request import rows_and_tokens
from llm_jax.plan.roofline import ATTENTION, EFFICIENCY, program_time
from llm_jax.plan.traffic import by_axis
from llm_jax.run import cli, continuation
from llm_jax.run.kinds import KINDS, RunConfig
from llm_jax.run.pretrain import AS_BASE, PretrainConfig
from llm_jax.run.provenance import nearest_there
from llm_jax.train import ALL, count_trained
from llm_jax.train.stages import main_part

GIB = 2**30
SHOWN = 5  # candidates of a search


def request_of(config: RunConfig) -> Request:
    """What of a run's config decides memory and time; sizes left to a base model are the base's.

    Of a run in stages that is the main one. Rows that a chat template or an extended tokenizer adds to the
    base's vocabulary are known from the data, and not counted.
    """
    model, first_row = config.model, 0
    if config.init_from:
        base = continuation.find_base(config.init_from)
        model = continuation.fill_in(model, AS_BASE, base.model, 0, base.folder)
        if config.stages.train.endswith("new_rows"):
            first_row = base.tokenizer.vocab_size
    request = Request(
        model=model,
        step=config.step,
        optimizer=config.optimizer,
        mesh=config.mesh,
        seq_len=config.data.seq_len,
        steps=config.train.steps,
        trainable=main_part(config.stages, model, first_row),
    )
    if isinstance(config, PretrainConfig):
        return request
    return dataclasses.replace(request, method=config.method, preference=config.preference)


def plan(
    config: RunConfig, topology: Topology, console: Console, *, fast: bool, searching: bool
) -> dict[str, Any]:
    """Prints the plan and returns it as JSON values."""
    request = request_of(config)
    candidates: list[Estimate] = []
    if searching:
        candidates = search(request, topology)
        request = candidates[0].request
        say(console, searched(candidates))
    counted = estimate(request, topology)
    say(console, heading(request, topology))
    say(console, told(counted, topology))
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best
    say(console, checkpoint_line(request, Path(config.run), kept))
    found = None
    if not fast:
        found = compile_apart(request, topology)
        say(console, compiled_lines(found, counted, topology))
    return as_json(counted, topology, found, candidates)


def say(console: Console, text: str) -> None:
    """Prints plain text, whole lines."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def heading(request: Request, topology: Topology) -> str:
    """What is planned, on what."""
    sizes = request.sizes(topology)
    rows, tokens = rows_and_tokens(request, sizes)
    shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    trained = ""
    if request.trainable != ALL:
        trained = f", {count_trained(request.model, request.trainable):,} of them trained"
    if request.has_reference:
        trained += ", and as many of a reference"
    return "\n".join(
        [
            f"devices    {topology.devices} x {topology.chip.kind}, {topology.name}; mesh {shape}",
            f"model      {count_params(request.model):,} parameters{trained}, remat {request.model.remat}",
            f"batch      {request.tokens:,} tokens a step; a device works on {rows} row(s) of {tokens} "
            f"tokens, {request.step.micro_batches} time(s)",
        ]
    )


def told(counted: Estimate, topology: Topology) -> str:
    """The estimate."""
    memory, time = counted.memory, counted.time
    parts = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in memory._asdict().items() if name != "total"
    )
    moved = ", ".join(
        f"{axis} {size / 1e9:.2f} GB" for axis, size in by_axis(counted.traffic).items()
    )
    tokens = counted.request.tokens * counted.request.steps
    platform = topology.chip.platform
    return "\n".join(
        [
            f"estimate   GiB a device: {parts}",
            f"           {estimated(memory.total, topology)}",
            f"received   a device, a step: {moved or 'nothing'}",
            f"time       {time.seconds:.3g} s a step, MFU {time.mfu:.1%}: products {time.products:.3g} s at "
            f"{EFFICIENCY[platform]:.0%} of the peak (attention {ATTENTION[platform]:.0%}; assumed), traffic "
            f"beside them {time.traffic:.3g} s, waited for {time.exposed:.3g} s, update {time.update:.3g} s",
            f"run        {tokens / 1e9:,.4g} billion tokens in {counted.request.steps:,} steps: "
            f"{time.days:.3g} days; {time.flops:.3g} flops a step, {time.recomputed:.3g} more recomputed",
        ]
    )


def estimated(total: float, topology: Topology) -> str:
    """The verdict of an estimate, which is within a tenth of the truth (tools/results/plan.md)."""
    close = abs(topology.usable - total) < total / 10
    return verdict(total, topology) + ("; too close to be sure without compiling" if close else "")


def verdict(total: float, topology: Topology) -> str:
    """Whether it fits."""
    left = topology.usable - total
    of = f"{total / GIB:.2f} GiB of {topology.usable / GIB:.2f} that a program gets"
    if left < 0:
        return (
            f"DOES NOT FIT: {of}, {-left / GIB:.2f} too much; raise --step.micro-batches, set "
            "--model.remat full, use more devices, or ask --search"
        )
    return f"fits: {of}, {left / GIB:.2f} ({left / topology.usable:.0%}) to spare"


def checkpoint_line(request: Request, run: Path, keep: int) -> str:
    """Size of the checkpoints against the free disk under the run folder."""
    size = state_bytes(request)
    there = nearest_there(run)
    free = shutil.disk_usage(there).free
    needed = size * (keep + 1)  # one more while the newest is written
    word = "enough for" if needed <= free else "NOT ENOUGH for"
    return (
        f"disk       a checkpoint is {size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free at {there}, {word} "
        f"{keep} kept and one being written"
    )


def compiled_lines(found: Compiled, counted: Estimate, topology: Topology) -> str:
    """What the compiler says, and how far the estimate was off."""
    lines = []
    off = (
        f"the estimate is {counted.memory.total / found.total - 1:+.1%} off" if found.total else ""
    )
    if found.too_large:
        return f"compiled   DOES NOT FIT, says the compiler: {found.too_large} {off}".rstrip()
    lines += [
        f"compiled   in {found.seconds:.0f} s here; attention {found.attention}; GiB a device: arguments "
        f"{found.arguments / GIB:.2f}, outputs {found.outputs / GIB:.2f} of which in their place "
        f"{found.aliased / GIB:.2f}, temporaries {found.temporaries / GIB:.2f}",
        f"           {verdict(found.total, topology)}; {off}",
    ]
    if not found.readable:
        return "\n".join([*lines, "           this jaxlib cannot show the program: no collectives"])
    guessed = by_axis(counted.traffic)
    axes = by_axis(found.collectives)
    for axis, size in axes.items():
        kinds = ", ".join(counts(one) for one in found.collectives if one.axes == axis)
        more = f"; estimated {guessed[axis] / 1e9:.2f}" if axis in guessed else ""
        lines.append(f"           over {axis}: {size / 1e9:.2f} GB received{more} ({kinds})")
    if found.products:
        time = program_time(
            counted.request, topology, counted.memory, found.products, found.collectives
        )
        matrices, kernels = found.products
        lines.append(
            f"           {matrices / 1e12:.4g} TFLOP in products, {kernels / 1e12:.4g} in kernels: "
            f"{time.seconds:.3g} s a step, MFU {time.mfu:.1%}, by the same assumptions"
        )
    return "\n".join(lines)


def counts(one: Collective) -> str:
    """`224 all-gather`."""
    return f"{one.times:.0f} {one.kind}"


def searched(candidates: list[Estimate]) -> str:
    """The best ways to run, as overrides."""
    lines = [f"search     {len(candidates)} ways fit; the fastest, by the estimate:"]
    for number, one in enumerate(candidates[:SHOWN], 1):
        lines.append(
            f"{number:>9}. {one.time.seconds:8.3g} s a step, MFU {one.time.mfu:.1%}, "
            f"{one.memory.total / GIB:.2f} GiB:  {overrides(one.request)}"
        )
    return "\n".join(lines)


def overrides(request: Request) -> str:
    """What to type to run so."""
    mesh = " ".join(
        f"--mesh.{name.replace('_', '-')} {size}"
        for name, size in dataclasses.asdict(request.mesh).items()
        if size != 1 or name in ("data", "fsdp")
    )
    return f"{mesh} --step.micro-batches {request.step.micro_batches} --model.remat {request.model.remat}"


def as_json(
    counted: Estimate, topology: Topology, found: Compiled | None, candidates: list[Estimate]
) -> dict[str, Any]:
    """All of it, bytes and seconds."""
    answer: dict[str, Any] = {
        "topology": topology.name,
        "usable_bytes": topology.usable,
        "request": config_files.to_dict(counted.request),
        "estimate": {
            "fits": counted.memory.total <= topology.usable,
            "memory": counted.memory._asdict(),
            "time": counted.time._asdict(),
            "traffic": [one._asdict() for one in counted.traffic],
        },
    }
    if found:
        answer["compiled"] = {
            **found.as_json(),
            "total": found.total,
            "fits": not found.too_large and found.total <= topology.usable,
        }
    if candidates:
        answer["search"] = [overrides(one.request) for one in candidates]
    return answer


def write_json(path: Path, answer: dict[str, Any]) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_output(name: str) -> None:
    """Now, not after minutes of compiling. Raises ConfigError if no file of the name can be written."""
    path = Path(name).absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"--json {name}: there is no folder {path.parent}")
    if name and path.is_dir():
        raise ConfigError(f"--json {name}: is a folder; name a file, as in --json plan.json")


def main(argv: list[str]) -> None:
    """The command."""
    parser = cli.Parser(
        prog="llm-jax plan",
        description="Whether a run fits hardware that is not here, how long it takes, what it moves. The "
        "estimate comes at once; the real step is then compiled for the absent devices. Needs no data.",
        epilog="Any setting is overridden as --model.num-layers 8. TPUs need libtpu, GPUs jax[cuda13].",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a file in configs/, or a saved config.json"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5p:4x4x4, v5e:16x16, v6e:8x8, v4:2x2x4, 2*v5e:4x4 (slices), h100:1x8 (hosts x GPUs), h200:2x8, cpu:8",
    )
    parser.add_argument("--fast", action="store_true", help="the estimate alone; compile nothing")
    parser.add_argument(
        "--search", action="store_true", help="propose mesh, micro-batches and remat"
    )
    parser.add_argument("--json", metavar="FILE", default="", help="write the plan there too")
    known, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a plan must not take an accelerator that is at work
    topology = parse_topology(known.topology)
    check_output(known.json)
    config = config_files.load(known.config, KINDS, rest)
    answer = plan(config, topology, Console(), fast=known.fast, searching=known.search)
    if known.json:
        write_json(Path(known.json), answer)


if __name__ == "__main__":
    # config files import `run.pretrain` by its name; this file is not among their imports
    cli.leave(cli.run(main))
