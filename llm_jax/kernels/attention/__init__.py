"""Attention: one public op, `flash_attention`, and the implementations it chooses from."""

from llm_jax.kernels.attention.api import Choice, choose, flash_attention, make_plan
from llm_jax.kernels.attention.plan import Plan, Request, Rule

__all__ = ["Choice", "Plan", "Request", "Rule", "choose", "flash_attention", "make_plan"]
