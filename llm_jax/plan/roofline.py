"""An estimate of a step's time from what the chip can do at most, and assumptions that are stated.

    products   2 per multiply-add, recomputed ones included, at EFFICIENCY of the chip's peak
    traffic    bytes received over bandwidth; what does not depend on the tokens in work (gathered
               weights, gradients) runs beside the products, sums over `tensor` and gathers over
               `context` do not
    update     parameters, moments and gradients once through memory, after all else

The efficiencies are assumptions, not measurements: large bfloat16 products reach four fifths of a
TPU's peak and less of a Hopper's, whose clock drops under load; attention does less. Startup,
evaluation, checkpoints and slow hosts are not in it.
"""

from typing import NamedTuple

from llm_jax.model import flops_per_token
from llm_jax.plan.memory import Memory, matrices_of
from llm_jax.plan.request import Request
from llm_jax.plan.topology import Topology
from llm_jax.plan.traffic import Exchange, slow_share

EFFICIENCY = {"tpu": 0.8, "gpu": 0.7, "cpu": 0.8}  # of large matrix products
ATTENTION = {"tpu": 0.6, "gpu": 0.5, "cpu": 0.4}  # of attention's


class Time(NamedTuple):
    """Of one step."""

    products: float  # seconds
    traffic: float  # beside the products
    exposed: float  # traffic that is waited for
    update: float
    seconds: float  # of the step
    flops: float  # useful ones, over all devices
    recomputed: float  # flops that rematerialisation adds
    mfu: float  # useful flops per second of what all chips could do
    days: float  # of the whole run


def estimate_time(
    request: Request, topology: Topology, memory: Memory, traffic: list[Exchange]
) -> Time:
    """Reads memory and traffic as the estimates made of the same request."""
    chip, devices = topology.chip, topology.devices
    products, attention = _flops(request)
    again = (products + attention) / 3 if request.model.remat == "full" else 0.0
    if request.model.remat == "full":  # the head is never computed twice
        again -= 2 * request.tokens * request.model.embed_dim * request.model.vocab_size
    share = again / (products + attention)
    busy = products * (1 + share) / EFFICIENCY[chip.platform]
    busy += attention * (1 + share) / ATTENTION[chip.platform]
    busy /= devices * chip.flops
    hidden = sum(_seconds(request, topology, one) for one in traffic if not one.exposed)
    exposed = sum(_seconds(request, topology, one) for one in traffic if one.exposed)
    moved = 2 * (memory.parameters + memory.optimizer) + memory.gradients
    update = moved / chip.memory_bandwidth
    seconds = max(busy, hidden) + exposed + update
    flops = products + attention
    return Time(
        busy, hidden, exposed, update, seconds, flops, again,
        mfu=flops / (seconds * devices * chip.flops),
        days=request.steps * seconds / 86_400,
    )  # fmt: skip


def _flops(request: Request) -> tuple[float, float]:
    """Of one step, forward and backward: products with weights, and attention."""
    model = request.model
    whole = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    weights = matrices_of(model, whole).one_layer * model.num_layers
    products = 6.0 * (weights + model.embed_dim * model.vocab_size) * request.tokens
    return products, flops_per_token(model, request.seq_len) * request.tokens - products


def _seconds(request: Request, topology: Topology, one: Exchange) -> float:
    slow = slow_share(request, topology, one.axis)
    fast = one.bytes * (1 - slow) / topology.link_bandwidth
    return fast + one.bytes * slow / topology.chip.slow_bandwidth
