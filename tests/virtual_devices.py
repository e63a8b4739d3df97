"""Environments for processes of their own: the number of virtual devices is fixed when jax starts."""

import os


def with_devices(count: int, **more: str) -> dict[str, str]:
    """This process' environment, its XLA flags included (tests/conftest.py), with CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), **more}
