"""A plan before you pay: memory, time and traffic of a run on hardware that is not here.

`estimate` counts, in a second; `compile_apart` compiles the real step for the absent devices.
"""

from llm_jax.plan.collectives import Collective
from llm_jax.plan.compiled import Compiled, compile_apart, compile_request, step_of
from llm_jax.plan.estimate import Estimate, estimate
from llm_jax.plan.request import Request
from llm_jax.plan.search import search
from llm_jax.plan.topology import Topology, parse_topology, tpu_devices

__all__ = [
    "Collective",
    "Compiled",
    "Estimate",
    "Request",
    "Topology",
    "compile_apart",
    "compile_request",
    "estimate",
    "parse_topology",
    "search",
    "step_of",
    "tpu_devices",
]
