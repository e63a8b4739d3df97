"""The whole of a trained model in one object: `llm_jax.load(MODEL)`."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import tokenizer as tokenizers
from llm_jax.checkpoint import find_checkpoint, read_meta, restore_params, tokenizer_folder
from llm_jax.config import from_dict
from llm_jax.errors import CheckpointError, ConfigError, DataError
from llm_jax.eval.perplexity import Evaluator, Score
from llm_jax.eval.windows import EvalConfig, corpus_from_texts
from llm_jax.generate import Generation, SamplingConfig, generate
from llm_jax.model import ModelConfig, Params, abstract_params, forward, merge
from llm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model, its parameters and its tokenizer."""

    config: ModelConfig
    params: Params
    own_tokenizer: Tokenizer | None  # None: imported without one, so that only `logits` works
    path: str  # the checkpoint folder it came from
    step: int  # updates it was trained for

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can read and write text."""
        return self.own_tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises CheckpointError if the model was imported without one."""
        if self.own_tokenizer is None:
            raise CheckpointError(
                f"{self.path}: the model was imported without a tokenizer, so it has logits of ids but "
                "neither reads nor writes text; import it again from a folder with tokenizer.json"
            )
        return self.own_tokenizer

    def merged(self) -> "Model":
        """The same maths without adapters: their products are added to the weights. Itself if it has none."""
        if not self.config.lora.rank:
            return self
        params, config = merge(self.params, self.config)
        return dataclasses.replace(self, params=params, config=config)

    def logits(self, ids_BT: Any) -> jax.Array:
        """Next-token logits of rows of equal length, float32 [B, T, V]; nothing is added to the ids.

        Raises:
          DataError: the ids are not a [B, T] array of numbers below the model's vocabulary size.
        """
        tokens_BT = np.asarray(ids_BT)
        if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu":
            raise DataError(
                f"ids have shape {tokens_BT.shape} and dtype {tokens_BT.dtype}; they must be whole "
                "numbers in rows of one length, [B, T]"
            )
        if tokens_BT.size and not 0 <= tokens_BT.min() <= tokens_BT.max() < self.config.vocab_size:
            raise DataError(
                f"ids go from {tokens_BT.min()} to {tokens_BT.max()}; they must be from 0 to "
                f"{self.config.vocab_size - 1}"
            )
        return _logits(self.params, self.config, tokens_BT.astype(np.int32))

    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> list[Generation]:
        """Continues each prompt; keywords are the fields of `SamplingConfig`, such as temperature=0."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = from_dict(SamplingConfig, sampling)
        return generate(self.params, self.config, self.tokenizer, prompts, config)

    def score(self, texts: str | Sequence[str]) -> list[Score]:
        """How well each text is predicted, as one document each: nats, and bits per character.

        Raises:
          DataError: a text is empty.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(texts):
            if not text:
                raise DataError(f"text {index} is empty; there is nothing to score")
        if not texts:
            return []
        settings = EvalConfig()
        corpus = corpus_from_texts(texts, self.tokenizer, settings)
        if len(corpus.bytes) != len(texts):
            raise DataError("a text has no tokens; there is nothing to score")
        nats = Evaluator(self.config, {"text": corpus}, settings).document_nats(self.params)
        columns = zip(corpus.tokens, corpus.bytes, corpus.characters, nats, strict=True)
        return [
            Score(documents=1, tokens=int(t), bytes=int(b), characters=int(c), nats=float(n))
            for t, b, c, n in columns
        ]


def load(path: str | os.PathLike[str], step: int = -1) -> Model:
    """Loads a run folder, one of its checkpoints, or an imported model folder, on one device.

    Args:
      path: the folder.
      step: which checkpoint of a run folder; -1 is the newest.

    Raises:
      CheckpointError: there is no such model, it is damaged, or its tokenizer is not the one it was
        trained with.
    """
    checkpoint = find_checkpoint(path, step)
    meta = read_meta(checkpoint)
    config = model_config(meta, os.fspath(checkpoint))
    tokenizer = load_tokenizer(meta, checkpoint) if has_tokenizer(meta) else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size="
            f"{config.vocab_size}; the folder mixes two models, use the original one"
        )
    params, meta = restore_params(checkpoint, abstract_params(config))
    return Model(
        config=config,
        params=params,
        own_tokenizer=tokenizer,
        path=os.fspath(checkpoint),
        step=int(meta["step"]),
    )


def model_config(meta: dict[str, Any], where: str) -> ModelConfig:
    """The model's config from the record of its checkpoint. Raises CheckpointError if there is none."""
    try:
        return from_dict(ModelConfig, meta["config"]["model"], "model")
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{where}: its record holds no model config; it was not saved by a training run or import"
        ) from None
    except ConfigError as error:
        raise CheckpointError(
            f"{where}: the recorded model config is not usable: {error}"
        ) from None


def has_tokenizer(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved with a tokenizer; only an import can lack one, and says so."""
    return meta.get("tokenizer_fingerprint", "") is not None


def load_tokenizer(meta: dict[str, Any], checkpoint: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a checkpoint. Raises CheckpointError if it is not the one the model was trained with."""
    folder = tokenizer_folder(checkpoint)
    tokenizer = tokenizers.load(folder)
    expected = meta.get("tokenizer_fingerprint")
    if tokenizer.fingerprint != expected:
        raise CheckpointError(
            f"{folder}: fingerprint {tokenizer.fingerprint[:12]} is not the tokenizer the model was "
            f"trained with ({str(expected)[:12]}); put the original files back"
        )
    return tokenizer


@functools.partial(jax.jit, static_argnums=1)
def _logits(params: Params, config: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape
    )
    return forward(params, config, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[0]
