"""Strict settings for every test: CPU, no silent rank promotion, warnings as errors (pyproject.toml)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Programs that few steps use: LLVM's optimisation is a third of the suite's time. XLA_FLAGS= tests with it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
