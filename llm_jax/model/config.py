"""What a decoder is: sizes and switches. One decoder, chosen by `ModelConfig`, covers the families."""

import dataclasses
from typing import Literal

from llm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context than the model was trained on."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0  # context length over original_max_seq_len
    original_max_seq_len: int = 0  # context of the unscaled model; 0 only with kind none or linear
    low_frequency_factor: float = (
        1.0  # llama3: wavelengths above original / this are fully stretched
    )
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original / this are kept
    beta_fast: float = 32.0  # yarn: turns in the original context above which a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which it is fully stretched

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"model.rope_scaling.factor={self.factor} must be at least 1")
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ConfigError(
                f"model.rope_scaling.high_frequency_factor={self.high_frequency_factor} must be above "
                f"low_frequency_factor={self.low_frequency_factor}: between them lies the blend"
            )
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ConfigError(
                f"model.rope_scaling.beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}"
            )
        if self.kind in ("llama3", "yarn") and self.original_max_seq_len < 1:
            raise ConfigError(
                f"model.rope_scaling.original_max_seq_len must be set for kind={self.kind!r}: "
                "the context length of the unscaled model"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Letters: V D L N K H F as in `llm_jax.model`."""

    vocab_size: int  # V: rows of the embedding; may exceed the tokenizer's size (padding to a shard multiple)
    embed_dim: int  # D
    num_layers: int  # L
    num_heads: int  # N: query heads
    num_kv_heads: int  # K: N for multi-head, 1 for multi-query, between for grouped-query attention
    head_dim: int  # H
    mlp_dim: int  # F
    max_seq_len: int  # context the model is meant for; a hard limit only for learned positions

    norm: Literal["rms", "layer", "layer_no_bias"] = "rms"
    norm_eps: float = 1e-5
    residual: Literal["sequential", "parallel_one_norm", "parallel_two_norms"] = "sequential"
    mlp: Literal["gated", "plain"] = "gated"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"] = "silu"
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    mlp_bias: bool = False
    tied_embeddings: bool = False  # the output head is the embedding, transposed

    position: Literal["rope", "alibi", "learned", "none"] = "rope"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of head_dim that is rotated (GPT-NeoX: 0.25)
    rope_pairing: Literal["half", "interleaved"] = (
        "half"  # dim i turns with i + H/2, or with its neighbour
    )
    rope_scaling: RopeScaling = RopeScaling()

    # of activations and matrix products; float32 products use the device's default precision, which on
    # TPUs and newer GPUs is below float32 (jax_default_matmul_precision raises it)
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the stored parameters
    # recomputed in backward: nothing, all but matrix products and attention, or all of a layer
    remat: Literal["none", "dots", "full"] = "none"
    # implementation, see kernels/attention; auto chooses by device and length
    attention: Literal["auto", "reference", "xla_chunked", "pallas_tpu", "mosaic_gpu", "cudnn"] = (
        "auto"
    )

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "embed_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_seq_len",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if not 0 < self.rope_fraction <= 1:
            raise ConfigError(
                f"model.rope_fraction={self.rope_fraction} must be above 0 and at most 1"
            )
        if self.position == "rope" and (self.rotary_dim % 2 or not self.rotary_dim):
            raise ConfigError(
                f"model.rope_fraction={self.rope_fraction} of model.head_dim={self.head_dim} rotates "
                f"{self.rotary_dim} dimensions; the number must be even and above 0"
            )
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be above 0")

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions of each head."""
        return int(self.head_dim * self.rope_fraction)
