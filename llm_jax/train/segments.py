"""Sums over the segments of packed rows."""

import jax


def segment_sums(values_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The sum of the values of every segment of every row, [B, T + 1]: segment 0 is padding, T the most there can be."""
    count = values_BT.shape[1] + 1
    one = lambda values_T, segments_T: jax.ops.segment_sum(values_T, segments_T, count)  # noqa: E731
    return jax.vmap(one)(values_BT, segments_BT)
