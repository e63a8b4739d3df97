"""`llm-jax export MODEL OUT`: a model as a folder that transformers loads, behind the parity gate.

A model with adapters is exported merged, or with `--adapter` as an adapter alone, for PEFT.

config.json, safetensors (with an index beyond `--max-shard-size`), tokenizer, chat template and
generation_config.json. The padding of the vocabulary is left out. OUT appears when every check has
passed; `OUT/parity.json` says which were made and what they found.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.run.adapter import export_adapter
from llm_jax.run.import_model import PARITY, require_room, tell
from llm_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llm_jax.api import Model
    from llm_jax.checkpoint.hf_export import ExportConfig
    from llm_jax.checkpoint.parity import Report

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> None:
    """Runs the command."""
    parser = cli.Parser(prog="llm-jax export", description="write a model for transformers")
    add = parser.add_argument
    add("model", help="a run folder, one of its checkpoints, or an imported model folder")
    add("out", metavar="OUT", type=Path, help="the folder to make; must not exist")
    add("--step", type=int, default=-1, help="checkpoint of a run folder (default: the newest)")
    add(
        "--dtype",
        default="",
        help="float32, bfloat16 or float16 (default: as the parameters are stored)",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (default: 5GB)")
    add("--no-tokenizer", action="store_true", help="write the weights and config alone")
    add("--adapter", action="store_true", help="write the adapters alone, in PEFT's format")
    add("--no-logits", action="store_true", help="do not run the model (for one too large here)")
    words = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a conversion needs memory, not an accelerator

    from llm_jax import load
    from llm_jax.checkpoint import check_new
    from llm_jax.checkpoint.hf_export import ExportConfig

    settings = ExportConfig(dtype=words.dtype, max_shard_bytes=parse_size(words.max_shard_size))
    check_new(words.out)
    model = load(words.model, words.step)
    if words.adapter:
        for option in ("dtype", "no_tokenizer", "no_logits"):
            if vars(words)[option]:
                raise ConfigError(
                    f"--{option.replace('_', '-')} says nothing about an adapter; leave it out with --adapter"
                )
        tell(export_adapter(model, words.out), words.out)
        return
    skip = "--no-logits was given" if words.no_logits else ""
    report = export_model(
        model.merged(), words.out, settings, with_tokenizer=not words.no_tokenizer, skip=skip
    )
    tell(report, words.out)


def parse_size(text: str) -> int:
    """`5GB` in bytes. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,15})\s*([KMG]B|)", text.strip().upper())
    if not found or not int(found[1]):
        raise ConfigError(f"--max-shard-size={text[:40]!r} must be a size such as 5GB or 500MB")
    return int(found[1]) * UNITS[found[2]]


def export_model(
    model: "Model",
    out: Path,
    settings: "ExportConfig",
    *,
    with_tokenizer: bool = True,
    skip: str = "",
) -> "Report":
    """Writes `model` as the folder `out`; see the module text.

    Args:
      model: without adapters.
      out: must not exist.
      settings: dtype and size of the files.
      with_tokenizer: whether its files are written too.
      skip: why the model is not run; empty: it is.

    Raises:
      CheckpointError, ConfigError, DataError: it cannot be exported, or a check failed; `out` is not there.
    """
    from llm_jax.checkpoint import making, read_meta, write_json_atomic
    from llm_jax.checkpoint.hf_export import choose_family, trimmed, write_weights
    from llm_jax.checkpoint.parity import Report
    from llm_jax.model import count_params, families
    from llm_jax.run import hf_files

    meta = read_meta(model.path)
    source = meta.get("hf", {})
    tokenizer = model.own_tokenizer if with_tokenizer else None
    rows = kept_rows(model, source)
    params, config = trimmed(model.params, model.config, rows)
    model = dataclasses.replace(model, params=params, config=config, own_tokenizer=tokenizer)
    family = choose_family(meta, config)
    dtype = settings.dtype or config.param_dtype
    with making(out) as partial:
        require_room(out, count_params(config) * (4 if dtype == "float32" else 2))
        files, facts = {}, {}
        if tokenizer is not None:
            files, facts = hf_files.tokenizer_for_export(
                tokenizer, carried(model), config.max_seq_len
            )
        ids = hf_files.chosen_ids(tokenizer, source)
        files |= hf_files.model_files(families.write(family, config), ids, source, dtype)
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
        written = write_weights(partial, params, family, config, settings)
        report = Report("export", {"family": family, "model": model.path, "step": model.step})
        report.passed("tensors", files=written, dtype=dtype, rows=rows)
        _check(report, model, partial, files, facts, skip)
        write_json_atomic(partial / PARITY, report.to_dict())
    return report


def kept_rows(model: "Model", source: Mapping[str, Any]) -> int:
    """Rows of the vocabulary that are no padding: the tokenizer's, and those its source came with."""
    size = model.config.vocab_size
    stated = source.get("vocab_size", 0)
    came_with = stated if stated <= size else 0
    if model.own_tokenizer is None:
        return came_with or size
    return max(model.own_tokenizer.vocab_size, came_with)


def carried(model: "Model") -> dict[str, bytes]:
    """All the tokenizer's files in the model folder; its object knows those it needs."""
    from llm_jax.checkpoint import tokenizer_folder
    from llm_jax.run import hf_files

    return hf_files.read_tokenizer_files(tokenizer_folder(model.path))


def _check(
    report: "Report",
    model: "Model",
    partial: Path,
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
    skip: str,
) -> None:
    from llm_jax.checkpoint.hf_import import differences, open_source
    from llm_jax.run import gate

    again = open_source(partial)
    wrong = list(differences(again, model.params, to_file=True))
    report.require("round_trip", not wrong, f"{wrong[:3]} differ from the parameters")
    report.parts["tensors"]["used"] = len(again.tensors)
    exact = again.dtypes == (model.config.param_dtype,) or again.dtypes == ("float32",)
    report.passed("round_trip", bitwise=exact, tensors=len(again.tensors))
    _check_tokenizer(report, model.own_tokenizer, partial, files, facts)
    round_to = "" if exact else again.dtypes[0]
    gate.check_model(
        report, model.config, lambda: as_written(model, round_to), partial, ours=True, skip=skip
    )


def as_written(model: "Model", dtype: str) -> "Model":
    """The model with its parameters rounded as the files have them."""
    if not dtype:
        return model
    import jax

    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.params)
    return dataclasses.replace(model, params=rounded)


def _check_tokenizer(
    report: "Report",
    tokenizer: Tokenizer | None,
    partial: Path,
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
) -> None:
    from llm_jax import tokenizer as tokenizers
    from llm_jax.run import gate, hf_files
    from llm_jax.tokenizer import probe

    said = hf_files.agreement(files, tokenizer)
    if tokenizer is None:
        report.not_run("tokenizer", "the model has no tokenizer, or --no-tokenizer was given")
    else:
        probes = probe.texts(tokenizer)
        found = probe.differences(tokenizer, tokenizers.load(partial), probes)
        report.require("tokenizer", not found, f"{len(found)} texts differ in what was written")
        theirs = gate.check_their_tokenizer(report, tokenizer, partial, ours=True)
        for role, id in theirs["transformers"].get("ids", {}).items():
            said[role]["transformers"] = id
        report.passed("tokenizer", texts=len(probes), ids=tokenizer.vocab_size, **facts, **theirs)
    wrong = hf_files.disagreements(said)
    report.require("special_tokens", not wrong, "; ".join(wrong))
    report.passed("special_tokens", said=said)


if __name__ == "__main__":
    cli.leave(cli.run(main))
