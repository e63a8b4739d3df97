"""How well a model predicts held-out text: nats per token, PPL, bits per byte, bits per character.

Sums over the text tokens of documents; EOS is not scored (see `windows.Corpus`). Of conversations the
text of the answers is scored, and its bytes and characters are counted, nothing else. With N the summed
negative log-probabilities in nats:

    nats per token = N / tokens        PPL = exp(N / tokens)
    bits per byte  = N / ln 2 / bytes  bits per character = N / ln 2 / characters

Only the last two can be compared between tokenizers: at the same likelihood of the text, a
vocabulary with longer tokens has a higher PPL. Bits per byte and bits per character differ by the
bytes of a character (English 1.0, Chinese 3.0), so a mean over languages of one is not the other.

The intervals cover 95 % and come from a bootstrap over documents: tokens of one document are not
independent, documents nearly are. The total is resampled within each source.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import to_dict
from llm_jax.errors import ConfigError, DataError
from llm_jax.eval.windows import Corpus, EvalConfig, RowPlan, Rows, plan_windows
from llm_jax.model import ModelConfig, Params, target_nats
from llm_jax.sharding import RULES, batch_sharding, constrain

LN2 = math.log(2.0)
TOTAL = "total"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What predicting some text cost, and how much text it was."""

    documents: int
    tokens: int
    bytes: int
    characters: int
    nats: float  # summed over the tokens
    # 2.5 % and 97.5 % quantiles; both NaN where nothing was resampled
    bits_per_byte_interval: tuple[float, float] = (math.nan, math.nan)
    bits_per_character_interval: tuple[float, float] = (math.nan, math.nan)

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-probability of a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of nats per token; compare only between models of one tokenizer."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text."""
        return self.nats / LN2 / self.bytes

    @property
    def bits_per_character(self) -> float:
        """Bits per code point of the text."""
        return self.nats / LN2 / self.characters

    @property
    def ratios(self) -> dict[str, float]:
        """The four figures above by name."""
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_character": self.bits_per_character,
        }

    def to_dict(self) -> dict[str, Any]:
        """Counts, ratios and intervals under their names."""
        return {**to_dict(self), **self.ratios}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The scores of every source, and of all of them together."""

    sources: dict[str, Score]
    total: Score

    @property
    def metrics(self) -> dict[str, float]:
        """The four ratios under flat names: `bits_per_character` of all, `zh/bits_per_character`, ..."""
        named = {"": self.total, **{f"{name}/": score for name, score in self.sources.items()}}
        return {
            prefix + ratio: value
            for prefix, score in named.items()
            for ratio, value in score.ratios.items()
        }

    def to_dict(self) -> dict[str, dict]:
        """Everything, as JSON values."""
        scores = {**self.sources, TOTAL: self.total}
        return {source: score.to_dict() for source, score in scores.items()}


class BrokenOffError(Exception):
    """An evaluation was asked to stop before its end."""


class Evaluator:
    """Scores the same windows for any parameters, with one compiled program.

    Args:
      model_config: of the model whose parameters will come.
      corpora: source name -> its documents.
      config: windows and batches; `seq_len` and `stride` are filled in from the model.
      mesh: where the parameters live; rows are split over its data and fsdp axes. None: wherever
        the parameters are, rows not split.

    Raises:
      ConfigError: the window does not fit the model.
      DataError: a source has no text, or ids the model does not have.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        corpora: Mapping[str, Corpus],
        config: EvalConfig,
        mesh: Mesh | None = None,
    ) -> None:
        learned = model_config.position == "learned"
        self.config = config.resolve(model_config.max_seq_len, hard_limit=learned)
        self._model_config, self._corpora, self._mesh = model_config, dict(corpora), mesh
        for name, corpus in self._corpora.items():
            _check_corpus(name, corpus, model_config.vocab_size)
        offsets = np.cumsum([0, *(len(c.ids) for c in self._corpora.values())])
        starts = [
            c.starts[:-1] + at for c, at in zip(self._corpora.values(), offsets, strict=False)
        ]
        ids = np.concatenate([c.ids for c in self._corpora.values()])
        self.num_documents = sum(map(len, starts))
        ends = np.concatenate([*starts, offsets[-1:]])
        windows = plan_windows(ends, self.config.seq_len, self.config.stride)
        # one row holds a little text without padding it to the whole window
        needed = -(-int(windows.length.sum()) // 64) * 64
        # and is split evenly over the mesh: what is left of it is padding
        row_len = self._shared_out("time", min(self.config.seq_len, needed))
        targets = np.concatenate([c.targets for c in self._corpora.values()])
        self._plan = RowPlan(ids, windows, row_len, targets)
        self._batch_size = self._rows_at_once(self._plan.num_rows)

    def _rows_at_once(self, num_rows: int) -> int:
        """The batch size: not much above the rows there are, and a multiple of the mesh's row shards."""
        needed = min(self.config.batch_size, 1 << (num_rows - 1).bit_length())
        return self._shared_out("batch", needed)

    def _shared_out(self, axis: str, size: int) -> int:
        """The size, or the next one that all shards of this axis on the mesh have the same part of."""
        shards = 1 if self._mesh is None else math.prod(self._mesh.shape[a] for a in RULES[axis])
        return -(-size // shards) * shards

    def evaluate(self, params: Params, stop: Callable[[], bool] = lambda: False) -> EvalResult:
        """Scores every source. Raises BrokenOffError as soon as `stop`, asked before every batch, says so."""
        nats, at = self.document_nats(params, stop), 0
        sources: dict[str, Score] = {}
        resamples = []
        for number, (name, corpus) in enumerate(self._corpora.items()):
            columns = _columns(corpus, nats[at : at + len(corpus.bytes)])
            at += len(corpus.bytes)
            seed = (self.config.seed, number)
            resamples.append(bootstrap_sums(columns, self.config.bootstrap_samples, seed))
            sources[name] = _score(columns, corpus.tokens, resamples[-1])
        columns = np.concatenate([_columns(c, None) for c in self._corpora.values()])
        columns[:, 0] = nats
        tokens = np.concatenate([c.tokens for c in self._corpora.values()])
        return EvalResult(sources=sources, total=_score(columns, tokens, np.sum(resamples, axis=0)))

    def document_nats(self, params: Params, stop: Callable[[], bool] = lambda: False) -> np.ndarray:
        """Nats of every document, float64, in the order of the corpora. Raises as `evaluate`."""
        nats = np.zeros(self.num_documents)
        waiting: tuple[Rows, jax.Array] | None = None
        with jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext():
            for rows in self._plan.batches(self._batch_size):
                if stop():
                    raise BrokenOffError
                scored = _token_nats(params, self._model_config, *self._place(rows))
                if waiting:  # read one batch behind, so that the device does not wait for the host
                    _add(nats, *waiting)
                waiting = rows, scored
        if waiting:
            _add(nats, *waiting)
        return nats

    def _place(self, rows: Rows) -> list[np.ndarray | jax.Array]:
        """The arrays that the model reads, split over the mesh if there is one."""
        arrays = rows[:4]
        if self._mesh is None:
            return list(arrays)
        sharding = batch_sharding(self._mesh, self._batch_size)
        return [
            jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
            for a in arrays
        ]


@functools.partial(jax.jit, static_argnums=1)
def _token_nats(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """Negative log-probability of every target, float32 [B, T], the same on every device."""
    nats_BT, _ = target_nats(params, config, tokens_BT, targets_BT, positions_BT, segments_BT)
    return constrain(nats_BT, None, None)


def _add(nats: np.ndarray, rows: Rows, scored_BT: jax.Array) -> None:
    """Adds the scored targets to their documents, in float64."""
    counted = rows.document_BT >= 0
    values = np.asarray(scored_BT, np.float64)[counted]
    np.add.at(nats, rows.document_BT[counted], values)


def _check_corpus(name: str, corpus: Corpus, vocab_size: int) -> None:
    if not len(corpus.ids):
        raise DataError(f"source {name!r} has no held-out text to score; prepare it with more")
    if corpus.ids.min() < 0 or corpus.ids.max() >= vocab_size:
        raise DataError(
            f"source {name!r} holds id {int(corpus.ids.max())}, but model.vocab_size={vocab_size}; "
            "was the text prepared with another tokenizer?"
        )
    if name == TOTAL:
        raise ConfigError(f"source name {name!r} is taken by the sum of all sources; rename it")


def _columns(corpus: Corpus, nats: np.ndarray | None) -> np.ndarray:
    """float64 [documents, 3]: nats, bytes, characters."""
    nats = np.zeros(len(corpus.bytes)) if nats is None else nats
    return np.stack([nats, corpus.bytes, corpus.characters], axis=1).astype(np.float64)


def bootstrap_sums(columns: np.ndarray, samples: int, seed: tuple[int, ...]) -> np.ndarray:
    """Column sums of `samples` resamples of the rows, with replacement: [samples, columns]."""
    random = np.random.default_rng(seed)
    n = len(columns)
    sums = [columns[random.integers(n, size=n)].sum(axis=0) for _ in range(samples)]
    return np.array(sums).reshape(samples, columns.shape[1])


def _score(columns: np.ndarray, tokens: np.ndarray, resampled: np.ndarray) -> Score:
    """Sums and intervals from per-document columns and resampled sums (nats, bytes, characters)."""
    nats, num_bytes, num_characters = columns.sum(axis=0)
    intervals = [(math.nan, math.nan)] * 2
    if len(columns) > 1 and len(resampled):
        intervals = [
            tuple(np.quantile(resampled[:, 0] / LN2 / resampled[:, c], (0.025, 0.975)).tolist())
            for c in (1, 2)
        ]
    return Score(
        documents=len(columns),
        tokens=int(tokens.sum()),
        bytes=int(num_bytes),
        characters=int(num_characters),
        nats=float(nats),
        bits_per_byte_interval=intervals[0],
        bits_per_character_interval=intervals[1],
    )
