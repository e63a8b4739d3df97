"""`llm-jax doctor [CONFIG]`: a preflight. Start it on every host as the run would be started.

1. A roll call names the hosts that are missing. 2. Every host posts its facts in the store that JAX's
coordinator keeps; process 0 compares them and prints what differs. 3. All devices add and gather known
numbers, so that a broken link shows here. 4. With a CONFIG: the same data plan and tokenizer everywhere,
a run folder that the run may begin or go on in, and room for its checkpoints.

Exit status 0 if all is well, 2 if not, on every host; nothing waits longer than `--join-seconds` at a time.
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the only door to the coordinator's store in jax 0.10 to 0.12
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import config as config_files
from llm_jax.checkpoint.run_folder import CHECKPOINTS, numbered_folders
from llm_jax.errors import ConfigError, UserError
from llm_jax.run import cli, launch
from llm_jax.run.course import optimizer_of
from llm_jax.run.kinds import KINDS, RunConfig, parts_of
from llm_jax.run.provenance import code_digest, nearest_there, record_of, versions
from llm_jax.run.session import check_folder, fitted
from llm_jax.sharding import make_mesh
from llm_jax.tokenizer.base import digest

ROOM = 1.2  # what `checkpoint.store` wants free, in sizes of a checkpoint
SLACK = 10.0  # seconds that hosts may be apart from each other
GRACE = 5.0  # seconds that process 0 waits for each of the others to leave
COLLECTIVES = "collectives"  # the thread that computes with all devices
LAST = 0.5  # seconds from saying that one leaves to having left


def facts_of(config: RunConfig | None) -> dict[str, Any]:
    """What this host is and has. `same` must be equal on all hosts, `own` is its own."""
    devices = jax.local_devices()
    same: dict[str, Any] = {
        "python": platform.python_version(),
        **versions(),
        "code": code_digest()[:12],
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
    own: dict[str, Any] = {"host": socket.gethostname(), "problem": ""}
    if config:
        same["config"] = digest(config_files.to_dict(config))[:12]
        try:
            facts = config_facts(config)
        except (UserError, OSError) as error:
            own["problem"] = str(error)
        else:
            same |= facts["same"]
            own |= facts["own"]
    return {"same": same, "own": own}


def config_facts(config: RunConfig) -> dict[str, Any]:
    """Of the run that is about to start. Raises UserError when it could not."""
    parts = parts_of(config)
    record = record_of(parts, 0)
    mesh = make_mesh(config.mesh)
    stages, _ = fitted(parts, mesh, optimizer_of(parts))
    check_folder(parts)
    size = max(
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) for state in stages.states
    )
    folder = nearest_there(parts.folder)
    stay = config.checkpoint.keep_last + config.checkpoint.keep_best
    # those that are there go as new ones come; a new one is whole before the first of them goes
    more = max(0, stay * size - saved_bytes(parts.folder / CHECKPOINTS))
    return {
        "same": {
            "plan": record["plan_digest"][:12],
            "tokenizer": record["tokenizer_fingerprint"][:12],
            "mesh": " x ".join(f"{axis} {count}" for axis, count in record["mesh"].items()),
            "checkpoint": f"{size / 1e6:,.1f} MB",
        },
        "own": {
            "free": shutil.disk_usage(folder).free,
            "needed": int(size * ROOM) + more,
            "folder": str(folder),
        },
    }


def saved_bytes(checkpoints: Path) -> int:
    """Of the checkpoints that are there; not of those set aside under other names, which nothing removes."""
    total = 0
    for step in numbered_folders(checkpoints):
        for file in (checkpoints / str(step)).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # the run is alive and removes old ones
                total += file.lstat().st_size
    return total


def differences(facts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Where hosts are not as process 0 is, then what else would stop a run, which may come of it; a line each."""
    unlike, problems = [], []
    first = facts[0]
    for index, host in sorted(facts.items()):
        own = host["own"]
        who = f"process {index} on {own['host']}"
        names = first["same"].keys() | host["same"].keys()
        if first["own"]["problem"] or own["problem"]:  # which left out the facts of the config
            names = first["same"].keys() & host["same"].keys()
        for name in sorted(names, key=lambda name: (name != "devices", name)):
            mine, other = host["same"].get(name, "none"), first["same"].get(name, "none")
            if mine != other:
                unlike.append(f"{who}: {name} is {mine}, process 0 has {other}")
        if own["problem"]:
            problems.append(f"{who}: {own['problem']}")
        # process 0 writes records, and every process its part of the arrays: one shared disk, or each its own
        if own.get("free", 1) < own.get("needed", 0):
            problems.append(
                f"{who}: {own['free'] / 1e6:,.0f} MB free in {own['folder']}, the checkpoints that stay need "
                f"{own['needed'] / 1e6:,.0f} MB"
            )
    return unlike + problems


class Exchange:
    """What the processes tell each other through the coordinator; one process alone talks to itself."""

    def __init__(self, hosts: Sequence[str], seconds: float) -> None:
        self.hosts, self.seconds = hosts, seconds
        self.client = distributed.global_state.client if len(hosts) > 1 else None
        self.alone: dict[str, str] = {}

    def post(self, name: str, value: Any) -> None:
        """Leaves a JSON value under a name."""
        text = json.dumps(value)
        if self.client:
            self.client.key_value_set(f"doctor/{name}", text)
        else:
            self.alone[name] = text

    def fetch(self, name: str, seconds: float) -> Any:
        """The value under a name; None when nobody leaves one in time."""
        if not self.client:
            return json.loads(self.alone[name]) if name in self.alone else None
        try:
            text = self.client.blocking_key_value_get(f"doctor/{name}", max(1, int(seconds * 1000)))
        except jax.errors.JaxRuntimeError:  # deadline exceeded
            return None
        return json.loads(text)

    def gather(self, name: str) -> tuple[dict[int, Any], list[str]]:
        """The values of all processes by number, and a line for each that did not leave one in time."""
        deadline = time.monotonic() + self.seconds
        found = {
            index: self.fetch(f"{name}/{index}", deadline - time.monotonic())
            for index in range(len(self.hosts))
        }
        late = [
            f"process {index} on {self.hosts[index]}: no {name} within {self.seconds:g} s; it hangs or died, "
            "look at its log"
            for index, value in found.items()
            if value is None
        ]
        return {index: value for index, value in found.items() if value is not None}, late


