"""The plan: which pairs of tiles are visited, and which go without a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.attention.plan import (
    Places,
    Rule,
    Tiles,
    key_ranges,
    pad_places,
    query_ranges,
    tile_length,
)
from llm_jax.kernels.attention.reference import visible


def make_rule(causal: bool, window: int) -> Rule:
    return Rule(scale=1.0, causal=causal, window=window, soft_cap=0.0)


def covered(ranges_BI4: jax.Array, J: int, first: int, last: int) -> np.ndarray:
    """[B, I, J] bool: the tiles from entry `first` to entry `last` of each run."""
    runs, tile_J = np.asarray(ranges_BI4), np.arange(J)
    return (tile_J >= runs[..., first, None]) & (tile_J < runs[..., last, None])


@pytest.mark.parametrize("in_rows", [True, False])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 3), (True, 14), (False, 0)])
def test_no_visible_key_is_skipped_and_no_hidden_one_goes_unmasked(causal, window, in_rows):
    rule, tiles, T, S = make_rule(causal, window), Tiles(4, 5), 19, 28
    I, J = 5, 6
    random = np.random.default_rng(0)
    skipped = unmasked = 0
    for number in range(40):
        q_positions, q_segments = np.sort(random.integers(0, 40, (2, 3, T), np.int32))
        kv_positions, kv_segments = np.sort(random.integers(0, 40, (2, 3, S), np.int32))
        if number % 2:
            random.shuffle(kv_positions, axis=1)  # slots in no order
        coarse = 8 << number % 3  # long documents too, so that some tiles need no mask
        segments = (q_segments // coarse, kv_segments // coarse)  # 0 to 4
        positions = (None, None) if in_rows else (q_positions, kv_positions)
        places = Places(*positions, *segments)
        padded = pad_places(places.with_positions(T, S), T, S, tiles)
        padded = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, x.shape[1])), padded)
        seen = np.asarray(visible(rule, padded)).reshape(3, I, 4, J, 5)
        for ranges, seen_by_tile in (
            (key_ranges(places, rule, T, S, tiles), seen),
            (query_ranges(places, rule, T, S, tiles), seen.transpose(0, 3, 4, 1, 2)),
        ):
            width = seen_by_tile.shape[3]
            visited, full = covered(ranges, width, 0, 3), covered(ranges, width, 1, 2)
            assert not (seen_by_tile.any(axis=(2, 4)) & ~visited).any()
            assert not (~seen_by_tile.all(axis=(2, 4)) & full).any()
            assert not (full & ~visited).any()
            skipped += (~visited).sum()
            unmasked += full.sum()
    assert skipped > 0
    assert (unmasked > 0) == (window != 3), "a window smaller than a tile always needs a mask"


def test_runs_derived_by_hand():
    T, tiles = 32, Tiles(8, 8)

    def runs(rule: Rule, segments: list[int] | None = None) -> list[list[int]]:
        row = None if segments is None else jnp.repeat(jnp.array(segments), 8)[None]
        return key_ranges(Places(None, None, row, row), rule, T, T, tiles)[0].tolist()

    full, causal, window = make_rule(False, 0), make_rule(True, 0), make_rule(True, 16)
    assert runs(full) == [[0, 0, 4, 4]] * 4
    assert runs(causal) == [[0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 2, 3], [0, 0, 3, 4]]
    # row 16 sees rows 1 to 16, row 23 rows 8 to 23: tile 1 whole, tiles 0 and 2 in part
    assert runs(window)[2:] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert runs(causal, [1, 2, 2, 0]) == [[0, 1, 1, 1], [1, 2, 2, 2], [1, 1, 2, 3], [0, 0, 0, 0]]
    assert runs(full, [1, 2, 2, 0]) == [[0, 0, 1, 1], [1, 1, 3, 3], [1, 1, 3, 3], [0, 0, 0, 0]]


def test_eight_packed_documents_leave_an_eighth_of_the_causal_work():
    T, tiles = 2048, Tiles(64, 64)
    packed = jnp.repeat(jnp.arange(1, 9), T // 8)[None]
    alone, together = (
        key_ranges(Places(None, None, row, row), make_rule(True, 0), T, T, tiles)
        for row in (None, packed)
    )
    work = [int((ranges[..., 3] - ranges[..., 0]).sum()) for ranges in (alone, together)]
    assert work == [32 * 33 // 2, 8 * 4 * 5 // 2]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 128, 129, 300, 1000])
@pytest.mark.parametrize("longest", [16, 128, 512])
def test_tiles_cover_a_length_with_little_to_spare(length, longest):
    tile = tile_length(length, longest)
    count = -(-length // tile)
    assert tile <= max(longest, length if length <= longest else 0)
    assert tile * count >= length
    assert tile * count - length < 16 * count
