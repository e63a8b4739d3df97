"""Everything that is known without compiling, of one request on one topology."""

from typing import NamedTuple

from llm_jax.plan.memory import Memory, estimate_memory
from llm_jax.plan.request import Request
from llm_jax.plan.roofline import Time, estimate_time
from llm_jax.plan.topology import Topology
from llm_jax.plan.traffic import Exchange, estimate_traffic


class Estimate(NamedTuple):
    """Memory of one device, time of one step, and what one device receives in it."""

    request: Request
    memory: Memory
    time: Time
    traffic: list[Exchange]


def estimate(request: Request, topology: Topology) -> Estimate:
    """Raises ConfigError when model, batch or tokens do not fit the mesh."""
    memory = estimate_memory(request, topology)
    traffic = estimate_traffic(request, topology)
    return Estimate(request, memory, estimate_time(request, topology, memory, traffic), traffic)