def add_and_gather() -> str:
    """Known numbers over all devices; what is wrong with the result, empty if nothing is."""
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("all",), devices=devices)
    numbers = np.arange(1, len(devices) + 1, dtype=np.int32)
    split = NamedSharding(mesh, PartitionSpec("all"))
    each = jax.make_array_from_callback(numbers.shape, split, lambda index: numbers[index])
    everywhere = NamedSharding(mesh, PartitionSpec())
    # the sum is an all-reduce, the array itself an all-gather
    both = jax.jit(lambda x: (jnp.sum(x), x), out_shardings=everywhere)
    total, gathered = both(each)
    if int(total) != numbers.sum():
        return f"a sum over all devices gave {int(total)}, {numbers.sum()} is right"
    if not np.array_equal(gathered, numbers):
        return f"a gather over all devices gave {np.asarray(gathered).tolist()}"
    return ""


def within(seconds: float) -> dict[str, str]:
    """Runs the collectives in a thread: one that a dead link blocks would never come back."""
    result: dict[str, str] = {}

    def work() -> None:
        try:
            result["problem"] = add_and_gather()
        except Exception as error:
            result["problem"] = f"a collective failed: {str(error).splitlines()[0]}"

    thread = threading.Thread(target=work, name=COLLECTIVES, daemon=True)
    thread.start()
    thread.join(seconds)
    return result


def table(facts: Mapping[int, Mapping[str, Any]]) -> str:
    """What process 0 is and has, and the hosts beside it."""
    rows = [(name, str(value)) for name, value in facts[0]["same"].items()]
    rows += [
        (f"process {index}", f"{host['own']['host']}" + disk(host["own"]))
        for index, host in sorted(facts.items())
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def disk(own: Mapping[str, Any]) -> str:
    """`, 123 MB free of 45 MB needed in /runs`."""
    if "free" not in own:
        return ""
    return f", {own['free'] / 1e6:,.0f} MB free in {own['folder']}, {own['needed'] / 1e6:,.0f} MB needed"


def examine(config: RunConfig | None, exchange: Exchange, index: int) -> list[str]:
    """All checks, on every process; what is wrong as process 0 found it, the same everywhere."""
    exchange.post(f"facts/{index}", facts_of(config))
    problems: list[str] = []
    if index == 0:
        facts, problems = exchange.gather("facts")
        problems += differences(facts)
        print(table(facts), flush=True)
        exchange.post("compared", problems)
    else:
        problems = exchange.fetch("compared", exchange.seconds + SLACK)
    if problems is None:
        return ["process 0 did not compare the facts in time; see its log"]
    if not problems:
        result = within(exchange.seconds)
        if "problem" in result:
            exchange.post(f"collective/{index}", result["problem"])
        if index == 0:
            found, problems = exchange.gather("collective")
            problems += [f"process {i}: {told}" for i, told in found.items() if told]
            exchange.post("verdict", problems)
        else:
            problems = exchange.fetch("verdict", exchange.seconds + SLACK)
    return ["process 0 gave no verdict in time; see its log"] if problems is None else problems


def leave(exchange: Exchange, index: int) -> None:
    """Ends this process with status 2; process 0 last, for JAX aborts whoever outlives the coordinator's store.

    The usual way out of jax.distributed would wait for processes that hang.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    exchange.post(f"left/{index}", True)
    if index == 0:
        for other in range(len(exchange.hosts)):
            exchange.fetch(f"left/{other}", GRACE)
        time.sleep(LAST)
    os._exit(2)


def main(argv: list[str]) -> None:
    """The command. Raises ConfigError with the first problem; all of them are printed."""
    parser = cli.Parser(prog="llm-jax doctor", description="Checks hosts before a run.")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="the run's config")
    launch.add_flags(parser)
    known, overrides = parser.parse_known_args(argv)
    if overrides and not known.config:
        raise ConfigError(f"{overrides[0]}: settings need a CONFIG to belong to")
    config = config_files.load(known.config, KINDS, overrides) if known.config else None
    cluster = launch.find_cluster((known.coordinator, known.processes, known.process_id))
    hosts = launch.start_processes(cluster, known.join_seconds)
    exchange = Exchange(hosts, known.join_seconds)
    problems = examine(config, exchange, jax.process_index())
    if not problems:
        print(f"all is well: {len(hosts)} process(es), {jax.device_count()} device(s)")
        return
    for problem in problems:
        print(f"BAD  {problem}")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    told = f"{problems[0]}{more}; no run would start well like this"
    # the interpreter's way out aborts under a thread that still computes
    hangs = any(thread.name == COLLECTIVES for thread in threading.enumerate())
    if len(hosts) == 1 and not hangs:
        raise ConfigError(told)
    print(f"error: {told}", file=sys.stderr)
    leave(exchange, jax.process_index())


if __name__ == "__main__":
    from llm_jax.run import doctor as imported

    cli.leave(cli.run(imported.main))
