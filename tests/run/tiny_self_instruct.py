"""Self-Instruct as users write it, small: the paper's settings, few tasks. Tests say where and who writes."""

from llm_jax.instruct.self_instruct import SelfInstructConfig


def config() -> SelfInstructConfig:
    """Six examples a prompt, three prompts a round, at least 24 tasks of each language."""
    return SelfInstructConfig(
        output="unnamed",
        target=24,
        requests_per_round=3,
        human_examples=4,
        max_requests=400,
        patience=4,
    )
