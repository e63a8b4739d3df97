"""Batches of conversations: the objective does not depend on packing or on how a batch is cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.data.batch import Batch
from llm_jax.instruct.masks import ChatEncoder, chat_tokenizer
from llm_jax.instruct.templates import TEMPLATES
from llm_jax.model import Local, init_params, target_loss
from llm_jax.train.step import accumulate
from tests.instruct import chat_cases
from tests.tiny import BLOOM, LLAMA

SIZE, LENGTH = 512, 192
MODELS = {
    "rope": LLAMA,
    "alibi": BLOOM,
    "window": dataclasses.replace(LLAMA, local=Local(window=7, full_every=2)),
}


@pytest.fixture(scope="module")
def talks() -> list[Batch]:
    """Nine conversations, each a row of its own."""
    template = TEMPLATES["chatml"]
    chat = ChatEncoder(chat_tokenizer(chat_cases.byte_level(), template), template)
    rows = []
    for turns in chat_cases.conversations(40, seed=4):
        made = chat.encode(turns)
        if len(made.tokens) <= LENGTH // 2:
            rows.append(row_of([(made.tokens, made.mask)]))
    return rows[:9]


def row_of(pieces: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """One row of whole conversations, as `DataPlan` lays them."""
    tokens_BT, targets_BT, positions_BT, segments_BT = np.zeros((4, 1, LENGTH), np.int32)
    mask_BT = np.zeros((1, LENGTH), np.float32)
    batch, at = Batch(tokens_BT, targets_BT, positions_BT, segments_BT, mask_BT), 0
    for segment, (tokens, mask) in enumerate(pieces, start=1):
        here = (0, slice(at, at + len(tokens) - 1))
        batch.tokens_BT[here], batch.targets_BT[here] = tokens[:-1], tokens[1:]
        batch.positions_BT[here] = np.arange(len(tokens) - 1)
        batch.segments_BT[here] = segment
        batch.loss_mask_BT[here] = mask[1:] > 0
        at += len(tokens) - 1
    return batch


def packed(rows: list[Batch]) -> Batch:
    """The same conversations, as many in each row as fit."""
    groups: list[list] = [[]]
    for row in rows:
        used = row.segments_BT[0] > 0
        ids = np.append(row.tokens_BT[0][used], row.targets_BT[0][used][-1])
        mask = np.append(0, row.loss_mask_BT[0][used])
        if sum(len(tokens) - 1 for tokens, _ in groups[-1]) + len(ids) - 1 > LENGTH:
            groups.append([])
        groups[-1].append((ids, mask))
    return Batch(*(np.concatenate(arrays) for arrays in zip(*map(row_of, groups), strict=True)))


def relative(one, other) -> float:
    """The norm of the difference of two trees in units of their own."""
    difference = jax.tree.map(jnp.subtract, one, other)
    norm = lambda tree: sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)) ** 0.5  # noqa: E731
    return norm(difference) / norm(other)


@pytest.mark.parametrize(
    "name", ["rope", *(pytest.param(name, marks=pytest.mark.slow) for name in ("alibi", "window"))]
)
def test_packed_conversations_have_the_loss_and_gradients_of_each_alone(talks, name):
    model = dataclasses.replace(MODELS[name], vocab_size=SIZE, max_seq_len=LENGTH)
    params = init_params(model, jax.random.key(1))

    @jax.jit
    def gradient(params, part):
        return jax.value_and_grad(lambda p: target_loss(p, model, *part)[0])(params)

    together = packed(talks)
    assert len(together.tokens_BT) < len(talks)
    assert together.segments_BT.max() > 1
    assert together.loss_mask_BT.sum() < (together.segments_BT > 0).sum()
    loss, grads = gradient(params, together)
    # all alone in one call: rows are independent
    alone = Batch(*(np.concatenate(arrays) for arrays in zip(*talks, strict=True)))
    expected, expected_grads = gradient(params, alone)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert relative(grads, expected_grads) < 1e-5
    # and a mask on inputs in place of targets is another objective
    shifted = together._replace(loss_mask_BT=np.roll(together.loss_mask_BT, 1, axis=1))
    assert abs(float(gradient(params, shifted)[0]) / float(expected) - 1) > 1e-3


def test_micro_batches_of_uneven_answers_equal_one_large_batch(talks):
    model = dataclasses.replace(LLAMA, vocab_size=SIZE, max_seq_len=LENGTH)
    params = init_params(model, jax.random.key(0))
    batch = Batch(*(np.concatenate(arrays) for arrays in zip(*talks[:8], strict=True)))
    counts = batch.loss_mask_BT.sum(axis=1)
    halves = counts[::2].sum(), counts[1::2].sum()
    assert halves[0] != halves[1]
    weighted = batch._replace(loss_mask_BT=batch.loss_mask_BT / counts.sum())
    gradient = jax.grad(lambda p, part: target_loss(p, model, *part), has_aux=True)
    add = jax.jit(accumulate, static_argnums=(0, 3))
    (one, whole), (other, parts) = (add(gradient, params, weighted, n) for n in (1, 4))
    assert float(other.nats) == pytest.approx(float(one.nats), rel=1e-6)
    assert relative(parts, whole) < 1e-6
