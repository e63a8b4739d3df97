"""The parity gate: what import and export check before their output exists, written as `parity.json`.

    tensors             which were used, which are listed as not used
    round_trip          what was written, read again, has the bits of what was read
    tokenizer           the same ids for texts that have told tokenizers apart
    special_tokens      BOS, EOS and PAD wherever a folder says them
    logits              against transformers in float32: differences, KL, top-k, greedy ids
    bits_per_character  of a short English and Chinese text

A check that fails ends the command; one that cannot be made says why.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.api import Model
from llm_jax.checkpoint.hf_import import not_finite, open_source
from llm_jax.checkpoint.parity import MAX_RELATIVE, Report, compare_logits
from llm_jax.model import ModelConfig, Params, count_params, forward, init_cache
from llm_jax.run import transformers_side
from llm_jax.tokenizer import Tokenizer, probe
from llm_jax.tokenizer.base import start_id

ROW = 48  # tokens of a row whose logits are compared
GREEDY = 16
MARGIN = 1e-3  # two logits this near, over the largest, may swap places in another library
ALL_PARTS = (
    "tensors",
    "round_trip",
    "tokenizer",
    "special_tokens",
    "logits",
    "bits_per_character",
)


def check_model(
    report: Report,
    config: ModelConfig,
    load: Callable[[], Model],
    folder: Path,
    *,
    ours: bool,
    skip: str = "",
    round_to: str = "",
) -> None:
    """Logits and greedy ids against transformers on `folder`; bits per character of ours.

    Args:
      report: where the results go.
      config: of ours.
      load: gives ours, with the parameters that the folder holds or gave; called if there is memory.
      folder: a Hugging Face folder.
      ours: whether we wrote the folder. Then transformers must be able to load and run it; a folder of
        others may be beyond the version that is installed.
      skip: why not; empty: do it.
      round_to: dtype that ours were rounded to.
    """
    skip = skip or too_large(config)
    if skip:
        report.not_run("logits", skip)
        report.not_run("bits_per_character", skip)
        return
    model = load()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    config = dataclasses.replace(model.config, dtype="float32", param_dtype="float32")
    exact = dataclasses.replace(model, config=config, params=params)
    absent = transformers_side.missing("torch", "transformers")
    if absent:
        report.not_run("logits", absent)
    else:
        try:
            theirs = transformers_side.TheirModel(folder, round_to)
            _check_logits(report, exact, theirs, folder)
        except transformers_side.TheirError as error:
            report.require("logits", not ours, str(error))
            report.not_run("logits", str(error))
    _measure(report, exact, folder)


def too_large(config: ModelConfig) -> str:
    """Why two float32 copies do not fit into the memory that is free; "" if they do."""
    needed, free = int(count_params(config) * 4 * 2.5), free_memory()
    if needed <= 0.8 * free:
        return ""
    return f"two models in float32 need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def probe_rows(config: ModelConfig, tokenizer: Tokenizer | None, rows: int) -> list[list[int]]:
    """Ids to compare on: English, Chinese, and random ones below `rows`, none longer than the model's."""
    length = min(ROW, config.max_seq_len)
    drawn = np.random.default_rng(0).integers(0, rows, length).tolist()
    if tokenizer is None:
        return [drawn]
    texts = [[start_id(tokenizer), *tokenizer.encode(t)] for t in (probe.ENGLISH, probe.CHINESE)]
    return [*(ids[:length] for ids in texts), drawn]


