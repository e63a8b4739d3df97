"""Rows by step: usually one batch after the other, sometimes with holes or another size, always recorded."""

import json

import numpy as np
import pytest

from llm_jax.data.row_order import RowOrder

PLAIN = RowOrder(sizes=((0, 4),))


def taken(order: RowOrder, steps: int) -> list[int]:
    return np.concatenate([order.rows(step) for step in range(steps)]).tolist()


def test_without_decisions_step_s_takes_the_s_th_batch():
    assert PLAIN.rows(3).tolist() == [12, 13, 14, 15]


def test_the_batches_of_steps_left_out_are_skipped_and_everything_else_is_seen_once():
    order = PLAIN.without(2, 3)
    assert taken(order, 4) == [*range(8), *range(16, 24)]


def test_left_out_twice_the_second_hole_is_counted_among_the_rows_that_are_taken():
    order = PLAIN.without(2, 3).without(2, 2)
    assert taken(order, 4) == [*range(8), *range(20, 28)]
    assert order.left_out == ((8, 16), (16, 20))
    # steps on both sides of a hole: one range over it
    order = PLAIN.without(2, 3).without(1, 2)
    assert taken(order, 3) == [*range(4), *range(20, 28)]


def test_another_batch_size_from_a_step_on_neither_skips_nor_repeats_a_row():
    order = PLAIN.resized(3, 6).resized(5, 2)
    assert taken(order, 7) == list(range(3 * 4 + 2 * 6 + 2 * 2))
    assert [order.size(step) for step in (2, 3, 5)] == [4, 6, 2]


def test_going_on_from_an_older_checkpoint_drops_the_sizes_planned_after_it():
    assert PLAIN.resized(5, 8).resized(3, 6).sizes == ((0, 4), (3, 6))
    assert PLAIN.resized(5, 4) == PLAIN
    assert PLAIN.resized(0, 8).sizes == ((0, 8),)


@pytest.mark.parametrize("order", [PLAIN, PLAIN.resized(7, 2).without(8, 9)])
def test_it_comes_back_from_its_record(order):
    assert RowOrder.from_record(json.loads(json.dumps(order.to_record()))) == order
