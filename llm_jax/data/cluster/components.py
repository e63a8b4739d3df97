"""Clusters of pairs on a cluster: alternating large-star and small-star.

Kiveris et al. 2014, "Connected Components in MapReduce and Beyond": both steps keep the clusters, never add
edges, and end in stars, every node joined to the least of its cluster. The rounds are laid out ahead, as a
Beam pipeline cannot loop, and the end is checked. A path of n documents, each like the next alone, needs
log2(n) rounds at worst (1,000: 10, measured); near repeats make no long paths, as every document of a
run is paired with the run's first.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam

from llm_jax.errors import DataError

ROUNDS = 10
Edge = tuple[bytes, bytes]


def large_star(node: bytes, around: Iterable[bytes]) -> Iterator[Edge]:
    """Joins the larger neighbours of a node to the least of the neighbourhood."""
    neighbours = set(around)
    least = min(node, *neighbours)
    for other in neighbours:
        if other > node:
            yield other, least


def small_star(node: bytes, below: Iterable[bytes]) -> Iterator[Edge]:
    """Joins a node and its smaller neighbours to the least of them."""
    neighbours = set(below)
    least = min(neighbours)
    yield node, least
    for other in neighbours:
        if other != least:
            yield other, least


def both_ways(edge: Edge) -> Iterator[Edge]:
    """An edge seen from either end."""
    yield edge
    yield edge[1], edge[0]


def settled(node: bytes, found: dict[str, Iterable[bytes]]) -> Iterator[Edge]:
    """The edge of a node below a root.

    Raises:
      DataError: the node is a root as well, or has two.
    """
    roots = set(found["root"])
    if len(roots) > 1 or (roots and any(True for _ in found["child"])):
        raise DataError(
            f"clusters of near repeats are not settled after {ROUNDS} rounds: the data holds a "
            "chain of a thousand documents, each like the next alone; raise threshold"
        )
    if roots:
        yield node, roots.pop()


def components(edges: Any) -> Any:
    """Pairs (document, least of its cluster) from pairs (later, earlier); the least itself has none."""
    for number in range(ROUNDS):
        edges = (
            edges
            | f"both ways {number}" >> beam.FlatMap(both_ways)
            | f"around {number}" >> beam.GroupByKey()
            | f"large star {number}" >> beam.FlatMapTuple(large_star)
            | f"below {number}" >> beam.GroupByKey()
            | f"small star {number}" >> beam.FlatMapTuple(small_star)
        )
    children = edges | "children" >> beam.MapTuple(lambda child, root: (root, child))
    return (
        {"root": edges, "child": children}
        | "settle" >> beam.CoGroupByKey()
        | "settled" >> beam.FlatMapTuple(settled)
    )
