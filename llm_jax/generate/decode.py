"""Prompts in, text out, with a KV cache.

1. Prompts are encoded (BOS first) and padded on the right to one length; padding has segment 0.
2. Prefill: one call puts all ids but each prompt's last into the cache. Its logits are not used, so
   the compiler drops the output head and no [B, T, V] array exists.
3. Step: feeds every row's latest id (at first the prompt's last), draws the next one. Rows differ
   in their positions, not in their cache slots, so prompts of any lengths share a batch.
4. The host reads the ids of a step while the device works on the next, turns them into text, and
   stops when every row has met the end of its document, a stop string, or its limit.

Lengths are rounded up to few sizes: two programs are compiled per (rows, prompt length, cache length).
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import ConfigError
from llm_jax.generate.sampling import SamplingConfig, row_keys, sample
from llm_jax.generate.text_stream import TextStream
from llm_jax.model import KVCache, ModelConfig, Params, forward, init_cache
from llm_jax.sharding import constrain
from llm_jax.tokenizer.base import Tokenizer, start_id

logger = logging.getLogger(__name__)

Finish = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    text: str  # without the prompt
    ids: tuple[int, ...]  # drawn ids, without the one that ended the text
    finished: Finish  # end of document, a stop string, or max_new_tokens reached


class Piece(NamedTuple):
    """A bit of the continuation of prompt number `row`."""

    row: int
    text: str
    ids: tuple[int, ...]
    finished: Finish | Literal[""]  # set on the last piece of a row


def generate(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingConfig,
) -> list[Generation]:
    """Continues every prompt; an empty prompt starts a new document. See `stream`."""
    texts: list[list[str]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    finished: list[Finish] = ["length"] * len(prompts)
    for piece in stream(params, config, tokenizer, prompts, sampling):
        texts[piece.row].append(piece.text)
        ids[piece.row].extend(piece.ids)
        finished[piece.row] = piece.finished or "length"
    return [
        Generation(text="".join(t), ids=tuple(i), finished=f)
        for t, i, f in zip(texts, ids, finished, strict=True)
    ]


def stream(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingConfig,
) -> Iterator[Piece]:
    """Yields the continuations as they come, a piece at a time, rows interleaved.

    A prompt is text, or ids that are taken as they are. The pieces of a row add up to its text and never split a character. What a row draws depends on
    the seed, its index and its prompt, not on the other prompts.

    Raises:
      ConfigError: a prompt and its continuation are longer than learned positions reach.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_lengths(config, encoded, sampling)
    for first in range(0, len(encoded), sampling.batch_size):
        batch = encoded[first : first + sampling.batch_size]
        yield from _stream_batch(params, config, tokenizer, batch, first, sampling)


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The start token and the prompt's ids, as every document begins in training; ids as they are."""
    if isinstance(prompt, str):
        return [start_id(tokenizer), *tokenizer.encode(prompt)]
    return [int(id) for id in prompt]


def check_lengths(
    config: ModelConfig, encoded: Sequence[Sequence[int]], sampling: SamplingConfig
) -> None:
    """Refuses what learned positions cannot hold; warns where the model was not trained that far."""
    for row, ids in enumerate(encoded):
        total = len(ids) + sampling.max_new_tokens
        if total <= config.max_seq_len:
            continue
        told = (
            f"prompt {row} has {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens}: "
            f"{total} in all, but model.max_seq_len={config.max_seq_len}"
        )
        if config.position == "learned":
            raise ConfigError(f"{told} is all that learned positions reach; shorten either")
        if config.position != "alibi":  # ALiBi is meant to go on past the trained length
            logger.warning("%s is what the model was trained for; the text may fall apart", told)


