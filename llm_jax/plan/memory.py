"""Bytes one device needs for the training step, by class, counted without compiling.

Three things are exact: the state and the batch, from their shardings; and what forward keeps for
backward, from a trace of the real model as one device has it (its heads, its part of the MLP and of
the vocabulary, its rows) under the real rematerialisation policy and attention. What is worked on
for a moment is a rule, held against compiled programs (tools/results/plan.md).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding

from llm_jax.kernels.cross_entropy.xla_tiled import tile_rows
from llm_jax.model import (
    ModelConfig,
    abstract_params,
    logical_axes,
    target_loss,
    without_adapters,
)
from llm_jax.plan.chips import Chip
from llm_jax.plan.request import Request, rows_and_tokens
from llm_jax.plan.topology import Topology
from llm_jax.sharding import partition_spec
from llm_jax.train.trainable import ALL, Trainable


class Memory(NamedTuple):
    """Bytes on one device. The first three are there all the time, the rest while a step runs."""

    parameters: int  # those of a reference that answers are compared with too
    optimizer: int
    batch: int
    gradients: int  # float32, as parameters lie; twice where micro-batches are added up
    activations: int  # what forward keeps for backward
    casts: int  # matrices in the dtype of the products, made once: the layers', and gathered ones
    layer: int  # one layer's backward: its gathered matrices, activations, their gradients
    loss: int  # head, its gradient before it is scattered, a tile of logits
    total: int  # of the worst moment

    @property
    def temporaries(self) -> int:
        """What the worst moment needs besides state and batch."""
        return self.total - self.parameters - self.optimizer - self.batch


def estimate_memory(request: Request, topology: Topology) -> Memory:
    """Raises ConfigError when the run does not fit the mesh."""
    mesh = request.abstract_mesh(topology)
    sizes = dict(mesh.shape)
    model, chip = request.model, topology.chip
    parameters, trained = _parameters(model, mesh), _parameters(model, mesh, request.trainable)
    optimizer = 2 * trained + 4  # Adam's moments lie like their parameters; a step count
    rows, tokens = rows_and_tokens(request, sizes)
    micro = request.step.micro_batches
    share = sizes["tensor"]
    part = dataclasses.replace(request.trainable, first_row=request.trainable.first_row // share)
    kept = kept_for_backward(share_of_one(model, share), tokens, chip, part)
    activations = rows * kept.layers
    itemsize = jnp.dtype(model.dtype).itemsize
    matrices = matrices_of(model, sizes)
    casts = matrices.sharded * itemsize if model.dtype != model.param_dtype else 0
    # XLA gathers an embedding and a head that are not trained once, before the loop over micro-batches
    ends = (1 if model.tied_embeddings else 2) * model.vocab_size // share * model.embed_dim
    gathered = ends * itemsize if micro > 1 and sizes["fsdp"] > 1 else 0
    frozen = 0 if request.trains_vocabulary else gathered
    if request.has_reference:
        parameters += _parameters(without_adapters({}, model)[1], mesh)
        casts, frozen = 2 * casts, frozen + gathered
    casts += frozen
    gradients = trained * (2 if micro > 1 else 1)
    layer = int(WORKING[chip.platform] * rows * kept.layer) + matrices.one_layer * itemsize
    loss = rows * kept.others + _loss(request, rows * tokens, sizes)
    backward = gradients + casts + activations + layer
    at_loss = (gradients if micro > 1 else 0) + casts + activations + loss
    batch = 5 * 4 * rows * tokens * micro
    always = parameters + optimizer + batch
    return Memory(
        parameters, optimizer, batch, gradients, activations, casts, layer, loss,
        always + max(backward, at_loss),
    )  # fmt: skip


@functools.cache
def _shapes(
    model: ModelConfig, part: Trainable = ALL
) -> list[tuple[str, tuple[int, ...], tuple[str, ...], int]]:
    """Name, shape, logical axes and bytes of an entry of every parameter, or of those that are trained."""
    shapes = jax.eval_shape(part.take, abstract_params(model))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    axes = jax.tree.leaves(
        part.of_leaves(logical_axes(model)), is_leaf=lambda node: isinstance(node, tuple)
    )
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, names, x.dtype.itemsize)
        for (path, x), names in zip(leaves, axes, strict=True)
    ]


def state_bytes(request: Request) -> int:
    """Bytes of what a checkpoint holds: parameters, and two moments of those that are trained."""
    whole, trained = (
        sum(math.prod(shape) * itemsize for _, shape, _, itemsize in _shapes(request.model, part))
        for part in (ALL, request.trainable)
    )
    return whole + 2 * trained


def _parameters(model: ModelConfig, mesh: AbstractMesh, part: Trainable = ALL) -> int:
    """Bytes of one device's parameters, or of a part. Raises ConfigError where a size does not divide."""
    total = 0
    for what, shape, names, itemsize in _shapes(model, part):
        spec = partition_spec(names, shape, mesh, what)
        total += math.prod(NamedSharding(mesh, spec).shard_shape(shape)) * itemsize
    return total


