"""What a training session is made of, whatever kind of training it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataPlan
from llm_jax.data.row_order import RowOrder
from llm_jax.errors import ConfigError
from llm_jax.eval.pairs import PairRows
from llm_jax.eval.windows import Corpus, EvalConfig
from llm_jax.generate import SamplingConfig
from llm_jax.model import ModelConfig
from llm_jax.run.rebalance import Guard
from llm_jax.sharding import MeshConfig
from llm_jax.tokenizer import Tokenizer
from llm_jax.train import (
    ForgettingConfig,
    Objective,
    OptimizerConfig,
    ResizeConfig,
    StageConfig,
    StepConfig,
    TrainConfig,
)

# what the record of an imported model says for its export: its family in transformers, how it generates,
# which ids end a text; every run that goes on from the model says it again
ORIGIN = ("family", "hf")
BEST_METRIC = "eval/bits_per_character"  # what `keep_best` compares, over all sources together


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text generated during training, to see with one's own eyes what the numbers mean."""

    prompts: tuple[str, ...] = ("The ", "这是")
    max_new_tokens: int = 48
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        try:
            self.sampling(seed=0)
        except ConfigError as error:  # now, not at the first sample hours later
            raise ConfigError(str(error).replace("sampling.", "samples.")) from None

    def sampling(self, seed: int) -> SamplingConfig:
        """The same for `generate`."""
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Base:
    """A trained model that a run begins with."""

    folder: str  # its checkpoint
    model: ModelConfig
    tokenizer: Tokenizer
    origin: Mapping[str, Any] = field(default_factory=dict)  # see `ORIGIN`
    arrays: str = ""  # digest of the fingerprints of its arrays


class Beginning(NamedTuple):
    """What a run starts from."""

    model: ModelConfig  # the config's, what it leaves open filled in
    base: Base | None  # None: from random parameters, or from a checkpoint of its own
    first_new_row: int
    facts: Mapping[str, Any]  # of a run that has begun: `continuation.Begun.facts`
    origin: Mapping[str, Any]  # of the base, see `ORIGIN`


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a session needs, whatever kind of training it is."""

    folder: Path
    take_over: bool  # ignore a run lock whose owner seems alive
    from_step: int  # checkpoint to go on from; -1: the newest good one
    model: ModelConfig
    optimizer: OptimizerConfig
    step: StepConfig
    train: TrainConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    samples: SampleConfig
    resolved: Any  # the whole config dataclass, saved as config.json and in every checkpoint
    plan: DataPlan
    bytes_per_token: Mapping[str, float]  # by source, for bits per byte on the live line
    tokenizer: Tokenizer
    corpora: Mapping[str, Corpus]  # held-out documents by source
    eval: EvalConfig
    base: Base | None = (
        None  # what a run begins with; None: random parameters, or a checkpoint of its own
    )
    first_new_row: int = 0  # rows of the vocabulary from here on are new; 0: none are
    continuation: Mapping[str, Any] = field(default_factory=dict)  # `continuation.Begun.facts`
    # which rows the steps take; None: of a run that begins
    recorded_order: RowOrder | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)  # of the base, see `ORIGIN`
    resize: ResizeConfig = ResizeConfig()
    stages: StageConfig = StageConfig()
    forgetting: ForgettingConfig = ForgettingConfig()
    guard: Guard = Guard()  # what the forgetting guard has done so far
    prompt_ids: tuple[tuple[int, ...], ...] = ()  # samples.prompts in a chat template; (): as text
    objective: Objective | None = (
        None  # of learning from pairs of answers; None: of predicting text
    )
    reference: Base | None = None  # whose parameters `objective` compares with
    pairs: Mapping[str, PairRows] = field(default_factory=dict)  # held-out ones by source

    @property
    def order(self) -> RowOrder:
        """Which rows of the plan the steps take."""
        return self.recorded_order or RowOrder(sizes=((0, self.step.batch_size),))

    @property
    def turns(self) -> frozenset[int]:
        """Steps (counted from 0) whose rows are of another kind than those before: mixture or batch size change."""
        sizes = {first for first, _ in self.order.sizes[1:]}
        return frozenset({phase.from_step for phase in self.plan.config.phases} | sizes)

    def rows_before(self, step: int) -> int:
        """Rows of the plan that the first `step` updates use."""
        return self.order.rows_before(step)

    def bytes_per_token_at(self, step: int) -> float:
        """UTF-8 bytes behind one target of the mixture that update number `step` is drawn from."""
        shares = self.plan.shares_at(self.rows_before(step - 1))
        return sum(share * self.bytes_per_token[name] for name, share in shares.items())

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """What samples continue."""
        return self.prompt_ids or self.samples.prompts


def assemble(config: Any, begun: Beginning, **found: Any) -> Parts:
    """The parts of a run: what its config says, what it begins with, and what was looked up for it.

    Args:
      config: a PretrainConfig or an InstructConfig, its model filled in.
      begun: what the run starts from.
      **found: every other field of `Parts` that has no default or is not to have it.
    """
    return Parts(
        folder=Path(config.run),
        model=config.model,
        optimizer=config.optimizer,
        step=config.step,
        train=config.train,
        mesh=config.mesh,
        checkpoint=config.checkpoint,
        samples=config.samples,
        eval=config.eval,
        resize=config.resize,
        stages=config.stages,
        resolved=config,
        base=begun.base,
        first_new_row=begun.first_new_row,
        continuation=begun.facts,
        origin=begun.origin,
        **found,
    )
