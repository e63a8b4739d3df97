"""The parts that Beam regroups at will give what the loops of one machine give."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("apache_beam")

from llm_jax.data.cluster.components import ROUNDS, both_ways, large_star, settled, small_star
from llm_jax.data.cluster.holdout import (
    END,
    least_and_count,
    moves,
    nearer_and_nearer,
    split_of,
    switch_of,
)
from llm_jax.data.cluster.writing import first_blocks
from llm_jax.data.shard_writer import Encoded, HoldOut
from llm_jax.data.shards import SPLITS
from llm_jax.errors import DataError


def grouped(pairs):
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def stars(edges):
    """`components` with dictionaries for GroupByKey."""
    for _ in range(ROUNDS):
        around = grouped(way for edge in edges for way in both_ways(edge))
        below = grouped(e for node, n in around.items() for e in large_star(node, n))
        edges = [edge for node, n in below.items() for edge in small_star(node, n)]
    roots = grouped(edges)
    children = grouped((root, child) for child, root in edges)
    nodes = {*roots, *children}
    found = ((n, {"root": roots.get(n, []), "child": children.get(n, [])}) for n in nodes)
    return dict(edge for node, both in found for edge in settled(node, both))


def least_of_cluster(count, edges):
    first = list(range(count))
    for _ in range(count):
        for a, b in edges:
            first[a] = first[b] = min(first[a], first[b])
    return first


@given(
    st.integers(2, 25).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40),
        )
    )
)
def test_stars_end_at_the_least_of_each_cluster(graph):
    count, pairs = graph
    edges = [(max(p), min(p)) for p in pairs if p[0] != p[1]]
    named = [(bytes([a]), bytes([b])) for a, b in edges]
    expected = {
        bytes([n]): bytes([root])
        for n, root in enumerate(least_of_cluster(count, edges))
        if root != n
    }
    assert stars(named) == expected


def test_a_chain_of_a_thousand_settles_and_a_longer_one_is_told_not_half_clustered():
    def path(n):
        return [((i + 1).to_bytes(3, "big"), i.to_bytes(3, "big")) for i in range(n - 1)]

    assert set(stars(path(1000)).values()) == {(0).to_bytes(3, "big")}
    with pytest.raises(DataError, match="not settled after"):
        stars(path(20_000))


def dealt_on_one_machine(positions, fraction):
    splits = {split: [] for split in SPLITS}
    holdout = HoldOut(fraction)
    for number, position in enumerate(positions):
        for split, document in holdout.deal(Encoded(np.zeros(1), number, 0, position)):
            splits[split].append(document.num_bytes)
    for split, document in holdout.rest():
        splits[split].append(document.num_bytes)
    return splits


@given(
    st.lists(
        st.sampled_from([0.0, 0.04, 0.09, 0.1, 0.11, 0.2, 0.5, 0.9]) | st.floats(0, 0.99),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([0.01, 0.1, 0.3]),
    st.randoms(use_true_random=False),
)
def test_train_and_heldout_are_dealt_as_in_reading_order(positions, fraction, rng):
    keys = [n.to_bytes(4, "big") for n in range(len(positions))]
    pieces = [(key, position) for key, position in zip(keys, positions, strict=True)]
    rng.shuffle(pieces)
    halves = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    firsts = {}
    for split in SPLITS:
        partial = [
            least_and_count((k, 1) for k, p in half if split_of(p, fraction) == split)
            for half in halves
        ]
        if any(count for _, count in partial):
            firsts["a", split] = least_and_count(partial)
    switch = switch_of("a", firsts)
    chain = nearer_and_nearer(
        nearer_and_nearer([(k, abs(p - fraction))] for k, p in half if k < switch)
        for half in halves
    )
    moved = moves("a", chain, firsts)
    placed = {split: [] for split in SPLITS}
    for key, position in pieces:
        found = moved.get(key)
        split = found.split if found else split_of(position, fraction)
        placed[split].append((found.order if found else key + b"\1", int.from_bytes(key, "big")))
    dealt = {split: [number for _, number in sorted(items)] for split, items in placed.items()}
    assert dealt == dealt_on_one_machine(positions, fraction)
    assert all(order <= END for items in placed.values() for order, _ in items)


def test_shards_take_whole_blocks_up_to_their_limit():
    rng = random.Random(0)
    totals = [(bytes([n]), rng.randint(1, 60)) for n in range(50)]
    starts = first_blocks(rng.sample(totals, 50), 100)
    sizes = [
        sum(tokens for block, tokens in totals if first <= block < after)
        for first, after in zip(starts, [*starts[1:], b"\xff"], strict=True)
    ]
    assert sum(sizes) == sum(tokens for _, tokens in totals)
    assert max(sizes) <= 100
    assert first_blocks([(b"a", 500), (b"b", 1)], 100) == [b"a", b"b"]
