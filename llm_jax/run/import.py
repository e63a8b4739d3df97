# ruff: noqa: N999 - the verb is the module name, by contract (run/cli.py)
"""`llm-jax import HF_DIR OUT`, by the name of its verb; the work is in `import_model`."""

from llm_jax.run import cli
from llm_jax.run.import_model import main

__all__ = ["main"]

if __name__ == "__main__":
    cli.leave(cli.run(main))
