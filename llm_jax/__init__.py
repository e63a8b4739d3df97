"""Raw text to an instruction-tuned language model in JAX.

    import llm_jax

    model = llm_jax.load("runs/demo")
    model.generate(["The moon"], max_new_tokens=40, seed=1)[0].text
    model.score(["The moon is bright."])[0].bits_per_character

Importing this loads neither jax nor any extra; `load` does when it is first used.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_jax.api import Model, load

__all__ = ["Model", "__version__", "load"]

try:
    __version__ = _version("llm-jax")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from llm_jax import api

        return {"Model": api.Model, "load": api.load}[name]
    raise AttributeError(f"module 'llm_jax' has no attribute {name!r}")
