"""Instructions and their instances from a few seed tasks: Self-Instruct, in Chinese and English."""

from llm_jax.instruct.self_instruct.endpoint import Endpoint, EndpointConfig
from llm_jax.instruct.self_instruct.generator import Answer, Generator, GeneratorError, Request
from llm_jax.instruct.self_instruct.settings import FilterConfig, SelfInstructConfig

__all__ = [
    "Answer",
    "Endpoint",
    "EndpointConfig",
    "FilterConfig",
    "Generator",
    "GeneratorError",
    "Request",
    "SelfInstructConfig",
]
