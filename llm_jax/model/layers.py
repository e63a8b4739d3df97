"""Norms, linear maps, MLP, embedding. Parameters are declared with shape, axes and initialiser on one line."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.model.config import ModelConfig
from llm_jax.sharding import constrain

Initializer = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}

HEAD_INIT = nn.initializers.normal(0.02)  # small logits: the first loss is near ln V


def fan_in(
    scale: float,
    in_axes: Sequence[int],
    out_axes: Sequence[int],
    kind: Literal["truncated_normal", "uniform"] = "truncated_normal",
) -> Initializer:
    """Of variance `scale` / fan-in, over the given axes of the shape."""
    return nn.initializers.variance_scaling(
        scale, "fan_in", kind, in_axis=in_axes, out_axis=out_axes
    )


def embedding_init(config: ModelConfig) -> Initializer:
    """Normal of variance 1, as large as what the layers add to it (T5, 1910.10683, code).

    With 0.02, GPT-2's, the demo's model has 2.94 bits per character after 100 steps, with 1 it has
    2.55: small embeddings drown in the first layer's output. A tied one is the head too, and starts
    at 1 / D so that the logits have variance 1. Where embeddings are multiplied by something, an
    untied one starts smaller by as much.
    """
    if config.tied_embeddings:
        return nn.initializers.normal(config.embed_dim**-0.5)
    return nn.initializers.normal(1 / config.embedding_multiplier)


def residual_scale(config: ModelConfig) -> float:
    """Variance factor of maps that write to the residual stream: 2L of them add up (GPT-2, section 2.3)."""
    return 1.0 / (2 * config.num_layers)


@struct.dataclass
class Named(nn.meta.AxisMetadata[jax.Array]):
    """A parameter with the names of its axes. Flax's own boxes also constrain the sharding, by mesh
    axes; here names are only names, and `llm_jax.sharding` alone says what they mean.
    """

    value: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """The bare array."""
        return self.value

    def replace_boxed(self, val: Any) -> "Named":
        """The same names around another array."""
        return Named(val, self.names)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> "Named":
        """Called by `nn.scan`: the stacked layers are a new axis."""
        name = params[nn.meta.PARTITION_NAME]
        return Named(self.value, (*self.names[:index], name, *self.names[index:]))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> "Named":
        """Called by `nn.scan` on the way into one layer."""
        return Named(self.value, (*self.names[:index], *self.names[index + 1 :]))


def declare(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str],
    init: Initializer,
    dtype: str = "",
) -> jax.Array:
    """Declares a parameter with its logical axes and returns it as it is stored.

    `dtype` is that of the storage; empty: config.param_dtype.
    """
    stored = jnp.dtype(dtype or cast(Any, module).config.param_dtype)
    boxed = lambda *arguments: Named(init(*arguments), tuple(axes))  # noqa: E731
    return cast(jax.Array, module.param(name, boxed, tuple(shape), stored))


def matrix(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str], init: Initializer
) -> jax.Array:
    """Declares a factor of a matrix product and returns it in the dtype of the computation.

    Only these are cast before use. The gradient of anything else is a sum over tokens, and in bf16 a
    sum of ones stops at 256: embeddings, scales and biases are used in float32 and cast after.
    """
    return declare(module, name, shape, axes, init).astype(cast(Any, module).config.dtype)


def add_bias(module: nn.Module, name: str, x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """x plus a declared bias over its last axes, which are named."""
    bias = declare(module, name, x.shape[-len(axes) :], axes, nn.initializers.zeros)
    return (x.astype(jnp.float32) + _aligned(bias, x)).astype(x.dtype)


def add_adapter(
    module: nn.Module,
    name: str,
    y: jax.Array,
    x: jax.Array,
    in_axes: Sequence[str],
    out_axes: Sequence[str],
) -> jax.Array:
    """y, the projection `name` of x, plus scale (x A) B where the config has an adapter on it.

    A starts as in PEFT (uniform, variance a third of 1 / fan-in), B at 0, so that nothing changes at first. Both are
    float32 whatever holds the frozen weights.

    Args:
      in_axes: names of the last axes of x, over which the product sums.
      out_axes: names of the last axes of y.
    """
    config = cast(Any, module).config
    lora = config.lora
    if not lora.rank or name not in lora.targets:
        return y
    n, rank = len(in_axes), lora.rank
    init, zeros = fan_in(1 / 3, range(n), (n,), "uniform"), nn.initializers.zeros
    a_shape, b_shape = (*x.shape[-n:], rank), (rank, *y.shape[-len(out_axes) :])
    a = declare(module, f"{name}_lora_a", a_shape, (*in_axes, "rank"), init, "float32")
    b = declare(module, f"{name}_lora_b", b_shape, ("rank", *out_axes), zeros, "float32")
    x_BTR = jnp.tensordot(x, a.astype(config.dtype), n)
    return y + lora.scale * jnp.tensordot(x_BTR, b.astype(config.dtype), 1)


def from_inputs(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Backward computes again from the inputs what lies between them and the result.

    For work by element: what it saves is written once and read once for every layer, and scan fills those
    stacks with zeros first. Norms and activations kept three arrays each that are left out now: the temporaries
    of a 125M model's step at 131,072 tokens are 40 GiB and were 81 (tools/results/h200.md).
    """
    # inside scan nothing merges the two computations; outside it, merging costs one array
    return jax.checkpoint(function, prevent_cse=False)


