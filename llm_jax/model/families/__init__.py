"""A Hugging Face `config.json` as a `ModelConfig` and back, for every family the decoder covers.

One decoder, many families: a family is no code but a list of rules (`table`), so what a family is can
be read off a page. What no rule knows is refused by name, never ignored: a field that changed the
maths unseen would give a fluent model with wrong logits.
"""

from llm_jax.model.families.api import canonical, family_of, read, write
from llm_jax.model.families.table import FAMILIES

__all__ = ["FAMILIES", "canonical", "family_of", "read", "write"]
