"""`llm-jax self-instruct CONFIG`: instructions and instances from seed tasks, by a model of ours or an endpoint.

The result, OUTPUT/tasks.jsonl, is Alpaca's format and more: what `llm-jax data conversations` reads. Stopped
in any way and started again, a run goes on where it was.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_jax import config as config_files
from llm_jax.errors import ConfigError
from llm_jax.instruct.self_instruct import Answer, Endpoint, Generator, Request, SelfInstructConfig
from llm_jax.instruct.self_instruct import folder as run_folder
from llm_jax.instruct.self_instruct.pipeline import Progress, Sink, run
from llm_jax.instruct.self_instruct.report import ENDINGS, HTML_REPORT, NAMES, make_report
from llm_jax.instruct.self_instruct.request_log import RequestLog
from llm_jax.instruct.self_instruct.tasks import read_seeds, seeds_digest
from llm_jax.run import cli
from llm_jax.tokenizer.base import digest


class OwnModel:
    """A generator that is a model of ours: `llm_jax.load(MODEL).generate`, a batch at a time."""

    def __init__(self, config: SelfInstructConfig) -> None:
        """Loads the model. Raises CheckpointError if there is none."""
        from llm_jax import load

        self._model = load(config.model, config.step)
        self.together = config.batch_size

    def describe(self) -> dict[str, Any]:
        """Which model writes, wherever it lies: the digest of its arrays' fingerprints."""
        from llm_jax.checkpoint import read_meta

        arrays = digest(read_meta(self._model.path)["arrays"])
        return {"arrays_digest": arrays, "step": self._model.step}

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Answer]]:
        """Continues batches of `together` prompts; what a row draws depends on its place in the batch."""
        for first in range(0, len(requests), self.together):
            batch = requests[first : first + self.together]
            lead = batch[0]  # requests of one stage differ in key, prompt and seed only
            made = self._model.generate(
                [request.prompt for request in batch],
                max_new_tokens=lead.max_tokens,
                temperature=lead.temperature,
                top_p=lead.top_p,
                stop=lead.stop,
                seed=lead.seed,
                batch_size=self.together,
            )
            yield [
                Answer(
                    key=request.key,
                    text=generation.text,
                    finished="length" if generation.finished == "length" else "stop",
                )
                for request, generation in zip(batch, made, strict=True)
            ]


def make_generator(config: SelfInstructConfig) -> Generator:
    """Who writes. Raises ConfigError unless exactly one of the two is given."""
    if bool(config.model) == bool(config.endpoint.url):
        told = "both are given" if config.model else "neither is given"
        raise ConfigError(
            f"model={config.model!r} and endpoint.url={config.endpoint.url!r}: {told}; one of them writes, as in "
            "--model runs/first, or --endpoint.url http://localhost:8000/v1 --endpoint.model NAME"
        )
    return OwnModel(config) if config.model else Endpoint(config.endpoint)


def self_instruct(
    config: SelfInstructConfig, console: Console, *, take_over: bool = False
) -> dict[str, Any]:
    """Runs, or goes on with, a Self-Instruct run; returns its report.

    Raises:
      ConfigError, DataError: settings or seeds are not usable; nothing was written.
      CheckpointError: the folder is in use, damaged, or of other settings.
      GeneratorError: the generator cannot go on; started again, the run does.
    """
    from llm_jax.checkpoint.lock import RunLock

    seeds = read_seeds(config.seeds, config.languages, config.examples)
    generator = make_generator(config)
    provenance = {"seeds_digest": seeds_digest(seeds), "generator": generator.describe()}
    folder = Path(config.output)
    with RunLock(folder, take_over) as lock:
        run_folder.begin(folder, config, provenance)
        log = RequestLog(folder, lock.check)
        try:
            if log.repaired:
                console.print(f"{log.path}: an unfinished line of {log.repaired} bytes cut off")
            if log.begun_with:
                console.print(f"going on after {log.begun_with:,} answers in {log.path}")
            with run_folder.growing(folder) as rows:

                def after_round(progress: Progress) -> None:
                    rows.flush()
                    console.print(_line(progress, config.target), highlight=False)

                sink = Sink(rows.accept, rows.reject, after_round)
                found = run(config, seeds, lambda asked: log.ask(asked, generator), sink)
            lock.check()
            report = make_report(folder, config, provenance, found)
        finally:
            log.close()
    _print(report, console)
    console.print(f"tasks in {folder / run_folder.TASKS}, report in {folder / HTML_REPORT}")
    return report


def _line(progress: Progress, target: int) -> str:
    """What a round gave, in one line."""
    rejected = progress.instructions.total() - progress.instructions["kept"]
    return (
        f"{progress.language} round {progress.round}: {len(progress.tasks):,} of {target:,} tasks, "
        f"{progress.requests.total():,} requests, {rejected:,} instructions rejected"
    )


def _print(report: dict[str, Any], console: Console) -> None:
    """Counts by filter, a column a language."""
    languages = report["languages"]
    table = Table("", "", box=None, pad_edge=False, header_style="bold")
    for language in languages:
        table.add_column(NAMES[language], justify="right")
    for kind in ("requests", "instructions", "instances"):
        for name in next(iter(languages.values()))[kind]:
            counts = [entry[kind][name] for entry in languages.values()]
            if any(counts):
                table.add_row(kind, name, *(f"{count:,}" for count in counts))
    tasks = [f"{entry['result']['tasks']:,}" for entry in languages.values()]
    table.add_row("tasks", "", *tasks, style="bold")
    console.print(table)
    for language, entry in languages.items():
        console.print(f"{NAMES[language]} ended: {ENDINGS[entry['ended']]}", highlight=False)


def main(argv: list[str]) -> None:
    """The command."""
    parser = cli.Parser(
        prog="llm-jax self-instruct",
        description="Makes instructions and instances from seed tasks; a run that was stopped goes on.",
        epilog="Any setting is overridden as --endpoint.url http://localhost:8000/v1; OUTPUT/config.json is "
        "a CONFIG too.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a file in configs/, or a saved config.json"
    )
    parser.add_argument(
        "--take-over", action="store_true", help="ignore the lock of a run that seems alive"
    )
    known, overrides = parser.parse_known_args(argv)
    config = config_files.load(known.config, SelfInstructConfig, overrides)
    self_instruct(config, Console(soft_wrap=True), take_over=known.take_over)


if __name__ == "__main__":
    cli.leave(cli.run(main))
