"""The real training step, compiled for a topology, and what the compiler says of it.

    python -m llm_jax.plan.compiled < request.json

is a process of its own: the number of virtual CPU devices is fixed before jax starts, libtpu takes its
settings from the environment, and a compiler that dies must not take the command with it. With
LLM_JAX_PROGRAMS=FOLDER the program's text is kept there, as its digest.hlo.gz.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax import config as config_files
from llm_jax.data.batch import DTYPES, Batch
from llm_jax.errors import ConfigError, UserError
from llm_jax.model import attention_choice
from llm_jax.plan.collectives import Collective, collectives
from llm_jax.plan.products import Products, products
from llm_jax.plan.request import Request
from llm_jax.plan.topology import Topology, described_devices, parse_topology
from llm_jax.sharding import batch_sharding, make_mesh
from llm_jax.train import (
    abstract_state,
    compile_preference_step,
    compile_step,
    make_optimizer,
    make_schedule,
)
from llm_jax.train.guard import watch
from llm_jax.train.preference import abstract_reference

KERNELS = ("llm_jax_attention_forward", "llm_jax_attention_backward", "mosaic_gpu")
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "cpu": ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What is known of one compiled step; bytes are of one device."""

    platform: str = ""
    arguments: int = 0  # parameters, optimizer state and batch
    outputs: int = 0
    aliased: int = 0  # outputs in the place of arguments
    temporaries: int = 0  # what the program allocates besides, fragmentation included
    peak: int = 0  # most that is alive at once; 0 where the compiler does not say
    seconds: float = 0.0  # on the machine that compiled
    cpu_seconds: float = 0.0  # of all its cores: what other work there changes little
    compiler: str = ""  # "jax 0.10.2, libtpu 0.0.52"
    program: str = ""  # digest of what was compiled, for what, and by which compiler
    attention: str = ""
    kernels: tuple[str, ...] = ()  # of ours, found in the program
    collectives: tuple[Collective, ...] = ()
    products: Products | None = None  # None: not readable, or a GPU's
    readable: bool = True  # whether this jaxlib can show the program: kernels and collectives
    too_large: str = ""  # the compiler's own words, where it refuses for want of memory

    @property
    def total(self) -> int:
        """Bytes a device must have; of a program that was refused what the compiler says it needs, or 0.

        libtpu tells the most it uses at once, arguments included, and that is what it compares with
        the chip. Its temporaries are more: in libtpu 0.0.52 by a hundredth, in 0.0.42 by two fifths
        (7B on v5e:4x4: 6.5 GB, of which 4.6 are alive at once). On a CPU `peak` knows nothing of
        temporaries.
        """
        if self.too_large:
            needed = re.search(r"\(([\d.]+)([MG])\) exceeds", self.too_large)
            return int(float(needed[1]) * 2 ** {"M": 20, "G": 30}[needed[2]]) if needed else 0
        sum_of_all = self.arguments + self.outputs - self.aliased + self.temporaries
        return min(self.peak, sum_of_all) if self.platform == "tpu" else sum_of_all

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return {
            **dataclasses.asdict(self),
            "collectives": [one._asdict() for one in self.collectives],
            "products": self.products._asdict() if self.products else None,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Compiled":
        """What `as_json` gave; other keys are left out."""
        given = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        given["collectives"] = tuple(Collective(**one) for one in given["collectives"])
        given["kernels"] = tuple(given["kernels"])
        given["products"] = Products(**given["products"]) if given["products"] else None
        return cls(**given)


def compile_request(request: Request, topology: Topology, known: str = "") -> Compiled:
    """Compiles in this process; not a program whose digest is `known`, of which it tells that alone.

    Raises:
      ConfigError: what describes the devices is missing, or the run does not fit the mesh.
    """
    request.abstract_mesh(topology)
    lowered, attention, sizes = _lower(request, topology)
    compiler = _compiler(topology)
    text = "\n".join((lowered.as_text(), topology.name, compiler, os.environ.get("XLA_FLAGS", "")))
    told = Compiled(
        platform=topology.chip.platform,
        attention=attention,
        compiler=compiler,
        program=hashlib.sha256(text.encode()).hexdigest()[:16],
    )
    if told.program == known:
        return told
    begin, cpu_begin = time.perf_counter(), sum(os.times()[:4])
    too_large, compiled = "", None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        too_large = str(error).strip().splitlines()[0]
    seconds, cpu_seconds = time.perf_counter() - begin, sum(os.times()[:4]) - cpu_begin
    told = dataclasses.replace(told, seconds=seconds, cpu_seconds=cpu_seconds, too_large=too_large)
    return _read(compiled, told, sizes) if compiled else told


def step_of(request: Request, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted training step of a run on a mesh, and its optimizer."""
    optimizer = watch(make_optimizer(request.optimizer), request.step.spike_window)
    compiled = compile_step
    if request.method != "sft":
        objective = request.preference.objective(request.method)
        compiled = functools.partial(compile_preference_step, objective=objective)
    step = compiled(
        mesh,
        model=request.model,
        config=request.step,
        optimizer=optimizer,
        schedule=make_schedule(request.optimizer, request.steps),
        clip_norm=request.optimizer.clip_norm,
        trainable=request.trainable,
    )
    return step, optimizer


def _lower(request: Request, topology: Topology) -> tuple[Any, str, dict[str, int]]:
    """The step before XLA has it, the name of its attention, and the sizes of the mesh."""
    mesh = make_mesh(request.mesh, described_devices(topology))
    step, optimizer = step_of(request, mesh)
    rows = (request.step.batch_size, request.seq_len)
    sharding = batch_sharding(mesh, *rows)
    batch = Batch(*(jax.ShapeDtypeStruct(rows, dtype, sharding=sharding) for dtype in DTYPES))
    given: tuple[Any, ...] = (
        abstract_state(request.model, optimizer, mesh, request.trainable),
        batch,
    )
    if request.method != "sft":
        given += (abstract_reference(request.model, mesh) if request.has_reference else None,)
    with jax.set_mesh(mesh):
        attention = attention_choice(request.model, *rows).name
        return step.lower(*given), attention, dict(mesh.shape)


def _compiler(topology: Topology) -> str:
    """Names and versions, as they are found first on the path."""
    names = ("jax", *COMPILERS[topology.chip.platform])
    top = {"jax-cuda13-plugin": "jax_cuda13_plugin", "jax-cuda12-plugin": "jax_cuda12_plugin"}
    found = [name for name in names if importlib.util.find_spec(top.get(name, name))]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)


def _read(compiled: Any, told: Compiled, sizes: dict[str, int]) -> Compiled:
    """Adds what the compiler says of its program."""
    memory = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10 cannot read programs for v5p and v6e
        text = ""
    kept = os.environ.get("LLM_JAX_PROGRAMS")
    if kept and text:
        Path(kept, f"{told.program}.hlo.gz").write_bytes(gzip.compress(text.encode()))
    countable = bool(text) and told.platform != "gpu"
    return dataclasses.replace(
        told,
        readable=bool(text),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        kernels=tuple(name for name in KERNELS if name in text),
        collectives=tuple(collectives(text, sizes)),
        products=products(text) if countable else None,
    )


def compile_apart(request: Request, topology: Topology, known: str = "") -> Compiled:
    """As `compile_request`, in a process of its own.

    Raises:
      ConfigError: as `compile_request`, or the compiler died.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if topology.chip.platform == "cpu":
        flags += f" --xla_force_host_platform_device_count={topology.devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # where pip puts NVIDIA's ptxas: jax 0.10 would take the system's
    wheel = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    tools = wheel / "site-packages" / "nvidia" / "cu13" / "bin"
    if tools.is_dir():
        environment["PATH"] = f"{tools}{os.pathsep}{environment.get('PATH', '')}"
    asked = json.dumps(
        {"topology": topology.name, "request": config_files.to_dict(request), "known": known}
    )
    done = subprocess.run(
        [sys.executable, "-c", "from llm_jax.plan.compiled import main; main()"],
        input=asked, capture_output=True, text=True, errors="replace", env=environment, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        told = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ConfigError(
            f"topology={topology.name!r}: the compiler ended with status {done.returncode}: "
            f"{told[-1][:300] if told else 'nothing said'}; --fast gives the estimate alone"
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    return Compiled.from_json(answer)


def main() -> None:
    """Reads a request from stdin, writes the answer as one line of JSON."""
    asked = json.load(sys.stdin)
    request = config_files.from_dict(Request, asked["request"])
    try:
        topology = parse_topology(asked["topology"])
        answer = compile_request(request, topology, asked["known"]).as_json()
    except UserError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
