"""Exact and near repeats by the rule of `data dedup`: the same pairs are compared, the first stays.

There, documents are numbered in reading order; of those with one band key each is compared with the first
and with the one before it; joined pairs make clusters; the earliest stays. Nothing of that depends on the
order of the work, only on the order of the documents, which the order key carries here.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from llm_jax.data.cluster.components import components
from llm_jax.data.cluster.reading import Passing
from llm_jax.data.dedup.minhash import band_keys, choose_rows, signature
from llm_jax.data.dedup.stage import EXCERPT, SAMPLES, sketch, text_digest

BANDS = "bands"
BATCH = 512  # documents sketched at once


def first_of(documents: Iterable[Passing]) -> Passing:
    """The earliest; what stays of equal texts."""
    return min(documents, key=lambda passing: passing[0])


def drop_exact(documents: Any) -> Any:
    """One document for each text."""
    return (
        documents
        | "by text" >> beam.Map(lambda passing: (text_digest(passing[1][2]), passing))
        | "first of a text" >> beam.CombinePerKey(first_of)
        | "texts" >> beam.Values()
    )


class Sketch(beam.DoFn):
    """Batches of documents -> (key, signature); tagged: ((band, key of the band), key)."""

    def __init__(self, shingle: int, rows: int) -> None:
        self._shingle, self._rows = shingle, rows

    def process(self, batch: list[Passing]) -> Iterator[Any]:
        _, signatures = sketch(self._shingle, False, [text for _, (_, _, text) in batch])
        bands = band_keys(signatures, self._rows).astype("<u8")
        # half of each value, as the index of one machine keeps them
        halves = signatures.astype("<u2")
        for (key, _), row, keys in zip(batch, halves, bands, strict=True):
            yield key, row.tobytes()
            for band, value in enumerate(keys):
                name = band.to_bytes(2, "big") + value.tobytes()
                yield beam.pvalue.TaggedOutput(BANDS, (name, key))


def pairs_of_run(_: bytes, documents: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs (earlier, later): of equal band keys each with the first and with the one before."""
    run = sorted(documents)
    for place in range(1, len(run)):
        yield run[0], run[place]
        if place > 1:
            yield run[place - 1], run[place]


def send_signature(first: bytes, found: dict[str, Iterable[bytes]]) -> Iterator[Any]:
    """The signature of the earlier to where the later's is."""
    for sent in found["signature"]:
        for later in found["later"]:
            yield later, (first, sent)


class Compare(beam.DoFn):
    """Edges (later, earlier) of the pairs that are similar enough."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def process(self, element: tuple[bytes, dict[str, Iterable[Any]]]) -> Iterator[Any]:
        later, found = element
        for own in found["signature"]:
            one = np.frombuffer(own, "<u2")
            for first, sent in found["sent"]:
                if (one == np.frombuffer(sent, "<u2")).mean() >= self._threshold:
                    yield later, first


def near_repeats(documents: Any, threshold: float, shingle: int) -> Any:
    """Pairs (repeat, the earliest of its cluster) among documents of different texts."""
    sketched = (
        documents
        | "batch for sketches" >> beam.BatchElements(min_batch_size=1, max_batch_size=BATCH)
        | "sketch"
        >> beam.ParDo(Sketch(shingle, choose_rows(threshold))).with_outputs(BANDS, main="sketched")
    )
    pairs = (
        sketched[BANDS]
        | "runs" >> beam.GroupByKey()
        | "pairs" >> beam.FlatMapTuple(pairs_of_run)
        | "each pair once" >> beam.Distinct()
    )
    edges = (
        {"signature": sketched.sketched, "later": pairs}
        | "at the earlier" >> beam.CoGroupByKey()
        | "send" >> beam.FlatMapTuple(send_signature)
    )
    edges = (
        {"signature": sketched.sketched, "sent": edges}
        | "at the later" >> beam.CoGroupByKey()
        | "compare" >> beam.ParDo(Compare(threshold))
    )
    return components(edges)


def without(key: bytes, found: dict[str, Iterable[Any]]) -> Iterator[Passing]:
    """A document that is no near repeat."""
    if not any(True for _ in found["near"]):
        for text in found["document"]:
            yield key, text


def drop_near(documents: Any, near: Any) -> Any:
    """The documents that are not the first of a pair of `near`."""
    return (
        {"document": documents, "near": near}
        | "beside repeats" >> beam.CoGroupByKey()
        | "without repeats" >> beam.FlatMapTuple(without)
    )


def pair_samples(documents: Any, near: Any, shingle: int) -> Any:
    """One list: the first near repeats as `report.json` of `data dedup` shows them."""
    chosen = near | "first repeats" >> beam.combiners.Top.Smallest(SAMPLES)
    wanted = beam.pvalue.AsSingleton(chosen)
    texts = (
        documents
        | "sampled texts"
        >> beam.Filter(lambda passing, pairs: any(passing[0] in p for p in pairs), pairs=wanted)
        | "all samples" >> beam.combiners.ToList()
    )
    return texts | "show pairs" >> beam.Map(_show_pairs, pairs=wanted, shingle=shingle)


def _show_pairs(
    documents: list[Passing], pairs: list[tuple[bytes, bytes]], shingle: int
) -> list[dict[str, Any]]:
    texts, samples = dict(documents), []
    for repeat, root in sorted(pairs):
        (source, place, text), (kept_source, kept_place, kept) = texts[repeat], texts[root]
        halves = [signature(t, shingle).astype(np.uint16) for t in (text, kept)]
        samples.append(
            {
                "dropped": f"{source}/{place}",
                "kept": f"{kept_source}/{kept_place}",
                "similarity": round(float((halves[0] == halves[1]).mean()), 3),
                "dropped_text": text[:EXCERPT],
                "kept_text": kept[:EXCERPT],
            }
        )
    return samples
