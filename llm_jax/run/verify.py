"""`llm-jax verify MODEL`: checks that a checkpoint or imported model is what was saved, without building the model.

1. Its record (`meta.json`) matches its own digest. 2. Every file is there, with the size and contents
recorded. 3. Every array, loaded one by one, has the fingerprint recorded.

Exit status 0 if all is well, 2 if anything is not; then the bad items are named.
"""

import logging
import os
import warnings

from llm_jax.errors import CheckpointError
from llm_jax.run import cli


def main(argv: list[str]) -> None:
    """Runs the command. Raises CheckpointError naming the first bad item."""
    parser = cli.Parser(
        prog="llm-jax verify", description="check that the files of a model are what was saved"
    )
    parser.add_argument(
        "model", help="a run folder, one of its checkpoints, or an imported model folder"
    )
    parser.add_argument(
        "--step", type=int, default=-1, help="checkpoint of a run folder (default: the newest)"
    )
    parser.add_argument("--all", action="store_true", help="every checkpoint of a run folder")
    parser.add_argument("--quiet", action="store_true", help="name bad items only")
    arguments = parser.parse_args(argv)
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # checking needs no accelerator; a running job may hold it

    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # orbax tells every damage again, over pages
    # and leaves work undone when it meets some
    warnings.filterwarnings(
        "ignore", message="coroutine .* was never awaited", category=RuntimeWarning
    )

    from llm_jax.checkpoint import find_checkpoint, inspect, numbered_folders

    newest = find_checkpoint(arguments.model, arguments.step)
    checkpoints = [newest]
    if arguments.all:
        checkpoints = [newest.parent / str(step) for step in numbered_folders(newest.parent)] or [
            newest
        ]
    bad: list[str] = []
    for checkpoint in checkpoints:
        count = 0
        try:
            for finding in inspect(checkpoint):
                count += 1
                if finding.problem:
                    bad.append(f"{checkpoint}: {finding.item}: {finding.problem}")
                    print(f"BAD  {finding.item}: {finding.problem}")
                elif not arguments.quiet:
                    print(f"OK   {finding.item}")
        except CheckpointError as error:
            bad.append(str(error))
            print(f"BAD  {error}")
        print(f"{checkpoint}: {count} items checked")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CheckpointError(f"{bad[0]}{more}; use an older checkpoint, or a copy of this one")


if __name__ == "__main__":
    cli.leave(cli.run(main))
