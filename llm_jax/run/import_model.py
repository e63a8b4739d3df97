"""`llm-jax import HF_DIR OUT`: a Hugging Face model as a model folder, behind the parity gate.

HF_DIR is a folder, or a name on the hub where `huggingface_hub` is installed and online. Safetensors
only. OUT appears when every check has passed; `OUT/parity.json` says which were made and what they found.
"""

import contextlib
import ctypes
import gc
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.config import to_dict
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.tokenizer import Tokenizer, from_files, probe

if TYPE_CHECKING:
    from llm_jax.checkpoint.hf_import import Source
    from llm_jax.checkpoint.parity import Report

# nothing else is fetched: no pickle, no code
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*tokens*.json",
            "chat_template.jinja", "vocab.json", "merges.txt"]  # fmt: skip
NAME = re.compile(r"[\w.-]+/[\w.-]+")
PARITY = "parity.json"
SPARE = 64 << 20  # bytes of disk for the tokenizer, records and what else is written meanwhile


def main(argv: list[str]) -> None:
    """Runs the command."""
    parser = cli.Parser(prog="llm-jax import", description="turn a Hugging Face model into ours")
    add = parser.add_argument
    add("source", metavar="HF_DIR", help="a Hugging Face model folder, or a name such as org/model")
    add("out", metavar="OUT", type=Path, help="the model folder to make; must not exist")
    add(
        "--param-dtype",
        default="",
        metavar="DTYPE",
        help="float32 or bfloat16 (default: bfloat16 if all tensors are, else float32: exact)",
    )
    add("--no-tokenizer", action="store_true", help="import the weights alone")
    add("--no-logits", action="store_true", help="do not run the model (for one too large here)")
    add(
        "--adapter",
        type=Path,
        metavar="PEFT_DIR",
        help="put this adapter, saved by PEFT, on a model of ours, given in place of HF_DIR",
    )
    words = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a conversion needs memory, not an accelerator

    from llm_jax.checkpoint import check_new
    from llm_jax.checkpoint.hf_import import PARAM_DTYPES

    if words.param_dtype and words.param_dtype not in PARAM_DTYPES:
        raise ConfigError(
            f"--param-dtype={words.param_dtype!r} must be one of {', '.join(PARAM_DTYPES)}"
        )
    check_new(words.out)  # before anything is fetched
    if words.adapter:
        for option in ("param_dtype", "no_tokenizer", "no_logits"):
            if vars(words)[option]:
                raise ConfigError(
                    f"--{option.replace('_', '-')} says nothing about an adapter; leave it out with --adapter"
                )
        from llm_jax.run.adapter import import_adapter

        tell(import_adapter(words.adapter, words.source, words.out), words.out)
        return
    folder = local_folder(words.source)
    skip = "--no-logits was given" if words.no_logits else ""
    report = import_model(
        folder,
        words.out,
        param_dtype=words.param_dtype,
        with_tokenizer=not words.no_tokenizer,
        skip=skip,
    )
    tell(report, words.out)


def import_model(
    folder: Path,
    out: Path,
    *,
    param_dtype: str = "",
    with_tokenizer: bool = True,
    skip: str = "",
) -> "Report":
    """Imports `folder` as the model folder `out`; see the module text.

    Raises:
      CheckpointError, ConfigError, DataError: it cannot be imported, or a check failed; `out` is not there.
    """
    from llm_jax.checkpoint import making, write_model
    from llm_jax.checkpoint.hf_import import differences, digests, open_source, read_params
    from llm_jax.model import count_params

    with making(out) as partial:
        source = open_source(folder, param_dtype)
        tokenizer, files = _tokenizer(source, with_tokenizer)
        width = 4 if source.config.param_dtype == "float32" else 2
        require_room(out, count_params(source.config) * width)
        meta = _meta(source, tokenizer)
        report = _new_report(source)
        with ThreadPoolExecutor(1) as pool:  # hashing leaves Python free to do the rest
            hashes = pool.submit(digests, [*source.files, folder / "config.json"])
            params = read_params(source)
            wrong = list(differences(source, params))
        meta["source"]["files"] = hashes.result()
        report.require("round_trip", not wrong, f"{wrong[:3]} differ from the files")
        return_memory()
        write_model(partial, out, params, meta, files)
        del params  # what was written is read again: never two copies in memory
        return_memory()
        _check(report, source, tokenizer, partial, skip)
        _write(partial, report)
    return report


def return_memory() -> None:
    """Gives freed memory back to the system: glibc kept as much as the parameters (measured)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _tokenizer(source: "Source", wanted: bool) -> tuple[Tokenizer | None, dict[str, bytes]]:
    from llm_jax.run import hf_files

    files = hf_files.read_tokenizer_files(source.folder) if wanted else {}
    if not files:
        return None, {}
    tokenizer = from_files(files, str(source.folder))
    hf_files.check_vocabulary(tokenizer, source.config, str(source.folder))
    return tokenizer, files


def _meta(source: "Source", tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the model folder records; `hf` is what an export needs to give the same folder back."""
    from llm_jax.run import hf_files

    return {
        "config": {"model": to_dict(source.config)},
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "family": source.family,
        "hf": {
            "vocab_size": source.config.vocab_size,
            "special_ids": hf_files.special_ids(source.hf_config),
            "generation_config": hf_files.read_generation(source.folder),
        },
        "source": {"folder": source.folder.name},
    }


