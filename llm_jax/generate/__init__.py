"""Text from a model: sampling, decoding with a KV cache, streaming whole characters."""

from llm_jax.generate.decode import Generation, Piece, generate, stream
from llm_jax.generate.sampling import SamplingConfig
from llm_jax.generate.text_stream import TextStream

__all__ = ["Generation", "Piece", "SamplingConfig", "TextStream", "generate", "stream"]
