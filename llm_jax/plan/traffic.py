"""What one device receives from the others in a step, by kind and mesh axis, counted from the model.

Per pass over a micro-batch, in the words of the scaling book: fsdp gathers every layer's matrices for
forward and again for backward and scatters their gradients; data and context add gradients up; tensor
adds activations up twice a layer in each direction; context gathers keys and values. A ring over n
devices brings each (n - 1) / n of an array, and twice that where it is added up on all of them.
Recomputed layers (`model.remat="full"`) repeat what forward exchanges.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from llm_jax.plan.collectives import Collective
from llm_jax.plan.memory import Matrices, matrices_of
from llm_jax.plan.request import Request, rows_and_tokens
from llm_jax.plan.topology import Topology


class Exchange(NamedTuple):
    """Some collectives of a step."""

    kind: str
    axis: str
    bytes: float  # that one device receives
    exposed: bool  # nothing can be computed meanwhile


def estimate_traffic(request: Request, topology: Topology) -> list[Exchange]:
    """Everything that moves in a step; nothing on one device."""
    sizes = request.sizes(topology)
    model, micro = request.model, request.step.micro_batches
    matrices, trained = matrices_of(model, sizes), matrices_of(model, sizes, request.trainable)
    width = jnp.dtype(model.dtype).itemsize
    ends = model.vocab_size // sizes["tensor"] * model.embed_dim  # entries of head or embedding
    both = 1 if model.tied_embeddings else 2
    moving = both if request.trains_vocabulary else 0
    found = [
        Exchange("all-gather", "fsdp", 2 * _layers(matrices, model.num_layers, width), False),
        Exchange("all-gather", "fsdp", (1 + both) * ends * width, False),
        Exchange("reduce-scatter", "fsdp", _layers(trained, model.num_layers, width), False),
        Exchange("reduce-scatter", "fsdp", moving * ends * 4, False),
    ]
    shard = (_layers(trained, model.num_layers, width) + moving * ends * 4) / sizes["fsdp"]
    found += [Exchange("all-reduce", axis, 2 * shard, False) for axis in ("data", "context")]
    rows, tokens = rows_and_tokens(request, sizes)
    activation = rows * tokens * model.embed_dim * width
    forward = 2 if model.remat == "full" else 1  # how often a layer runs forward
    sums = 2 * (forward + 1) * model.num_layers
    found.append(Exchange("all-reduce", "tensor", 2.0 * sums * activation, True))
    kv_heads = max(model.num_kv_heads // sizes["tensor"], 1)
    kv = 2 * rows * request.seq_len * kv_heads * model.head_dim * width * model.num_layers
    found.append(Exchange("all-gather", "context", float(forward * kv), True))
    found.append(Exchange("reduce-scatter", "context", float(kv), True))

    def of_all(exchange: Exchange) -> Exchange:
        n = sizes[exchange.axis]
        return exchange._replace(bytes=micro * exchange.bytes * (n - 1) / n)

    return [moved for moved in map(of_all, found) if moved.bytes]


def _layers(matrices: Matrices, layers: int, width: int) -> float:
    return float(matrices.one_layer * layers * width)


def by_axis(exchanges: list[Exchange] | tuple[Collective, ...]) -> dict[str, float]:
    """Bytes received over each mesh axis."""
    found: dict[str, float] = {}
    for one in exchanges:
        axis = one.axes if isinstance(one, Collective) else one.axis
        found[axis] = found.get(axis, 0.0) + one.bytes
    return found


def slow_share(request: Request, topology: Topology, axis: str) -> float:
    """How much of an axis' traffic crosses between slices or hosts.

    Stated, `dcn_data` or `dcn_fsdp`, the exchange is done inside an island first, and 1 / islands of
    it remains. Unstated, an axis that reaches over several hosts sends everything over the slow network.
    """
    sizes = request.sizes(topology)
    if axis not in sizes:  # "?": of a program's collective over no axes of the mesh
        return 1.0 if topology.islands > 1 else 0.0
    inside = topology.devices // topology.islands
    between = {"data": request.mesh.dcn_data, "fsdp": request.mesh.dcn_fsdp}.get(axis, 1)
    names = list(sizes)
    span = math.prod(sizes[name] for name in names[names.index(axis) :])
    if between > 1:
        return between / sizes[axis]
    stated = request.mesh.dcn_data * request.mesh.dcn_fsdp > 1
    return 1.0 if not stated and topology.islands > 1 and span > inside else 0.0