class Matrices(NamedTuple):
    """The layers' factors of matrix products, in entries on one device."""

    sharded: int  # of all layers, as they are stored
    one_layer: int  # of one layer, gathered over fsdp


def matrices_of(model: ModelConfig, sizes: dict[str, int], part: Trainable = ALL) -> Matrices:
    """Scales and biases, which have no matrix' axes, left out."""
    sharded = one_layer = 0
    for what, shape, names, _ in _shapes(model, part):
        factor = len(shape) > 2 and not what.endswith(("scale", "bias"))
        if names[0] == "layers" and factor:
            split = sizes["tensor"] if _divides(shape, names, sizes["tensor"]) else 1
            sharded += math.prod(shape) // (split * sizes["fsdp"])
            one_layer += math.prod(shape[1:]) // split
    return Matrices(sharded, one_layer)


def _divides(shape: tuple[int, ...], names: tuple[str, ...], parts: int) -> bool:
    split = ("heads", "kv_heads", "mlp")
    return any(n in split and size % parts == 0 for n, size in zip(names, shape, strict=True))


def share_of_one(model: ModelConfig, tensor: int) -> ModelConfig:
    """The model as one device of the `tensor` axis has it: its heads, MLP and vocabulary."""
    heads = model.num_heads // tensor
    kv_heads = max(model.num_kv_heads // tensor, 1)
    return dataclasses.replace(
        model,
        num_heads=heads,
        num_kv_heads=min(kv_heads, heads),
        mlp_dim=model.mlp_dim // tensor,
        vocab_size=model.vocab_size // tensor,
    )


class Kept(NamedTuple):
    """Bytes that forward keeps for backward, of one row."""

    layers: int  # of all layers
    others: int  # embedding, final norm
    layer: int  # what one layer's products alone make: the measure of its working set


@functools.cache
def kept_for_backward(
    model: ModelConfig, tokens: int, chip: Chip, trained: Trainable = ALL
) -> Kept:
    """Counts the residuals of a traced gradient, of one row of `tokens`, on this kind of chip."""
    layers, others, padding = _residuals(model, tokens, chip, trained)
    # what adapters add to every product lives no longer than that
    dots = dataclasses.replace(without_adapters({}, model)[1], remat="dots")
    products = layers if model == dots else _residuals(dots, tokens, chip, ALL)[0]
    return Kept(layers + padding, others, products // model.num_layers)


@functools.cache
def _residuals(
    model: ModelConfig, tokens: int, chip: Chip, trained: Trainable
) -> tuple[int, int, int]:
    """Bytes of all layers, of the rest, and of what pads the layers' heads to a TPU's 128 lanes.

    libtpu keeps heads as its kernels take them. On few chips it pads some of them only (1B on 8: one
    of q and attention's output, k and v).
    """
    params = abstract_params(model)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)

    def saved(params: Any, batch: Any) -> Any:
        def loss(part: Any) -> jax.Array:
            return target_loss(trained.put(params, part), model, *batch)[0]

        return jax.vjp(loss, trained.take(params))[1]

    device = AbstractDevice(device_kind=chip.kind, platform=chip.platform, num_cores=chip.cores)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        jaxpr = jax.make_jaxpr(saved)(params, (ids, ids, ids, ids, weights)).jaxpr
    given = set(map(id, jaxpr.invars))
    of_weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    layers = others = padding = 0
    lanes = 128 if chip.platform == "tpu" else 1
    for variable in jaxpr.outvars:
        aval: Any = variable.aval
        if id(variable) in given or aval.shape in of_weights:  # a parameter, its cast, its gradient
            continue
        size = math.prod(aval.shape) * aval.dtype.itemsize
        if aval.shape[:1] == (model.num_layers,) and aval.ndim > 2:
            layers += size
            if aval.shape[-1] == model.head_dim:
                padding += size * (-model.head_dim % lanes) // model.head_dim
        else:
            others += size
    return layers, others, padding


# A layer's products and their gradients are alive together: twice the products, in programs for TPUs
# and GPUs. XLA for CPU orders for its threads and keeps more (measured: tests/plan/test_memory.py).
WORKING = {"tpu": 2.0, "gpu": 2.0, "cpu": 3.6}


def _loss(request: Request, tokens: int, sizes: dict[str, int]) -> int:
    model = request.model
    V, D = model.vocab_size // sizes["tensor"], model.embed_dim
    itemsize = jnp.dtype(model.dtype).itemsize
    t = tile_rows(tokens, V)
    head = D * V * itemsize
    gradient = D * V * 4 if request.trains_vocabulary else 0
    return head + gradient + 2 * t * V * 4 + 2 * tokens * D * itemsize
