"""`--init-from MODEL`: a run that begins with a trained model, its vocabulary extended or not.

1. The model's sizes and switches are the base's; only what is stated and contradicts it is refused.
2. The data's tokenizer is the base's own, or extends it: rows behind the base's ids are new.
3. New rows start in the way that predicts the held-out text of all sources best, measured before the
   first step.
4. Adapters of the base are merged into its weights; those of the run start so that they change nothing.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from llm_jax.api import load_tokenizer, model_config
from llm_jax.checkpoint import find_checkpoint, read_meta, restore_params, steps_in
from llm_jax.checkpoint.record import DamagedError
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.eval.perplexity import Evaluator
from llm_jax.eval.windows import Corpus, EvalConfig, corpus_from_texts
from llm_jax.model import (
    Lora,
    ModelConfig,
    Params,
    abstract_params,
    adapters_of,
    init_params,
    join,
    logical_axes,
    merge,
)
from llm_jax.run.parts import ORIGIN, Base, Parts
from llm_jax.sharding import partition_spec, tree_shardings
from llm_jax.tokenizer import Tokenizer
from llm_jax.tokenizer.base import digest, start_id
from llm_jax.tokenizer.spelling import require_extension, spellings
from llm_jax.train.resize import INITS, Init, resize

log = logging.getLogger(__name__)

# stated or not, these do not have to be the base's: they say how it is computed, or how far it reads
FREE = ("vocab_size", "max_seq_len", "dtype", "param_dtype", "remat", "attention", "lora")
BASE_ROW = "base"  # of the table: the base model on the same text, with its own tokenizer


def find_base(model: str) -> Base:
    """The model that a run begins with.

    Raises:
      CheckpointError: there is none, it is damaged, or its tokenizer and its embedding do not fit.
    """
    checkpoint = find_checkpoint(model)
    meta = read_meta(checkpoint)
    config = model_config(meta, str(checkpoint))
    tokenizer = load_tokenizer(meta, checkpoint)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids, but its embedding has "
            f"{config.vocab_size} rows; the folder mixes two models, use the original one"
        )
    return Base(
        folder=str(checkpoint),
        model=config,
        tokenizer=tokenizer,
        origin=origin_of(meta),
        arrays=digest(meta["arrays"]),
    )


def origin_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of an imported model, or of a run that began with one, says for an export."""
    return {name: record[name] for name in ORIGIN if name in record}


def recorded(run: Path) -> dict[str, Any] | None:
    """The record of the newest readable checkpoint of a run folder; None if it has none."""
    for step in reversed(steps_in(run / "checkpoints")):
        try:
            return read_meta(run / "checkpoints" / str(step))
        except DamagedError:  # `Store.restore` tells and steps over it
            continue
    return None


def fill_in(
    stated: ModelConfig, unstated: ModelConfig, base: ModelConfig, least: int, where: str
) -> ModelConfig:
    """The base's config with what is stated otherwise and may be.

    Args:
      stated: of the run's config; a field that is as in `unstated` was left out.
      unstated: a config that states nothing.
      base: of the base model.
      least: rows that the vocabulary needs.
      where: the base's folder, for messages.

    Raises:
      ConfigError: a stated value contradicts the base.
    """
    # bfloat16 weights cannot be trained, and the base's own adapters are merged
    values: dict[str, Any] = {"param_dtype": "float32", "lora": Lora()}
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for name, now, none, was in zip(
        fields, *(_values(config) for config in (stated, unstated, base)), strict=True
    ):
        if now == none:
            continue
        if name not in FREE and now != was:
            raise ConfigError(
                f"model.{name}={now!r} contradicts the base {where}, which has {was!r}; leave it out of the "
                "config, or begin with another model"
            )
        values[name] = now
    filled = dataclasses.replace(base, **{"vocab_size": max(base.vocab_size, least), **values})
    if filled.position == "learned" and filled.max_seq_len != base.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len={filled.max_seq_len} contradicts the base {where}, whose learned positions "
            f"are {base.max_seq_len}; leave it out of the config"
        )
    return filled


def _values(config: ModelConfig) -> list[Any]:
    return list(vars(config).values())


def first_new_row(base: Base, tokenizer: Tokenizer, prepared: str) -> int:
    """Where the rows begin that the base has no meaning for; 0 if the vocabulary is the base's own.

    Raises:
      DataError: the data's tokenizer does not extend the base's.
    """
    if tokenizer.fingerprint == base.tokenizer.fingerprint:
        return 0
    require_extension(base.tokenizer, tokenizer, prepared)
    return base.tokenizer.vocab_size if tokenizer.vocab_size > base.tokenizer.vocab_size else 0


class Begun(NamedTuple):
    """The parameters before the first step, and what is recorded about them."""

    params: Params
    facts: dict[str, Any]
    metrics: dict[str, float]  # of an evaluation of `params`
    table: str  # for people


