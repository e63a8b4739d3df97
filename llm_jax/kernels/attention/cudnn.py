"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: what it can do, and nothing else.

It knows full, causal and windowed attention over whole rows. Segments, positions, ALiBi and soft-cap
are refused: its public interface has no argument for them, and one left out is a wrong result.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention.plan import Plan, Request, Rule
from llm_jax.kernels.device import Device

# chips older than Ampere have no such kernel
TOO_OLD = ("V100", "T4", "P100", "RTX 20")


def refuses(request: Request, device: Device) -> str | None:
    """Why cuDNN cannot take this call; None: it can."""
    features = {
        "segments": request.segments,
        "positions": request.positions,
        "ALiBi": request.alibi,
        "a soft-cap": bool(request.rule.soft_cap),
        "gradient of the log-sum-exp": request.lse,
    }
    missing = [name for name, wanted in features.items() if wanted]
    if device.platform != "gpu" or any(kind in device.kind for kind in TOO_OLD):
        return f"needs an NVIDIA GPU from Ampere on, not {device.kind}"
    if missing:
        return f"knows no {', '.join(missing)}"
    if request.dtype not in ("bfloat16", "float16"):
        return f"needs bfloat16 or float16, not {request.dtype}"
    if request.H % 8 or request.H > 128:
        return f"needs a head size that is a multiple of 8, at most 128, not {request.H}"
    if request.rule.causal and request.T != request.S:
        return f"aligns causal rows at the start, and T={request.T} is not S={request.S}"
    return None


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`, with a log-sum-exp that passes no gradient on."""
    out_BTNH, lse_BTN = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=rule.scale,
        is_causal=rule.causal,
        local_window_size=(rule.window - 1, 0) if rule.window else None,
        implementation="cudnn",
        return_residual=True,
    )
    lse_BTN = jax.lax.stop_gradient(lse_BTN.astype(jnp.float32))
    return checkpoint_name(out_BTNH, "attention_out"), checkpoint_name(lse_BTN, "attention_lse")
