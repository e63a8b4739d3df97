"""What a decoder is: sizes and switches. One decoder, chosen by `ModelConfig`, covers the families."""

import dataclasses
from typing import Literal

from llm_jax.config import nearest
from llm_jax.errors import ConfigError

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context than the model was trained on."""

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0  # context length over original_max_seq_len
    original_max_seq_len: int = 0  # context of the unscaled model; 0 only with kind none or linear
    low_frequency_factor: float = (
        1.0  # llama3: wavelengths above original / this are fully stretched
    )
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original / this are kept
    beta_fast: float = 32.0  # yarn: turns in the original context above which a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which it is fully stretched
    truncate: bool = True  # yarn: the blend starts and ends at whole dimensions
    attention_factor: float = 0.0  # yarn, longrope: on rotated q and k; 0: by the kind's own rule
    # longrope: divisor of each pair's frequency, in documents up to original_max_seq_len and longer
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

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
        if self.attention_factor < 0:
            raise ConfigError(
                f"model.rope_scaling.attention_factor={self.attention_factor} must be 0 (off) or above"
            )
        for name in ("short_factors", "long_factors"):
            if any(factor <= 0 for factor in getattr(self, name)):
                raise ConfigError(f"model.rope_scaling.{name} must all be above 0")
        if self.kind not in ("none", "linear") and self.original_max_seq_len < 1:
            raise ConfigError(
                f"model.rope_scaling.original_max_seq_len must be set for kind={self.kind!r}: "
                "the context length of the unscaled model"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """Slopes of the bias on attention scores that grows with distance (2108.12409)."""

    max: float = 8.0  # the flattest slope is 2^-max, for a power of two
    scaled: bool = False  # the bias is added before the scores are scaled (Falcon)

    def __post_init__(self) -> None:
        if self.max <= 0:
            raise ConfigError(f"model.alibi.max={self.max} must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Layers whose tokens see a window only. Layer i (from 0) is one if window is set, i >= first,
    and i + 1 is no multiple of full_every.
    """

    window: int = 0  # positions in sight, the token's own included; 0: no layer is local
    first: int = 0  # Qwen2: layers below see all
    full_every: int = 0  # Gemma 2: 2, Gemma 3: 6; 0: never
    rope_theta: float = 0.0  # of local layers, which are then not stretched (Gemma 3); 0: as others

    def has(self, layer: int) -> bool:
        """Whether this layer is local."""
        full = self.full_every and (layer + 1) % self.full_every == 0
        return bool(self.window) and layer >= self.first and not full

    def __post_init__(self) -> None:
        for name in ("window", "first", "full_every", "rope_theta"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.local.{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters beside projections: x W becomes x W + scale (x A) B (2106.09685)."""

    rank: int = 0  # columns of every A; 0: there are no adapters
    alpha: float = 16.0  # scale is alpha / rank
    rank_stabilised: bool = False  # scale is alpha / sqrt(rank), right for large ranks (2312.03732)
    targets: tuple[str, ...] = (
        PROJECTIONS  # those with adapters; one that the model lacks is left out
    )

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"model.lora.rank={self.rank} must be 0 (no adapters) or above")
        if self.alpha <= 0:
            raise ConfigError(f"model.lora.alpha={self.alpha} must be above 0")
        for target in self.targets:
            if target not in PROJECTIONS:
                raise ConfigError(
                    f"model.lora.targets: {target!r} is no projection; {nearest(target, PROJECTIONS)}"
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"model.lora.targets={list(self.targets)} must name projections, each once"
            )

    @property
    def scale(self) -> float:
        """Factor on (x A) B, where there are adapters."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


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

    norm: Literal["rms", "rms_plus_one", "layer", "layer_no_bias"] = "rms"  # plus one: x (1 + w)
    norm_eps: float = 1e-5
    # of a sub-layer's input, its output (OLMo-2) or both (Gemma 2, four norms a layer)
    norm_placement: Literal["input", "output", "both"] = "input"
    # from_norm: what is carried past a sub-layer is its normed input (a flag of BLOOM)
    residual: Literal["sequential", "from_norm", "parallel_one_norm", "parallel_two_norms"] = (
        "sequential"
    )
    residual_multiplier: float = 1.0  # on what each sub-layer adds (Granite)
    embedding_norm: bool = False  # BLOOM
    embedding_multiplier: float = 1.0  # Gemma: sqrt(D)
    mlp: Literal["gated", "plain"] = "gated"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"] = "silu"
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    mlp_bias: bool = False
    tied_embeddings: bool = False  # the output head is the embedding, transposed
    head_bias: bool = False
    logit_multiplier: float = 1.0  # Cohere; of the hidden states, so before the soft-cap
    logit_soft_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: not (Gemma 2: 30)

    # of q and k before rotation, of the kind of `norm`: over each head with one scale for all (Qwen3,
    # Gemma 3, Phi), over each head with a scale of its own and no bias (StableLM, Cohere), or over all
    # heads together (OLMo-2)
    qk_norm: Literal["none", "head", "each_head", "whole"] = "none"
    qkv_clip: float = 0.0  # q, k and v are clipped to +- this (MPT); 0: not
    attention_scale: float = 0.0  # on q.k; 0: head_dim**-0.5
    attention_soft_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: not (Gemma 2: 50)
    local: Local = Local()

    position: Literal["rope", "alibi", "learned", "none"] = "rope"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of head_dim that is rotated (GPT-NeoX: 0.25)
    rope_pairing: Literal["half", "interleaved"] = (
        "half"  # dim i turns with i + H/2, or with its neighbour
    )
    rope_scaling: RopeScaling = RopeScaling()
    alibi: Alibi = Alibi()
    lora: Lora = Lora()

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
        self._check_switches()

    def _check_switches(self) -> None:
        for name in (
            "norm_eps", "rope_theta", "residual_multiplier", "embedding_multiplier", "logit_multiplier",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be above 0")
        for name in ("logit_soft_cap", "qkv_clip", "attention_scale", "attention_soft_cap"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be 0 (off) or above")
        if self.norm_placement != "input" and self.residual != "sequential":
            raise ConfigError(
                f"model.norm_placement={self.norm_placement!r} needs model.residual='sequential', "
                f"not {self.residual!r}"
            )
        if self.local.rope_theta and self.position != "rope":
            raise ConfigError(
                f"model.local.rope_theta={self.local.rope_theta} needs model.position='rope'"
            )
        scaling = self.rope_scaling
        if scaling.kind == "longrope" and self.position == "rope":
            for name in ("short_factors", "long_factors"):
                count = len(getattr(scaling, name))
                if count != self.rotary_dim // 2:
                    raise ConfigError(
                        f"model.rope_scaling.{name} has {count} numbers; longrope needs one for each "
                        f"of the {self.rotary_dim // 2} rotated pairs"
                    )
        if scaling.kind == "dynamic" and self.position == "rope" and self.rotary_dim < 4:
            raise ConfigError(
                f"model.rope_scaling.kind='dynamic' needs 4 rotated dimensions, not {self.rotary_dim}"
            )

    @property
    def score_scale(self) -> float:
        """Factor on q.k."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Of every layer: whether it sees a window only."""
        return tuple(self.local.has(layer) for layer in range(self.num_layers))

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions of each head."""
        return int(self.head_dim * self.rope_fraction)
