"""Which mesh, micro-batches and rematerialisation a run should take: all that are allowed, estimated.

The batch stays as it is, so the objective does too. Candidates that do not fit with SPARE to spare are
left out, the rest come fastest first; of equals, the one that splits least.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import get_args, get_type_hints

from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig
from llm_jax.plan.estimate import Estimate, estimate
from llm_jax.plan.request import Request
from llm_jax.plan.topology import Topology
from llm_jax.sharding import MeshConfig

SPARE = 0.05  # of the usable memory: what the estimate may be too low
REMATS = get_args(get_type_hints(ModelConfig)["remat"])


def search(request: Request, topology: Topology) -> list[Estimate]:
    """Every way that fits, best first.

    Raises:
      ConfigError: none does.
    """
    room = topology.usable * (1 - SPARE)
    fitting: list[Estimate] = []
    least: Estimate | None = None
    for mesh in meshes(topology, request.mesh.context):
        for tried in _ways(dataclasses.replace(request, mesh=mesh), topology):
            found = estimate(tried, topology)
            if least is None or found.memory.total < least.memory.total:
                least = found
            if found.memory.total <= room:
                fitting.append(found)
    if least is None:
        raise ConfigError(
            f"topology={topology.name!r}: no mesh suits the run; {_refusal(request, topology)}"
        )
    if not fitting:
        raise ConfigError(
            f"topology={topology.name!r}: no mesh, micro-batch and remat fits {room / 2**30:.1f} GiB a "
            f"device; step.batch_size={request.step.batch_size} needs at least "
            f"{least.memory.total / 2**30:.1f} GiB: use more devices"
        )
    return sorted(fitting, key=_order)


def _order(candidate: Estimate) -> tuple[float, ...]:
    request, mesh = candidate.request, candidate.request.mesh
    splits = (mesh.tensor, request.step.micro_batches, REMATS.index(request.model.remat))
    # a percent is less than the estimate knows
    return (round(math.log(candidate.time.seconds), 2), *splits, -mesh.fsdp)


def _refusal(request: Request, topology: Topology) -> str:
    """Why not even the plainest mesh suits."""
    mesh = next(meshes(topology, request.mesh.context), None)
    if mesh is None:
        inside = topology.devices // topology.islands
        return (
            f"mesh.context={request.mesh.context} must divide {inside}, the devices of one island"
        )
    step = dataclasses.replace(request.step, micro_batches=1)
    try:
        dataclasses.replace(request, mesh=mesh, step=step).check(topology)
    except ConfigError as error:
        return str(error)
    raise AssertionError("it was among those that were tried")


def meshes(topology: Topology, context: int = 1) -> Iterator[MeshConfig]:
    """All splits over data, fsdp and tensor; tensor no further than eight devices of one island.

    `context` stays as it was stated: only who knows the documents can say what it is worth.
    """
    inside, rest = divmod(topology.devices // topology.islands, context)
    if rest:
        return
    for tensor in (1, 2, 4, 8):
        for fsdp in range(1, inside + 1):
            if inside % (tensor * fsdp) == 0:
                data = inside // (tensor * fsdp)
                yield MeshConfig(
                    data=data, fsdp=fsdp, tensor=tensor, dcn_data=topology.islands, context=context
                )


def _ways(request: Request, topology: Topology) -> Iterator[Request]:
    """Micro-batches and rematerialisation on one mesh; none where the mesh does not suit the model."""
    size = request.step.batch_size
    for micro in (2**power for power in range(size.bit_length())):
        if size % micro:
            return
        step = dataclasses.replace(request.step, micro_batches=micro)
        for remat in REMATS:
            model = dataclasses.replace(request.model, remat=remat)
            tried = dataclasses.replace(request, step=step, model=model)
            try:
                tried.check(topology)
            except ConfigError:
                return  # more micro-batches only have fewer rows
            yield tried
