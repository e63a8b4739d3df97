"""`llm-jax import HF_DIR OUT`, by the name of its verb; the work is in `import_model`."""

from llm_jax.run import cli
from llm_jax.run.import_model import main

__all__ = ["main"]

if __name__ == "__main__":
    cli.leave(cli.run(main))
