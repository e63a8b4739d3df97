"""The files a tokenizer is made of: found in a folder, read with a size cap, written whole or not at all.

A tokenizer keeps the bytes it was loaded from, so that saving gives back the same bytes and pickling
is the same as loading.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.errors import DataError

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CHAT_TEMPLATE = "chat_template.jinja"  # carried along for export, never run

# the largest in use (256k pieces as JSON) has 33 MB; a parser should never be fed an arbitrary blob
MAX_BYTES = 256 << 20


def read(path: Path) -> dict[str, bytes]:
    """The tokenizer's files at `path`, a folder or one file, under the names of this module.

    In a folder `tokenizer.json` comes before `tokenizer.model`, and that before one `*.model` of
    another name: the JSON file alone holds the tokens that were added later, and it is what the
    rest of the Hugging Face world reads. Naming the file itself decides otherwise. The companions
    beside the file are read too: they say which ids are special.

    Raises:
      DataError: nothing there, several candidates, empty or larger than `MAX_BYTES`.
    """
    model = _choose(path) if path.is_dir() else path
    if not model.is_file():
        raise DataError(
            f"{path}: no such file; a tokenizer is a folder with {HUGGING_FACE} or {SENTENCEPIECE}, "
            "made by `llm-jax tokenizer train`"
        )
    if model.suffix not in (".json", ".model"):
        raise DataError(
            f"{model}: a tokenizer file ends in .json (Hugging Face) or .model (SentencePiece)"
        )
    name = HUGGING_FACE if model.suffix == ".json" else SENTENCEPIECE
    companions = [model.parent / companion for companion in COMPANIONS]
    if model in companions:
        raise DataError(f"{model}: holds settings only; give the folder, or its {HUGGING_FACE}")
    beside = [*companions, model.parent / CHAT_TEMPLATE]
    return {name: read_file(model)} | {f.name: read_file(f) for f in beside if f.is_file()}


def _choose(folder: Path) -> Path:
    for name in (HUGGING_FACE, SENTENCEPIECE):
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.model"))
    if len(others) > 1:
        names = ", ".join(file.name for file in others)
        raise DataError(f"{folder}: holds several tokenizers ({names}); give the path of one file")
    if not others:
        raise DataError(
            f"{folder}: no {HUGGING_FACE} or {SENTENCEPIECE} in this folder; "
            "train one with `llm-jax tokenizer train`"
        )
    return others[0]


def read_file(file: Path) -> bytes:
    """The contents. Raises DataError: unreadable, empty, or larger than `MAX_BYTES`."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{file}: larger than {MAX_BYTES >> 20} MiB; that is no tokenizer file")
    if not content:
        raise DataError(f"{file}: the file is empty")
    return content


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a tokenizer's file. Raises DataError naming `where` and the line."""
    data = parse_json_value(content, where)
    if not isinstance(data, dict):
        raise DataError(f"{where}: must hold a JSON object, not a {type(data).__name__}")
    return data


def parse_json_value(content: bytes, where: str) -> Any:
    """Any JSON value. Raises DataError naming `where` and the line."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply for a tokenizer file") from None


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes `files` into `folder`, each by an atomic rename, the model itself last.

    A folder that was being written when the machine died thus has no model, or a complete one.

    Raises:
      DataError: the folder holds a tokenizer file that is not one of `files`, which would change
        what `load` reads back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (HUGGING_FACE, SENTENCEPIECE, *COMPANIONS):
        if name not in files and (folder / name).exists():
            raise DataError(
                f"{folder}: already holds the {name} of another tokenizer; choose an empty folder"
            )
    for name in sorted(files, key=lambda name: name in (HUGGING_FACE, SENTENCEPIECE)):
        write_file(folder / name, files[name])
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the renames themselves
    finally:
        os.close(descriptor)


def write_file(file: Path, content: bytes) -> None:
    """Writes one file by an atomic rename; on any error the old file stays and nothing is left behind."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(
                stream.fileno(), 0o644
            )  # mkstemp gives 0600: unreadable to a team's other members
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
