"""`llm-jax data verify`: is a folder what was written, and was it made from what is there now?"""

import os
from typing import Any

from rich.markup import escape

from llm_jax.data.lineage import verify
from llm_jax.errors import ConfigError, DataError
from llm_jax.run.data_sources import console


def add_verify(parser: Any) -> None:
    """Arguments of `data verify`."""
    parser.add_argument("folder", help="folder made by any `llm-jax data` stage")
    parser.add_argument(
        "--root",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="folders below OLD have been moved to NEW since; repeat for more",
    )
    parser.add_argument("--quiet", action="store_true", help="print only what is wrong")


def _root(word: str) -> tuple[str, str]:
    """Reads OLD=NEW; OLD as manifests name it, an absolute path."""
    old, _, new = word.partition("=")
    if not os.path.isabs(old) or not os.path.isdir(new):
        raise ConfigError(
            f"--root {word!r} must be OLD=NEW, OLD an absolute path of then and NEW a folder of now"
        )
    return os.path.normpath(old), os.path.abspath(new)


def verify_chain(arguments: Any) -> None:
    """Runs `data verify`: exit status 2 when any file of the chain is not what was recorded."""
    bad: list[str] = []
    count = depth = 0
    for finding in verify(arguments.folder, roots=tuple(map(_root, arguments.root))):
        count, depth = count + 1, max(depth, finding.depth)
        indent = "  " * finding.depth
        if finding.problem:
            bad.append(f"{finding.item}: {finding.problem}")
            console.print(f"{indent}[bold red]BAD[/]  {escape(bad[-1])}", soft_wrap=True)
        elif not arguments.quiet:
            console.print(f"{indent}OK   {escape(finding.item)}", soft_wrap=True)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; make the folder again from this stage on")
    console.print(f"{count} items of {depth + 1} levels are what was recorded")
