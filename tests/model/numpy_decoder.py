"""An independent decoder in float64 numpy, one document at a time: what the papers say, without tricks."""

import math

import numpy as np

from llm_jax.model import ModelConfig


def logits(params: dict, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of a single document."""
    params = as_float64(params)
    x = params["embedding"][tokens]
    if config.position == "learned":
        x = x + params["positions"][: len(tokens)]
    for layer in range(config.num_layers):
        p = as_layer(params["layers"], layer)
        normed = norm(x, p["attention_norm"], config)
        attended = attention(normed, p["attention"], config)
        if config.residual == "sequential":
            x = x + attended
            x = x + mlp(norm(x, p["mlp_norm"], config), p["mlp"], config)
        elif config.residual == "parallel_one_norm":
            x = x + attended + mlp(normed, p["mlp"], config)
        else:
            x = x + attended + mlp(norm(x, p["mlp_norm"], config), p["mlp"], config)
    x = norm(x, params["final_norm"], config)
    return x @ (params["embedding"].T if config.tied_embeddings else params["head"])


def attention(x, p, config):
    T, H, group = len(x), config.head_dim, config.num_heads // config.num_kv_heads
    q, k, v = (
        np.einsum("td,dnh->tnh", x, p[n]) + p.get(f"{n}_bias", 0.0)
        for n in ("query", "key", "value")
    )
    if config.position == "rope":
        q, k = rope(q, config), rope(k, config)
    out = np.zeros_like(q)
    for n in range(config.num_heads):
        for t in range(T):
            scores = np.array([q[t, n] @ k[s, n // group] / math.sqrt(H) for s in range(t + 1)])
            if config.position == "alibi":
                scores += slope(n, config.num_heads) * (np.arange(t + 1) - t)
            weights = np.exp(scores - scores.max())
            out[t, n] = (weights / weights.sum()) @ v[: t + 1, n // group]
    return np.einsum("tnh,nhd->td", out, p["out"]) + p.get("out_bias", 0.0)


def slope(n, num_heads):
    """BLOOM: heads of the power of two below first, then odd steps of the power of two above."""
    below = 1
    while below * 2 <= num_heads:
        below *= 2
    return 2 ** (-8 / below * (n + 1)) if n < below else 2 ** (-4 / below * (2 * (n - below) + 1))


def rope(x, config):
    out = x.copy()
    dim = int(config.head_dim * config.rope_fraction)
    for t in range(len(x)):
        for i in range(dim // 2):
            angle = t * config.rope_theta ** (-2 * i / dim)
            a, b = (i, i + dim // 2) if config.rope_pairing == "half" else (2 * i, 2 * i + 1)
            out[t, :, a] = x[t, :, a] * math.cos(angle) - x[t, :, b] * math.sin(angle)
            out[t, :, b] = x[t, :, b] * math.cos(angle) + x[t, :, a] * math.sin(angle)
    return out


def mlp(x, p, config):
    h = x @ p["up"] + p.get("up_bias", 0.0)
    if config.mlp == "gated":
        h = activation(x @ p["gate"] + p.get("gate_bias", 0.0), config) * h
    else:
        h = activation(h, config)
    return h @ p["down"] + p.get("down_bias", 0.0)


def activation(x, config):
    erf = np.vectorize(math.erf)
    return {
        "silu": lambda: x / (1 + np.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: (
            0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "relu": lambda: np.maximum(x, 0),
        "relu_squared": lambda: np.maximum(x, 0) ** 2,
    }[config.activation]()


def norm(x, p, config):
    if config.norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps) * p["scale"] + p.get(
        "bias", 0.0
    )


def as_float64(tree):
    return {
        k: as_float64(v) if isinstance(v, dict) else np.asarray(v, np.float64)
        for k, v in tree.items()
    }


def as_layer(tree, layer):
    return {k: as_layer(v, layer) if isinstance(v, dict) else v[layer] for k, v in tree.items()}
