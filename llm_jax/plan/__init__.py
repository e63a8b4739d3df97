"""Compiling ahead of time, for hardware that is not here."""

from llm_jax.plan.topology import tpu_devices

__all__ = ["tpu_devices"]