def _new_report(source: "Source") -> "Report":
    from llm_jax.checkpoint.parity import Report

    report = Report("import", {"family": source.family, "source": source.folder.name})
    report.passed(
        "tensors",
        used=len(source.tensors),
        listed=list(source.listed),
        dtypes=list(source.dtypes),
        param_dtype=source.config.param_dtype,
    )
    return report


def _check(
    report: "Report", source: "Source", tokenizer: Tokenizer | None, partial: Path, skip: str
) -> None:
    """Reads what was written: array by array against the fingerprints of what equalled the files."""
    from llm_jax import load
    from llm_jax.checkpoint import inspect
    from llm_jax.run import gate

    for found in inspect(partial):
        report.require("round_trip", not found.problem, f"{found.item}: {found.problem}")
    report.passed("round_trip", bitwise=not source.rounded, tensors=len(source.tensors))
    _check_tokenizer(report, source, tokenizer, partial)
    round_to = source.config.param_dtype if source.rounded else ""
    gate.check_model(
        report,
        source.config,
        lambda: load(partial),
        source.folder,
        ours=False,
        skip=skip,
        round_to=round_to,
    )


def _check_tokenizer(
    report: "Report", source: "Source", tokenizer: Tokenizer | None, partial: Path
) -> None:
    """What came along encodes as what was there, and as transformers does."""
    from llm_jax import tokenizer as tokenizers
    from llm_jax.checkpoint import tokenizer_folder
    from llm_jax.run import gate, hf_files

    if tokenizer is None:
        report.not_run(
            "tokenizer",
            "the folder has no tokenizer.json, tokenizer.model or vocab.json with merges.txt to read",
        )
        report.not_run("special_tokens", "there is no tokenizer to compare with")
        return
    probes = probe.texts(tokenizer)
    saved = tokenizers.load(tokenizer_folder(partial))
    report.require("tokenizer", saved.fingerprint == tokenizer.fingerprint, "another fingerprint")
    found = probe.differences(tokenizer, saved, probes)
    report.require("tokenizer", not found, f"{len(found)} texts differ after saving")
    theirs = gate.check_their_tokenizer(report, tokenizer, source.folder, ours=False)
    report.passed(
        "tokenizer",
        kind=tokenizer.kind,
        fingerprint=tokenizer.fingerprint,
        ids=tokenizer.vocab_size,
        rows=source.config.vocab_size,
        texts=len(probes),
        **theirs,
    )
    files = {
        hf_files.CONFIG: hf_files.to_json(source.hf_config),
        hf_files.GENERATION: hf_files.to_json(hf_files.read_generation(source.folder)),
    }
    said = hf_files.agreement(files, None)
    for role, id in hf_files.role_ids(tokenizer).items():
        said[role]["tokenizer"] = id
    # the folder of others may disagree with itself: said here, mended by an export
    report.passed("special_tokens", said=said, disagree=hf_files.disagreements(said))


def require_room(out: Path, size: int) -> None:
    """Raises ConfigError unless the disk has room for `size` bytes and a little more."""
    free = shutil.disk_usage(out.absolute().parent).free
    needed = int(1.05 * size) + SPARE
    if free < needed:
        raise ConfigError(
            f"{out}: {_size(free)} free on the disk, {_size(needed)} needed; free some space"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _write(folder: Path, report: "Report") -> None:
    from llm_jax.checkpoint import write_json_atomic

    write_json_atomic(folder / PARITY, report.to_dict())


def tell(report: "Report", out: Path) -> None:
    """One line a check."""
    for name, facts in report.parts.items():
        print(f"{name:<20}{facts['status']}{_short(name, facts)}")
    print(f"written to {out}; {PARITY} there has the numbers")


def _short(name: str, facts: dict[str, Any]) -> str:
    if facts["status"] == "not run":
        return f": {facts['why']}"
    if name == "logits":
        return f": largest difference {facts['max_relative']:.1e}, greedy ids equal"
    if name == "bits_per_character":
        shown = (f"{k} {v['bits_per_character']:.2f}" for k, v in facts.items() if k != "status")
        return f": {', '.join(shown)}"
    if name == "special_tokens" and facts.get("disagree"):
        return f", but the folder disagrees with itself: {'; '.join(facts['disagree'])}"
    return ""


def local_folder(source: str) -> Path:
    """The folder, or a hub model fetched into the cache.

    Raises ConfigError if it is neither, or cannot be fetched.
    """
    if not source:
        raise ConfigError(
            "HF_DIR is empty; give a Hugging Face model folder or a name such as org/model"
        )
    if Path(source).exists():
        return Path(source)
    if not NAME.fullmatch(source):
        raise ConfigError(f"{source}: no such folder; give a Hugging Face model folder")
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{source}: no such folder; to fetch it from the hub, pip install 'llm-jax[hub]'"
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=PATTERNS))
    except Exception as error:  # offline, no such model, no permission: the library has many
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"{source}: no such folder, and it could not be fetched from the hub ({reason}); "
            "download it where there is a network and give the folder"
        ) from None
