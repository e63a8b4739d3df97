"""`llm-jax report RUN`: prints where a run's time went and writes RUN/report.html, from the run's files alone."""

import json
from pathlib import Path

from llm_jax.checkpoint.record import replace_file
from llm_jax.report.goodput import goodput, ledger_lines, sessions, totals
from llm_jax.report.page import run_page
from llm_jax.report.run_files import read_run
from llm_jax.run import cli


def main(argv: list[str]) -> None:
    """The command. Raises ConfigError if RUN is no run folder."""
    parser = cli.Parser(prog="llm-jax report", description="Shows a run from its files.")
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--output", help="the page (default: RUN/report.html)")
    parser.add_argument(
        "--json", action="store_true", help="the ledger as one JSON object, no page"
    )
    arguments = parser.parse_args(argv)
    run = read_run(Path(arguments.run))
    found = sessions(run.events)
    if arguments.json:
        sums = {name: round(seconds, 3) for name, seconds in totals(found).items()}
        print(json.dumps({"sessions": len(found), "seconds": sums, "goodput": goodput(sums)}))
        return
    print("\n".join(ledger_lines(found)))
    output = Path(arguments.output or run.folder / "report.html")
    replace_file(output, run_page(run).encode())
    print(f"page       {output}")


if __name__ == "__main__":
    cli.leave(cli.run(main))
