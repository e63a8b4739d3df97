"""Attention: one public op, `flash_attention`, and the implementations it chooses from."""

from llm_jax.kernels.attention.api import Choice, choose, flash_attention

__all__ = ["Choice", "choose", "flash_attention"]