def _aligned(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """With axes of size 1 in front, as many as x has more."""
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)


class Norm(nn.Module):
    """RMS norm (1910.07467) or layer norm (1607.06450), computed in float32."""

    config: ModelConfig
    axes: tuple[str, ...] = ("act_embed",)  # names of the last axes: one scale for every entry
    over: int = 1  # of how many last axes mean and variance are taken
    biased: bool = True  # where the kind of norm has a bias
    multiplier: float = 1.0  # on the result, before it is rounded to config.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, ..., *axes], normed."""
        config = self.config
        shape = x.shape[-len(self.axes) :]
        plus_one = config.norm == "rms_plus_one"  # Gemma: x (1 + w)
        start = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = declare(self, "scale", shape, self.axes, start)
        bias = None
        if config.norm == "layer" and self.biased:
            bias = declare(self, "bias", shape, self.axes, nn.initializers.zeros)

        def normed(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
            last = tuple(range(-self.over, 0))
            x = x.astype(jnp.float32)
            if config.norm.startswith("layer"):
                x = x - jnp.mean(x, axis=last, keepdims=True)
            square = jnp.mean(jnp.square(x), axis=last, keepdims=True)
            x = x * jax.lax.rsqrt(square + config.norm_eps)
            x = x * _aligned(1 + scale if plus_one else scale, x)
            if bias is not None:
                x = x + _aligned(bias, x)
            return (x if self.multiplier == 1 else x * self.multiplier).astype(config.dtype)

        return from_inputs(normed)(x, scale, bias)


class Mlp(nn.Module):
    """act(x W_up) W_down, or (act(x W_gate) * x W_up) W_down (GLU variants, 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        config = self.config
        D, F = config.embed_dim, config.mlp_dim
        up_init, down_init = fan_in(1.0, (0,), (1,)), fan_in(residual_scale(config), (0,), (1,))
        h_BTF = x_BTD @ matrix(self, "up", (D, F), ("embed", "mlp"), up_init)
        h_BTF = add_adapter(self, "up", h_BTF, x_BTD, ("embed",), ("mlp",))
        if config.mlp_bias:
            h_BTF = add_bias(self, "up_bias", h_BTF, ("mlp",))
        activation = ACTIVATIONS[config.activation]
        if config.mlp == "gated":
            gate_BTF = x_BTD @ matrix(self, "gate", (D, F), ("embed", "mlp"), up_init)
            gate_BTF = add_adapter(self, "gate", gate_BTF, x_BTD, ("embed",), ("mlp",))
            if config.mlp_bias:
                gate_BTF = add_bias(self, "gate_bias", gate_BTF, ("mlp",))
            h_BTF = from_inputs(lambda gate, up: activation(gate) * up)(gate_BTF, h_BTF)
        else:
            h_BTF = from_inputs(activation)(h_BTF)
        h_BTF = constrain(h_BTF, "batch", "time", "mlp")
        out_BTD = h_BTF @ matrix(self, "down", (F, D), ("mlp", "embed"), down_init)
        out_BTD = add_adapter(self, "down", out_BTD, h_BTF, ("mlp",), ("embed",))
        return add_bias(self, "down_bias", out_BTD, ("act_embed",)) if config.mlp_bias else out_BTD