def begin(parts: Parts, mesh: Mesh) -> Begun:
    """Loads the base, measures how new rows may start, and starts them.

    Raises:
      CheckpointError: the base cannot be read.
    """
    base = parts.base
    assert base is not None
    params = load_base(base, mesh, parts.model.param_dtype)
    scores: dict[str, dict[str, float]] = {}
    metrics: dict[str, dict[str, float]] = {}

    def measure(name: str, params: Params, model: ModelConfig, corpora: dict[str, Corpus]) -> None:
        if not corpora:
            return
        config = dataclasses.replace(parts.eval, bootstrap_samples=0)
        result = Evaluator(model, corpora, config, mesh).evaluate(params)
        scores[name] = {s: score.bits_per_character for s, score in result.sources.items()}
        metrics[name] = {f"eval/{key}": value for key, value in result.metrics.items()}

    grown = dataclasses.replace(parts.model, lora=Lora())
    model = dataclasses.replace(grown, vocab_size=base.model.vocab_size)
    corpora = dict(parts.corpora)
    first, chosen = parts.first_new_row, "none"
    if not first:
        measure(BASE_ROW, params, model, corpora)
        first = base.model.vocab_size
        if grown.vocab_size != first:
            kept = min(first, grown.vocab_size)
            params = resize(params, grown, mesh, [], first_row=kept, init="mean")
    else:
        # conversations cannot be written without the special tokens that the base lacks
        plain = {name: corpus for name, corpus in corpora.items() if corpus.scored is None}
        measure(BASE_ROW, params, model, _with_base(plain, parts.tokenizer, base.tokenizer))
        spelled = spellings(base.tokenizer, parts.tokenizer)
        asked = parts.resize.init
        tried: Sequence[Init] = INITS if asked == "auto" else (asked,)
        if not corpora and asked == "auto":
            tried = INITS[:1]
            log.warning(
                "no held-out text: resize.init='auto' cannot be measured, %r is taken", INITS[0]
            )
        sizes = {"first_row": first, "seed": parts.resize.seed}
        for init in tried:
            candidate = resize(params, grown, mesh, spelled, init=init, **sizes)
            measure(init, candidate, grown, corpora)
            del candidate
        chosen = min(tried, key=lambda init: relative_cost(scores.get(init, {})))
        params = resize(params, grown, mesh, spelled, init=chosen, **sizes)
    if parts.model.lora.rank:
        params = join(params, fresh_adapters(parts.model, mesh, parts.train.seed))
    facts = {
        "base": base.folder,
        "base_arrays": base.arrays,
        "first_new_row": parts.first_new_row,
        "init": chosen,
        "bits_per_character": scores,
    }
    measured = metrics.get(BASE_ROW if chosen == "none" else chosen, {})
    return Begun(params, facts, measured, table_of(scores, chosen))


def relative_cost(bits_per_character: Mapping[str, float]) -> float:
    """What starts are compared by: the sum of logarithms, so that 5 % worse weighs alike in each source.

    A sum of the bits themselves would trade a fifth of what the model knows of English for a tenth of
    what it does not know yet of Chinese (measured: tools/show_continuation.py).
    """
    return sum(map(math.log, bits_per_character.values()))


def fresh_adapters(model: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """The adapters of a model that has some, before the first step, on the mesh."""
    shardings = tree_shardings(mesh, abstract_params(model), logical_axes(model))
    make = jax.jit(  # what is drawn for the rest is never computed: nothing reads it
        lambda key: adapters_of(init_params(model, key)), out_shardings=adapters_of(shardings)
    )
    return make(jax.random.key(seed))


def load_base(base: Base, mesh: Mesh, dtype: str) -> Params:
    """The base's parameters on the mesh, adapters merged; a vocabulary that does not divide is not split.

    Raises:
      CheckpointError: they cannot be read.
    """

    def place(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(names, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    abstract = jax.tree.map(place, abstract_params(base.model), logical_axes(base.model))
    params, _ = restore_params(base.folder, abstract)
    params, _ = merge(params, base.model)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _with_base(
    corpora: Mapping[str, Corpus], extended: Tokenizer, base: Tokenizer
) -> dict[str, Corpus]:
    """The same text in the ids of the base."""
    skip = start_id(extended) >= 0
    spelled = {}
    for name, corpus in corpora.items():
        bounds = zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
        texts = [extended.decode(corpus.ids[a + skip : b].tolist()) for a, b in bounds]
        spelled[name] = corpus_from_texts(texts, base, EvalConfig())
    return spelled


def table_of(scores: Mapping[str, Mapping[str, float]], chosen: str) -> str:
    """Bits per character of every start and source, before the first step."""
    if not scores:
        return ""
    sources = list(scores[chosen if chosen in scores else BASE_ROW])
    rows = ["start      " + " " * 18 + "".join(f"{name:>14}" for name in sources)]
    for name, by_source in scores.items():
        mark = "  <- chosen" if name == chosen else ""
        rows.append(
            f"           {name:18}" + "".join(f"{by_source[s]:14.4f}" for s in sources) + mark
        )
    rows[0] += "   bits per character before the first step"
    return "\n".join(rows)
