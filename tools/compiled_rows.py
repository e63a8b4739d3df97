"""Rows of the tables of compiled steps: what each is about, and kept results so that a cut run goes on.

A row is compiled in a process of its own and kept as JSON as soon as it is known. What was compiled
already, the same program by the same compiler, is not again. Read by show_plan.py and show_scaling.py.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llm_jax import config as config_files
from llm_jax.errors import ConfigError
from llm_jax.plan import Compiled, Request, Topology, compile_apart, estimate, parse_topology
from llm_jax.run.plan import as_json, request_of, write_json
from llm_jax.run.pretrain import PretrainConfig

ROOT = Path(__file__).parent.parent
LIBTPU = "0.0.52"  # what the figures of others that are compared with were compiled by
Answer = dict[str, Any]


class Row(NamedTuple):
    """One compiled step."""

    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    bar: float = 0.0  # GB of temporaries that another framework's step of the same shape needs
    libtpu: str = LIBTPU  # of TPU rows: the version that compiles it


def ask(row: Row) -> tuple[Request, Topology]:
    """What the row is about."""
    path = ROOT / "configs" / f"{row.config}.py"
    request = request_of(config_files.load(path, PretrainConfig, row.overrides))
    return request, parse_topology(row.topology)


def run(row: Row, before: Answer) -> Answer:
    """Estimates, and compiles what is not the program of `before`."""
    request, topology = ask(row)
    compiled = before.get("compiled", {})
    found = compile_apart(request, topology, compiled.get("program", ""))
    if found.program == compiled.get("program"):
        found = Compiled.from_json(compiled)
    return estimated(row, found)


def estimated(row: Row, found: Compiled) -> Answer:
    """The estimate of today beside what was compiled."""
    request, topology = ask(row)
    return as_json(estimate(request, topology), topology, found, [])


def missing(row: Row) -> str:
    """What must be installed to compile the row; nothing is."""
    if row.topology.startswith("h"):
        return "" if importlib.util.find_spec("jax_cuda13_plugin") else "jax[cuda13]"
    found = importlib.util.find_spec("libtpu") and importlib.metadata.version("libtpu")
    return "" if found == row.libtpu else f"libtpu=={row.libtpu}"


def fill(
    doc: str, rows: Mapping[str, Row], results: Path, line: Callable[[str, Answer], str]
) -> tuple[dict[str, Answer], bool]:
    """Runs the rows named on the command line, or all; all known answers, and whether one failed."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}")
    asked = parser.parse_args().rows
    unknown = sorted(set(asked) - set(rows))
    if unknown:
        parser.error(f"{unknown[0]!r} is no row; there are {', '.join(rows)}")
    jax.config.update("jax_platforms", "cpu")  # libtpu, asked to start without a TPU, prints a page
    failed = False
    for name in asked or rows:
        before = known(results).get(name, {})
        if missing(rows[name]) and not before:
            print(f"{name}: pip install {missing(rows[name])!r} first", flush=True)
            continue
        try:
            if missing(rows[name]):
                print(
                    f"{name}: only estimated anew; pip install {missing(rows[name])!r}", flush=True
                )
                answer = estimated(rows[name], Compiled.from_json(before["compiled"]))
            else:
                answer = run(rows[name], before)
        except ConfigError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        print(line(name, answer), flush=True)
        write_json(results, {**known(results), name: answer})  # another run may have added some
    return known(results), failed


def known(results: Path) -> dict[str, Answer]:
    """What is kept."""
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


def gigabytes(size: float) -> str:
    """Two digits, a dash for what is not known."""
    return f"{size / 1e9:.2f}" if size else "–"


def markdown(head: tuple[str, ...], rows: list[str]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
