"""The pipeline on one page: raw files -> rules -> language -> repeats -> token shards."""

from typing import Any

import apache_beam as beam

from llm_jax.data.cluster.reading import ReadUnit, read, train_references
from llm_jax.data.cluster.repeats import drop_exact, drop_near, near_repeats, pair_samples
from llm_jax.data.cluster.tally import to_json
from llm_jax.data.cluster.units import Unit
from llm_jax.data.cluster.writing import Encode, WriteShard, write_result, write_shards
from llm_jax.data.dedup.stage import DedupStage
from llm_jax.data.prepare import PrepareConfig


def build(
    pipeline: Any,
    units: list[Unit],
    references: list[Unit],
    reader: ReadUnit,
    dedup: DedupStage | None,
    prepare: PrepareConfig,
    files: tuple[str, ...],
    dtype: str,
) -> None:
    """Lays out the whole pipeline.

    Args:
      pipeline: to add to.
      units: what to read.
      references: what `data language` scores by.
      reader: how to clean and to tell languages.
      dedup: which repeats to drop; None drops none.
      prepare: how to make shards; `output` is the folder that workers write to.
      files: names of the tokenizer's files, which lie in `output`/tokenizer.
      dtype: of the tokens on disk.
    """
    root = prepare.output
    trained = (
        pipeline
        | "references" >> beam.Create([references])
        | "train references" >> beam.Map(train_references)
    )
    models = trained | "models" >> beam.Map(lambda found: found.models)
    # each unit to whichever worker is free
    started = pipeline | "units" >> beam.Create(units) | "spread" >> beam.Reshuffle()
    documents, tallies, records = read(started, models, reader)
    pieces = {
        "tally": tallies | "tally" >> beam.MapTuple(lambda name, t: ("tally", [name, to_json(t)])),
        "file": records | "file" >> beam.Map(lambda record: ("file", record)),
        "read": _count(documents, "read"),
        "bits": models
        | "quantiles" >> beam.Map(lambda m: ("bits", {n: r.quantiles for n, r in m.items()})),
        "reference": trained
        | "reference files" >> beam.FlatMap(lambda found: [("reference", f) for f in found.files]),
    }
    if dedup is not None:
        documents = drop_exact(documents)
        pieces["unique"] = _count(documents, "unique")
        if not dedup.exact_only:
            near = near_repeats(documents, dedup.threshold, dedup.shingle)
            samples = pair_samples(documents, near, dedup.shingle)
            pieces["pairs"] = samples | "pair samples" >> beam.Map(lambda s: ("pairs", s))
            documents = drop_near(documents, near)
    pieces["shard"] = write_shards(
        *(documents, Encode(root, files), WriteShard(root, dtype)),
        *(prepare.holdout_fraction, prepare.shard_max_tokens),
    )
    everything = tuple(pieces.values()) | "all results" >> beam.Flatten()
    listed = everything | "one list" >> beam.combiners.ToList()
    _ = listed | "write result" >> beam.Map(write_result, root)


def _count(documents: Any, kind: str) -> Any:
    """(kind, [output source, number of documents])."""
    return (
        documents
        | f"{kind}: outputs" >> beam.Map(lambda passing: passing[1][0])
        | f"{kind}: count" >> beam.combiners.Count.PerElement()
        | f"{kind}: told" >> beam.Map(lambda counted, kind: (kind, list(counted)), kind)
    )
