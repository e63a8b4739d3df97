"""Units -> documents that went through the rules and the language, and what was counted on the way."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam

from llm_jax.data.clean.report import RuleCounts
from llm_jax.data.clean.rules import CleanConfig, Outcome, cleaner
from llm_jax.data.cluster.tally import merge, tally
from llm_jax.data.cluster.units import Unit, at_hand, fetched_rules, order_key, read_unit
from llm_jax.data.documents import Rejects
from llm_jax.data.language_stage import language_judge
from llm_jax.data.ngram_score import Reference, train
from llm_jax.data.sift import Judgement, Seen

TALLY, FILES = "tally", "files"

# a document on its way: (order key, (name of its output source, where it comes from, text));
# plain tuples, which Beam's coders know
Passing = tuple[bytes, tuple[str, str, str]]


class ReadUnit(beam.DoFn):
    """Reads one unit in order. Main output: `Passing`; tagged: a `Tally` and the files' records."""

    def __init__(
        self, rules: CleanConfig | None, keep: tuple[str, ...] | None, max_bits: float
    ) -> None:
        self._rules = rules  # None: no cleaning
        self._keep = keep  # None: languages are not told
        self._max_bits = max_bits

    def setup(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="llm-jax-")
        self._folder = Path(self._scratch.name)
        if self._rules is not None:
            self._clean = cleaner(fetched_rules(self._rules, self._folder))

    def teardown(self) -> None:
        self._scratch.cleanup()

    def process(self, unit: Unit, models: dict[str, Reference]) -> Iterator[Any]:
        rejects, seen = Rejects(), Seen()
        rules = RuleCounts(self._rules.rules if self._rules else ())
        judge = language_judge(self._keep or (), models, self._max_bits)
        with at_hand(unit, self._folder) as (here, records):
            for number, document in enumerate(read_unit(here, rejects)):
                outcome = Outcome(document.text, (), "", None)
                if self._rules is not None:
                    outcome = self._clean(document.text)
                    rules.add(document, outcome)
                if outcome.rejected_by:
                    continue
                document = document._replace(text=outcome.text)
                judgement = Judgement(True, "")
                if self._keep is not None:
                    judgement = judge(document.text)
                    seen.add(document, judgement)
                if judgement.keep:
                    output = document.source + judgement.suffix
                    label = judgement.suffix.removeprefix(".")
                    yield order_key(unit, label, number), (output, document.id, document.text)
        counted = unit.source.name, tally(unit.number, rejects, rules, seen)
        yield beam.pvalue.TaggedOutput(TALLY, counted)
        for record in records:
            yield beam.pvalue.TaggedOutput(FILES, (unit.source.name, unit.number, record))


class Trained(NamedTuple):
    """The models of `data language` by language, and what they were trained on."""

    models: dict[str, Reference]
    files: list[tuple[str, int, dict[str, Any]]]  # (source, unit, record) of each file


def train_references(units: list[Unit]) -> Trained:
    """Trains all models on one worker."""
    files: list[tuple[str, int, dict[str, Any]]] = []

    def texts(name: str) -> Iterator[str]:
        for unit in units:
            if unit.source.name == name:
                with at_hand(unit, Path(folder)) as (here, records):
                    files.extend((name, unit.number, record) for record in records)
                    for document in read_unit(here, Rejects()):
                        yield document.text

    with tempfile.TemporaryDirectory(prefix="llm-jax-") as folder:
        names = dict.fromkeys(unit.source.name for unit in units)
        return Trained({name: train(texts(name)) for name in names}, files)


def read(units: Any, models: Any, reader: ReadUnit) -> tuple[Any, Any, Any]:
    """Documents, a tally by source, and (source, unit, record) of each file read."""
    outputs = units | "read" >> beam.ParDo(
        reader, models=beam.pvalue.AsSingleton(models)
    ).with_outputs(TALLY, FILES, main="documents")
    tallies = outputs[TALLY] | "merge tallies" >> beam.CombinePerKey(merge)
    return outputs.documents, tallies, outputs[FILES]
