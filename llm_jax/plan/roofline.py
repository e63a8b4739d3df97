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

from llm_jax.model import ModelConfig, count_adapters, flops_per_token
from llm_jax.plan.collectives import Collective
from llm_jax.plan.memory import Memory, matrices_of
from llm_jax.plan.products import Products
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
    recomputed: float  # flops that rematerialisation adds, and a reference model
    mfu: float  # useful flops per second of what all chips could do
    days: float  # of the whole run


def estimate_time(
    request: Request, topology: Topology, memory: Memory, traffic: list[Exchange]
) -> Time:
    """Reads memory and traffic as the estimates made of the same request."""
    model = request.model
    products, attention = _flops(request)
    forward = 2.0 * request.tokens * sum(_multiplied(model))
    again_products = again_attention = 0.0
    if model.remat == "full":
        # neither the head nor a layer's last product, which backward has no use for
        last = model.num_layers * model.mlp_dim + model.vocab_size
        again_products = forward - 2.0 * request.tokens * model.embed_dim * last
        again_attention = attention / 3
    if request.method == "dpo":  # the reference runs forward
        again_products += forward
        again_attention += attention / 3
    done = Products(products + again_products, attention + again_attention)
    return _time(request, topology, memory, done, traffic)


def program_time(
    request: Request,
    topology: Topology,
    memory: Memory,
    products: Products,
    found: tuple[Collective, ...],
) -> Time:
    """The same of a compiled program: the products and collectives that one device was given."""
    done = Products(*(each * topology.devices for each in products))
    waited = ("tensor", "context")
    traffic = [
        Exchange(one.kind, one.axes, one.bytes, any(axis in one.axes for axis in waited))
        for one in found
    ]
    return _time(request, topology, memory, done, traffic)


def _time(
    request: Request, topology: Topology, memory: Memory, done: Products, traffic: list[Exchange]
) -> Time:
    """`done` is what all devices compute, recomputation included."""
    chip, devices = topology.chip, topology.devices
    busy = done.matrices / EFFICIENCY[chip.platform] + done.kernels / ATTENTION[chip.platform]
    busy /= devices * chip.flops
    hidden = sum(_seconds(request, topology, one) for one in traffic if not one.exposed)
    exposed = sum(_seconds(request, topology, one) for one in traffic if one.exposed)
    moved = 2 * (memory.parameters + memory.optimizer) + memory.gradients
    update = moved / chip.memory_bandwidth
    seconds = max(busy, hidden) + exposed + update
    flops = sum(_flops(request))
    return Time(
        busy, hidden, exposed, update, seconds, flops, sum(done) - flops,
        mfu=flops / (seconds * devices * chip.flops),
        days=request.steps * seconds / 86_400,
    )  # fmt: skip


def _flops(request: Request) -> tuple[float, float]:
    """Of one step, forward and backward: products with weights, and attention.

    A token meets a weight forward, for the gradient of the input, and for that of the weight if it is trained.
    """
    model = request.model
    layers, head = _multiplied(model)
    all_trained = 2.0 * (2 if model.lora.rank else 3) * (layers + head)  # as flops_per_token has it
    attention = flops_per_token(model, request.seq_len) - all_trained
    whole = request.trainable.leaves in ("all", "body")
    products = 2.0 * (layers * (2 + whole) + head * (2 + request.trains_vocabulary))
    return products * request.tokens, attention * request.tokens


def _multiplied(model: ModelConfig) -> tuple[int, int]:
    """Weights that a token is multiplied with: of all layers, adapters left out, and of the head."""
    whole = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    layers = matrices_of(model, whole).one_layer * model.num_layers - count_adapters(model)
    return layers, model.embed_dim * model.vocab_size


def _seconds(request: Request, topology: Topology, one: Exchange) -> float:
    slow = max(slow_share(request, topology, axis) for axis in one.axis.split("+"))
    fast = one.bytes * (1 - slow) / topology.link_bandwidth
    return fast + one.bytes * slow / topology.chip.slow_bandwidth