def round_up(length: int) -> int:
    """The next of few sizes: multiples of 64 up to 256, then four sizes per doubling."""
    step = max(64, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def _stream_batch(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    encoded: Sequence[Sequence[int]],
    first_row: int,
    sampling: SamplingConfig,
) -> Iterator[Piece]:
    """`stream` for prompts that are decoded together; row numbers count from `first_row`."""
    rows = [
        _Row(TextStream(tokenizer, ids, sampling.stop), tokenizer.eos_id, sampling.max_new_tokens)
        for ids in encoded
    ]
    for ids_B in _draw(params, config, tokenizer.vocab_size, encoded, first_row, sampling):
        for index, row in enumerate(rows):
            if row.finished:
                continue
            text, ids = row.push(int(ids_B[index]))
            if text or ids or row.finished:
                yield Piece(first_row + index, text, ids, row.finished)
        if all(row.finished for row in rows):
            return


class _Row:
    """What the host knows about one sequence being continued."""

    def __init__(self, text: TextStream, eos_id: int, limit: int) -> None:
        self.finished: Finish | Literal[""] = ""
        self._text = text
        self._eos_id = eos_id
        self._left = limit

    def push(self, token: int) -> tuple[str, tuple[int, ...]]:
        """Takes one drawn id; returns the text and the ids it adds."""
        self._left -= 1
        if token == self._eos_id:
            self.finished = "eos"
            return self._text.flush(), ()
        text = self._text.push(token)
        if not self._text.stopped and not self._left:
            text += self._text.flush()
        if self._text.stopped:
            self.finished = "stop"
        elif not self._left:
            self.finished = "length"
        return text, (token,)


def _draw(
    params: Params,
    config: ModelConfig,
    num_ids: int,
    encoded: Sequence[Sequence[int]],
    first_row: int,
    sampling: SamplingConfig,
) -> Iterator[np.ndarray]:
    """Yields the id drawn for every row, int32 [B], step after step."""
    B = 1 << (len(encoded) - 1).bit_length()  # spare rows repeat the first prompt, unread
    prompts = [*encoded, *[encoded[0]] * (B - len(encoded))]
    lengths_B = np.array([len(ids) for ids in prompts], np.int32)
    T = int(lengths_B.max()) - 1
    if T:
        T = round_up(T)
        # a row may not be longer than the table of learned positions, padding included
        T = min(T, config.max_seq_len) if config.position == "learned" else T
    slots = round_up(T + sampling.max_new_tokens)
    tokens_BT = np.zeros((B, T), np.int32)
    for row, ids in enumerate(prompts):
        tokens_BT[row, : len(ids) - 1] = ids[:-1]
    last_B = np.array([ids[-1] for ids in prompts], np.int32)
    ids_B, cache = _prefill(params, config, tokens_BT, (lengths_B - 1, last_B), slots)

    rows_B = first_row + np.arange(B, dtype=np.int32)
    settings = (
        np.uint32(sampling.seed),
        np.float32(sampling.temperature),
        np.int32(sampling.top_k),
        np.float32(sampling.top_p),
        np.int32(num_ids),
    )
    waiting: jax.Array | None = None
    for step in range(sampling.max_new_tokens):
        turn = (lengths_B - 1 + step, rows_B, np.int32(step))
        ids_B, cache = _step(params, config, cache, ids_B, turn, settings)
        if waiting is not None:
            yield np.asarray(waiting)  # waits for the step before, while this one runs
        waiting = ids_B
    yield np.asarray(waiting)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _prefill(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    row_B: tuple[jax.Array, jax.Array],
    slots: int,
) -> tuple[jax.Array, KVCache]:
    """The ids to feed first, and a cache of `slots` slots with all ids before them.

    `row_B` is, for every row, how many of its tokens are no padding, and its last id.
    """
    lengths_B, last_B = row_B
    B, T = tokens_BT.shape
    cache = init_cache(config, B, slots)
    if T:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
        segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
        _, filled = forward(params, config, tokens_BT, positions_BT, segments_BT, cache)
        assert filled is not None, "forward returns the cache it was given"
        cache = filled
    return _placed(last_B, cache)


def _placed(ids_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """States where a step's results live on a mesh: else the first step would be compiled apart."""
    axes = ("layers", "batch", "time", "kv_heads", "head_dim")
    return constrain(ids_B, None), KVCache(
        k_LBSKH=constrain(cache.k_LBSKH, *axes),
        v_LBSKH=constrain(cache.v_LBSKH, *axes),
        positions_BS=constrain(cache.positions_BS, "batch", "time"),
        segments_BS=constrain(cache.segments_BS, "batch", "time"),
        used=constrain(cache.used),
    )


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def _step(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    ids_B: jax.Array,
    turn: tuple[jax.Array, jax.Array, jax.Array],
    settings: tuple[jax.Array, ...],
) -> tuple[jax.Array, KVCache]:
    """Feeds one id per row and draws the next ones. The cache is updated in place (donated)."""
    positions_B, rows_B, step = turn
    seed, temperature, top_k, top_p, num_ids = settings
    ids_B1 = ids_B[:, None]
    logits_B1V, filled = forward(
        params, config, ids_B1, positions_B[:, None], jnp.ones_like(ids_B1), cache
    )
    assert filled is not None, "forward returns the cache it was given"
    keys_B = row_keys(seed, rows_B, step)
    ids_B = sample(keys_B, logits_B1V[:, 0], temperature, top_k, top_p, num_ids)
    return _placed(ids_B, filled)
