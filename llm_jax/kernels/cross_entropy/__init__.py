"""Cross-entropy from hidden states: the output head and the loss in one, without the logits."""

from llm_jax.kernels.cross_entropy.api import cross_entropy, token_nats
from llm_jax.kernels.cross_entropy.reference import LossSums
from llm_jax.kernels.cross_entropy.xla_tiled import Split

__all__ = ["LossSums", "Split", "cross_entropy", "token_nats"]