def _check_logits(
    report: Report, model: Model, theirs: transformers_side.TheirModel, folder: Path
) -> None:
    report.require(
        "logits", not theirs.missing, f"transformers finds no weights for {theirs.missing[:3]}"
    )
    tokenizer = model.tokenizer if model.has_tokenizer else None
    size = tokenizer.vocab_size if tokenizer else model.config.vocab_size
    rows = probe_rows(model.config, tokenizer, size)
    ours_NV = np.concatenate([_logits(model.params, model.config, ids) for ids in rows])
    theirs_NV = np.concatenate([theirs.logits(ids) for ids in rows])
    ours_NV = ours_NV[:, : theirs_NV.shape[1]]
    finite = bool(np.isfinite(ours_NV).all() and np.isfinite(theirs_NV).all())
    report.require("logits", finite, "" if finite else f"they are not finite: {_blame(folder)}")
    numbers = compare_logits(ours_NV, theirs_NV)
    report.require(
        "logits",
        numbers["max_relative"] <= MAX_RELATIVE,
        f"the largest difference from transformers is {numbers['max_absolute']:.3g}, "
        f"{numbers['max_relative']:.1e} of the largest logit (limit {MAX_RELATIVE:.0e}), "
        f"mean KL {numbers['kl_mean']:.3g}",
    )
    prompt = max(1, min(8, model.config.max_seq_len // 2))
    count = max(1, min(GREEDY, model.config.max_seq_len - prompt))
    pairs = [_greedy_pair(model, theirs, ids[:prompt], count) for ids in rows]
    for ours, others, near in pairs:
        report.require(
            "logits",
            ours == others or near,
            f"greedy ids are {ours}, those of transformers {others}",
        )
    report.passed(
        "logits",
        **numbers,
        limit=MAX_RELATIVE,
        greedy_ids=sum(len(ours) for ours, _, _ in pairs),
        greedy_equal=all(ours == others for ours, others, _ in pairs),
        against="transformers, float32 on the CPU",
    )


def _greedy_pair(
    model: Model, theirs: transformers_side.TheirModel, ids: list[int], count: int
) -> tuple[list[int], list[int], bool]:
    """Greedy ids of both, and whether they part only where two logits are as good as equal."""
    ours, others = _greedy(model, ids, count), theirs.greedy(ids, count)
    at = next((n for n, (a, b) in enumerate(zip(ours, others, strict=True)) if a != b), -1)
    if at < 0:
        return ours, others, True
    last = theirs.logits([*ids, *others[:at]])[-1]
    gap = float(last[others[at]] - last[ours[at]])
    return ours, others, gap <= MARGIN * float(np.abs(last).max())


def _logits(params: Params, config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    row = np.asarray([ids], np.int32)
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    return np.asarray(_forward(params, config, row, positions, None)[0][0])


def _greedy(model: Model, ids: Sequence[int], count: int) -> list[int]:
    """With the KV cache, as generation does it."""
    cache, row, made = init_cache(model.config, 1, len(ids) + count), list(ids), []
    for _ in range(count):
        first = len(ids) + len(made) - len(row)
        positions = np.arange(first, first + len(row), dtype=np.int32)[None]
        logits, cache = _forward(
            model.params, model.config, np.asarray([row], np.int32), positions, cache
        )
        row = [int(logits[0, -1].argmax())]
        made += row
    return made


@functools.partial(jax.jit, static_argnums=1)
def _forward(params: Params, config: ModelConfig, row: Any, positions: Any, cache: Any) -> Any:
    return forward(params, config, row, positions, jnp.ones_like(row), cache)


def _blame(folder: Path) -> str:
    """What the weights of a folder have to do with numbers that are not finite."""
    found = not_finite(open_source(folder))
    if not found:
        return "every weight is, so activations overflow; look for a wrong number in config.json"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0]}{more} holds NaN or infinite values; get another copy of the model"


def _measure(report: Report, model: Model, folder: Path) -> None:
    """Bits per character, beside those of guessing ids at random."""
    if not model.has_tokenizer:
        report.not_run("bits_per_character", "the model has no tokenizer")
        return
    texts = {"english": probe.ENGLISH, "chinese": probe.CHINESE}
    facts = {}
    for name, score in zip(texts, model.score(list(texts.values())), strict=True):
        uniform = score.tokens * math.log2(model.tokenizer.vocab_size) / score.characters
        finite = math.isfinite(score.bits_per_character)
        told = "" if finite else f"those of {name} are not finite: {_blame(folder)}"
        report.require("bits_per_character", finite, told)
        facts[name] = {"bits_per_character": score.bits_per_character, "uniform": uniform}
    report.passed("bits_per_character", **facts)


def check_their_tokenizer(
    report: Report, tokenizer: Tokenizer, folder: Path, *, ours: bool
) -> dict[str, Any]:
    """Ids of transformers' AutoTokenizer against ours; what it says of itself.

    `ours`: whether we wrote the folder. Then transformers must be able to load it; a folder of others
    may need what is not installed.
    """
    absent = transformers_side.missing("transformers")
    if absent:
        return {"transformers": {"status": "not run", "why": absent}}
    probes = probe.texts(tokenizer)
    try:
        theirs = transformers_side.TheirTokenizer(folder)
        wrong = [text for text in probes if tokenizer.encode(text) != theirs.encode(text)]
    except transformers_side.TheirError as error:
        report.require("tokenizer", not ours, str(error))
        return {"transformers": {"status": "not run", "why": str(error)}}
    if wrong:
        first = wrong[0]
        told = (
            f"{len(wrong)} of {len(probes)} texts have other ids in transformers, first {first[:40]!r}: "
            f"{theirs.encode(first)[:8]}, ours {tokenizer.encode(first)[:8]}"
        )
        report.require("tokenizer", False, told)
    return {"transformers": {"status": "passed", "texts": len(probes), "ids": theirs.specials()}}
