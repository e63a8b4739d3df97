"""Learning from pairs of answers in a session: what they are compared with, and held-out pairs."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.data.batch import Batch
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.eval.pairs import PairRows
from llm_jax.eval.perplexity import BrokenOffError, Evaluator
from llm_jax.model import ModelConfig, Params, target_nats
from llm_jax.run.continuation import find_base, load_base
from llm_jax.run.parts import Base, Beginning, Parts
from llm_jax.sharding import RULES, batch_sharding, place_rows, replicated
from llm_jax.train import Objective, StageConfig
from llm_jax.train.preference import (
    PairSums,
    count_pairs,
    has_reference_below,
    preference_loss,
    reference_nats,
)
from llm_jax.train.stages import main_part


def find_reference(
    objective: Objective, begun: Beginning, stages: StageConfig, init_from: str, run: str
) -> Base | None:
    """The model whose parameters answers are compared with; None where it lies below adapters, or none is needed.

    Raises:
      ConfigError: the reference would not know all rows of the vocabulary.
      CheckpointError: of a run that has begun, the model it began with is not there any more.
    """
    if objective.method != "dpo":
        return None
    if begun.first_new_row or (
        begun.base and begun.base.model.vocab_size != begun.model.vocab_size
    ):
        raise ConfigError(
            f"method='dpo' compares with the model it begins with, but {init_from} has no rows for the chat template's "
            "special tokens; tune it first (--method sft) and prepare the pairs with its tokenizer and --template base"
        )
    if has_reference_below(begun.model, main_part(stages, begun.model, 0)):
        return None
    if begun.base:
        return begun.base
    wanted = begun.facts["base_arrays"]
    for place in (begun.facts["base"], init_from):
        try:
            base = find_base(place)
        except CheckpointError:
            continue
        if base.arrays == wanted:
            return base
    raise CheckpointError(
        f"{run}: method='dpo' compares with the model that the run began with, {begun.facts['base']}, which is not "
        f"there any more or is another now, and so is {init_from}; name it by --init-from"
    )


def load_reference(parts: Parts, mesh: Mesh) -> Params | None:
    """The parameters of `parts.reference` on the mesh. Raises CheckpointError if they cannot be read."""
    return load_base(parts.reference, mesh, parts.model.param_dtype) if parts.reference else None


class PairResult(NamedTuple):
    """What an evaluation of held-out pairs found."""

    metrics: dict[str, float]


class PairEvaluator:
    """Compares the held-out answers of every source: loss, how often the better one wins, by how much it leads.

    Beside them is what the better answers cost, as of any conversation: with DPO it may rise while pairs are won.
    """

    def __init__(
        self,
        parts: Parts,
        pairs: Mapping[str, PairRows],
        mesh: Mesh,
        answers: Evaluator,
        reference: Params | None,
    ) -> None:
        """`pairs` by source, `answers` the better ones of the same; `reference` as in `preference_step`."""
        assert parts.objective is not None
        self._pairs, self._mesh, self._answers, self._reference = pairs, mesh, answers, reference
        shards = math.prod(mesh.shape[axis] for axis in RULES["batch"])
        self._batch_size = -(-parts.eval.batch_size // shards) * shards
        self._sums = jax.jit(
            functools.partial(pair_sums, model=parts.model, objective=parts.objective),
            out_shardings=replicated(mesh),
        )

    def evaluate(self, params: Params, stop: Callable[[], bool] = lambda: False) -> PairResult:
        """Compares all pairs. Raises BrokenOffError as soon as `stop`, asked before every batch, says so."""
        found = {name: self._sums_of(rows, params, stop) for name, rows in self._pairs.items()}
        total = np.sum(list(found.values()), axis=0)
        metrics: dict[str, float] = {}
        for prefix, (count, *sums) in [("", total), *((f"{n}/", s) for n, s in found.items())]:
            named: Any = PairSums(*(value / max(count, 1.0) for value in sums)).named()
            metrics |= {prefix + name: float(value) for name, value in named.items()}
        return PairResult({**metrics, **self._answers.evaluate(params, stop).metrics})

    def _sums_of(self, rows: PairRows, params: Params, stop: Callable[[], bool]) -> np.ndarray:
        """Number of pairs and the fields of `PairSums` over them, float64."""
        total = np.zeros(1 + len(PairSums._fields))
        every = np.arange(self._batch_size)
        for batch in rows.batches(self._batch_size):
            if stop():
                raise BrokenOffError
            sharding = batch_sharding(self._mesh, self._batch_size, batch.tokens_BT.shape[1])
            placed = Batch(*(place_rows(x, every, self._batch_size, sharding) for x in batch))
            total += np.array(self._sums(params, self._reference, placed), np.float64)
        return total


def pair_sums(
    params: Params,
    reference: Params | None,
    batch: Batch,
    *,
    model: ModelConfig,
    objective: Objective,
) -> tuple[jax.Array, ...]:
    """Number of pairs and the fields of `PairSums`, over a batch."""
    nats_BT, _ = target_nats(params, model, *batch[:4])
    reference_BT = reference_nats(params, reference, batch, model, objective.method)
    return count_pairs(batch), *preference_loss(nats_BT, reference_BT, batch, objective)
