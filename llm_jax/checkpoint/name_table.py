"""The table behind `names`: for each family its tensors, our paths and the pattern between them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llm_jax.model import ModelConfig


class Row(NamedTuple):
    """A row of the table; `{i}` in the name counts layers, `{h}` heads."""

    name: str
    paths: tuple[str, ...]
    pattern: str
    when: Callable[[ModelConfig], bool] = lambda config: True


def rows(*triples: tuple[str, str | Sequence[str], str]) -> tuple[Row, ...]:
    """Rows from (name, our path or paths, pattern)."""
    return tuple(
        Row(name, (paths,) if isinstance(paths, str) else tuple(paths), pattern)
        for name, paths, pattern in triples
    )


QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
QKV_BIAS = tuple(f"{path}_bias" for path in QKV)


def norm(
    name: str, path: str, when: Callable[[ModelConfig], bool] = lambda config: True
) -> tuple[Row, ...]:
    """Scale and, where there is one, bias."""
    return (
        Row(f"{name}.weight", (f"{path}/scale",), "D -> D", when),
        Row(f"{name}.bias", (f"{path}/bias",), "D -> D", when),
    )


def linear(name: str, path: str, weight: str, bias: str) -> tuple[Row, ...]:
    """A weight and, where there is one, a bias."""
    return rows((f"{name}.weight", path, weight), (f"{name}.bias", f"{path}_bias", bias))


def attention(prefix: str, *names: str) -> tuple[Row, ...]:
    """Four projections of their own, PyTorch's way round: q, k, v, out."""
    q, k, v, out = (f"{prefix}.{name}" for name in names)
    return (
        *linear(q, QKV[0], "(N H) D -> D N H", "(N H) -> N H"),
        *linear(k, QKV[1], "(K H) D -> D K H", "(K H) -> K H"),
        *linear(v, QKV[2], "(K H) D -> D K H", "(K H) -> K H"),
        *linear(out, "layers/attention/out", "D (N H) -> N H D", "D -> D"),
    )


def fused(name: str, layout: str, *, transposed: bool = False) -> tuple[Row, ...]:
    """q, k and v in one tensor; `layout` is of its rows, or columns if transposed (Conv1D)."""
    weight = f"D ({layout} H) -> D h H" if transposed else f"({layout} H) D -> D h H"
    return rows((f"{name}.weight", QKV, weight), (f"{name}.bias", QKV_BIAS, f"({layout} H) -> h H"))


PACKED, BY_GROUP = "[N,K,K]", "K [G,1,1]"  # by group; per head where K = N


def mlp(
    prefix: str, up: str, down: str, gate: str = "", *, transposed: bool = False
) -> tuple[Row, ...]:
    """Two or three maps."""
    to_f, to_d = ("D F -> D F", "F D -> F D") if transposed else ("F D -> D F", "D F -> F D")
    return (
        *(linear(f"{prefix}.{gate}", "layers/mlp/gate", to_f, "F -> F") if gate else ()),
        *linear(f"{prefix}.{up}", "layers/mlp/up", to_f, "F -> F"),
        *linear(f"{prefix}.{down}", "layers/mlp/down", to_d, "D -> D"),
    )


def ends(embedding: str, final_norm: str, head: str = "lm_head") -> tuple[Row, ...]:
    """What stands before and after the layers."""
    return (
        *rows((f"{embedding}.weight", "embedding", "V D -> V D")),
        *norm(final_norm, "final_norm"),
        *rows((f"{head}.weight", "head", "V D -> D V")),
    )


def qk_norm(q: str, k: str, pattern: str) -> tuple[Row, ...]:
    """Norms of queries and keys; `h` in the pattern is N or K."""
    return tuple(
        row
        for name, path, heads in ((q, "query_norm", "N"), (k, "key_norm", "K"))
        for row in rows(
            (f"{name}.weight", f"layers/attention/{path}/scale", pattern.replace("h", heads)),
            (f"{name}.bias", f"layers/attention/{path}/bias", pattern.replace("h", heads)),
        )
    )


HEAD_BIAS = rows(("lm_head.bias", "head_bias", "V -> V"))

L = "model.layers.{i}"
T = "transformer.h.{i}"
OUT = "layers/attention/out"

# Llama's names, which most families took over; the norms differ
TRUNK = (
    *ends("model.embed_tokens", "model.norm"),
    *attention(f"{L}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
)
GATED = mlp(f"{L}.mlp", "up_proj", "down_proj", "gate_proj")
PRE_NORMS = (
    *norm(f"{L}.input_layernorm", "layers/attention_norm"),
    *norm(f"{L}.post_attention_layernorm", "layers/mlp_norm"),
)
LLAMA = (*TRUNK, *PRE_NORMS, *GATED)
HEAD_NORM = qk_norm(f"{L}.self_attn.q_norm", f"{L}.self_attn.k_norm", "H -> H")
FOUR_NORMS = (
    *norm(f"{L}.input_layernorm", "layers/attention_norm"),
    *norm(f"{L}.post_attention_layernorm", "layers/attention_out_norm"),
    *norm(f"{L}.pre_feedforward_layernorm", "layers/mlp_norm"),
    *norm(f"{L}.post_feedforward_layernorm", "layers/mlp_out_norm"),
)
GPT2_ENDS = (
    *ends("transformer.wte", "transformer.ln_f"),
    *rows(("transformer.wpe.weight", "positions", "P D -> P D")),
    *norm(f"{T}.ln_1", "layers/attention_norm"),
    *norm(f"{T}.ln_2", "layers/mlp_norm"),
)


def two_norms(config: ModelConfig) -> bool:
    """Falcon-40B, whose two norms of one input have names of their own."""
    return config.residual == "parallel_two_norms"


def one_norm(config: ModelConfig) -> bool:
    """The other Falcons."""
    return not two_norms(config)


ROWS: dict[str, tuple[Row, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "granite"), LLAMA),
    "qwen3": (*LLAMA, *HEAD_NORM),
    "gemma2": (*TRUNK, *FOUR_NORMS, *GATED),
    "gemma3_text": (*TRUNK, *FOUR_NORMS, *GATED, *HEAD_NORM),
    "cohere": (
        *LLAMA, *qk_norm(f"{L}.self_attn.q_norm", f"{L}.self_attn.k_norm", "h H -> h H"),
    ),
    "stablelm": (
        *LLAMA,
        *qk_norm(
            f"{L}.self_attn.q_layernorm.norms.{{h}}", f"{L}.self_attn.k_layernorm.norms.{{h}}", "H -> H"
        ),
    ),
    "olmo2": (
        *TRUNK, *GATED,
        *norm(f"{L}.post_attention_layernorm", "layers/attention_out_norm"),
        *norm(f"{L}.post_feedforward_layernorm", "layers/mlp_out_norm"),
        *qk_norm(f"{L}.self_attn.q_norm", f"{L}.self_attn.k_norm", "(h H) -> h H"),
    ),
    "starcoder2": (*TRUNK, *PRE_NORMS, *mlp(f"{L}.mlp", "c_fc", "c_proj")),
    "phi": (
        *ends("model.embed_tokens", "model.final_layernorm"), *HEAD_BIAS,
        *norm(f"{L}.input_layernorm", "layers/attention_norm"),
        *attention(f"{L}.self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        *qk_norm(f"{L}.self_attn.q_layernorm", f"{L}.self_attn.k_layernorm", "H -> H"),
        *mlp(f"{L}.mlp", "fc1", "fc2"),
    ),
    "gpt2": (
        *GPT2_ENDS,
        *fused(f"{T}.attn.c_attn", PACKED, transposed=True),
        *linear(f"{T}.attn.c_proj", OUT, "(N H) D -> N H D", "D -> D"),
        *mlp(f"{T}.mlp", "c_fc", "c_proj", transposed=True),
    ),
    "gpt_bigcode": (  # multi-query is packed, multi-head per head: both are one group a kv head
        *GPT2_ENDS,
        *fused(f"{T}.attn.c_attn", BY_GROUP),
        *linear(f"{T}.attn.c_proj", OUT, "D (N H) -> N H D", "D -> D"),
        *mlp(f"{T}.mlp", "c_fc", "c_proj"),
    ),
    "gptj": (
        *ends("transformer.wte", "transformer.ln_f"), *HEAD_BIAS,
        *norm(f"{T}.ln_1", "layers/attention_norm"),
        *attention(f"{T}.attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        *mlp(f"{T}.mlp", "fc_in", "fc_out"),
    ),
    "gpt_neox": (
        *ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        *norm("gpt_neox.layers.{i}.input_layernorm", "layers/attention_norm"),
        *norm("gpt_neox.layers.{i}.post_attention_layernorm", "layers/mlp_norm"),
        *fused("gpt_neox.layers.{i}.attention.query_key_value", BY_GROUP),
        *linear("gpt_neox.layers.{i}.attention.dense", OUT, "D (N H) -> N H D", "D -> D"),
        *mlp("gpt_neox.layers.{i}.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bloom": (
        *ends("transformer.word_embeddings", "transformer.ln_f"),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *norm(f"{T}.input_layernorm", "layers/attention_norm"),
        *norm(f"{T}.post_attention_layernorm", "layers/mlp_norm"),
        *fused(f"{T}.self_attention.query_key_value", BY_GROUP),
        *linear(f"{T}.self_attention.dense", OUT, "D (N H) -> N H D", "D -> D"),
        *mlp(f"{T}.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "falcon": (
        *ends("transformer.word_embeddings", "transformer.ln_f"),
        *norm(f"{T}.ln_attn", "layers/attention_norm", two_norms),
        *norm(f"{T}.ln_mlp", "layers/mlp_norm", two_norms),
        *norm(f"{T}.input_layernorm", "layers/attention_norm", one_norm),
        *norm(f"{T}.post_attention_layernorm", "layers/mlp_norm", one_norm),
        *fused(f"{T}.self_attention.query_key_value", BY_GROUP),
        *linear(f"{T}.self_attention.dense", OUT, "D (N H) -> N H D", "D -> D"),
        *mlp(f"{T}.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "mpt": (
        *ends("transformer.wte", "transformer.norm_f"),
        *norm("transformer.blocks.{i}.norm_1", "layers/attention_norm"),
        *norm("transformer.blocks.{i}.norm_2", "layers/mlp_norm"),
        *fused("transformer.blocks.{i}.attn.Wqkv", PACKED),
        *linear("transformer.blocks.{i}.attn.out_proj", OUT, "D (N H) -> N H D", "D -> D"),
        *mlp("transformer.blocks.{i}.ffn", "up_proj", "down_proj"),
    ),
}  # fmt: skip

# what a head is called, of any family
HEADS = {row.name for rows in ROWS.values() for row in rows if row.paths == ("head",)}

# what names of saves of the model without its head lack in front; "model." where it is not said
PREFIX = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "bloom", "falcon", "mpt"), "transformer."),
    "gpt_neox": "gpt_neox.",
}

# names that older saves have besides, of any family and of one
IGNORED: dict[str, tuple[str, ...]] = {
    "": (r"(.*\.)?rotary_emb\.inv_freq", r"(.*\.)?attn\.(masked_)?bias", r"lm_head\.weight"),
    "gpt_neox": (
        r"(.*\.)?attention\.(masked_)?bias", r"(.*\.)?attention\.rotary_emb\.inv_freq", r"embed_out\.weight",
    ),
    "falcon": (r"(.*\.)?maybe_rotary\.inv_freq",),
}  # fmt: skip
