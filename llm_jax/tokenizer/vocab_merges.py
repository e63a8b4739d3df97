"""`vocab.json` and `merges.txt`, the older form of byte-level BPE, as the `tokenizer.json` that says the same.

The two files do not say how text is cut before it is merged: that is in the class that
`tokenizer_config.json` names. A class that is not in the table is refused, since another cut gives other ids.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import specials

VOCABULARY, MERGES = "vocab.json", "merges.txt"
GPT2, QWEN2 = "GPT2Tokenizer", "Qwen2Tokenizer"
# class, without its ending Fast -> whose cut it has; folders as old as GPT-2's name none
CUTS = {"": GPT2, GPT2: GPT2, "CodeGenTokenizer": GPT2, QWEN2: QWEN2}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token
END = "<|endoftext|>"  # both ends of text where the folder does not say
# of transformers.models.qwen2.tokenization_qwen2: digits one by one, newlines apart
QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def to_tokenizer_json(files: Mapping[str, bytes], where: str) -> bytes:
    """The same tokenizer as one file.

    Args:
      files: `VOCABULARY`, `MERGES` and the companions (`files.COMPANIONS`) that are there.
      where: the folder, for messages.

    Raises:
      DataError: a file is broken, they do not belong together, or the class is not known.
    """
    settings = tokenizer_files.parse_json(
        files.get(tokenizer_files.COMPANIONS[0], b"{}"), f"{where}/{tokenizer_files.COMPANIONS[0]}"
    )
    cut = CUTS.get(str(settings.get("tokenizer_class") or "").removesuffix("Fast"))
    if cut is None:
        raise DataError(
            f"{where}: {VOCABULARY} and {MERGES} of a {settings['tokenizer_class']} are not known, "
            f"only {', '.join(sorted(set(CUTS) - {''}))}; save it once as tokenizer.json with "
            "transformers, or import with --no-tokenizer"
        )
    vocabulary = _vocabulary(files[VOCABULARY], f"{where}/{VOCABULARY}")
    try:
        built = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=_merges(files[MERGES], f"{where}/{MERGES}"))
        )
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())
        raise DataError(
            f"{where}: {MERGES} does not belong to {VOCABULARY}: {reason}; copy both again"
        ) from None
    prefix = settings.get("add_prefix_space") is True
    if cut == QWEN2:
        built.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
        built.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(QWEN2_CUT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    else:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)  # pyright: ignore[reportAttributeAccessIssue]
    built.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    built.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    _add_tokens(built, files, settings.get("added_tokens_decoder") or {}, where)
    return built.to_str(pretty=False).encode()


def _vocabulary(content: bytes, where: str) -> dict[str, int]:
    """Piece -> id, each id once."""
    vocabulary = tokenizer_files.parse_json(content, where)
    for piece, id in vocabulary.items():
        if type(id) is not int or not 0 <= id < 1 << 24:
            raise DataError(f"{where}: {piece!r} has the id {id!r}; ids are 0 .. 16777215")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise DataError(f"{where}: two pieces have the same id; copy it again")
    return vocabulary


def _merges(content: bytes, where: str) -> list[tuple[str, str]]:
    """The pairs, first ones first; a first line `#version` is none."""
    try:
        # not splitlines: it cuts at characters that pieces may hold
        lines = content.decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 at byte {error.start}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise DataError(f"{where}:{number}: {line[:40]!r} is no pair of pieces; copy it again")
        pairs.append((pair[0], pair[1]))
    return pairs


def _add_tokens(
    built: tokenizers.Tokenizer, files: Mapping[str, bytes], entries: Mapping[str, Any], where: str
) -> None:
    """Tokens that the companions add, at their ids; those with a role are special.

    Args:
      entries: id -> how a token is matched in text, where the folder says that.
    """
    declared = specials.declared(files)
    named = {piece for piece in declared.roles.values() if piece}
    if "eos_token" not in declared.roles and built.token_to_id(END) is not None:
        named.add(END)
    wanted = dict(sorted(declared.added.items()))
    for piece in sorted(named - set(wanted.values())):
        id = built.token_to_id(piece)
        if id is None:
            raise DataError(f"{where}: {piece!r} has a role, but no id; copy the files again")
        wanted[id] = piece
    for id, piece in sorted(wanted.items()):
        special = piece in named or id in declared.special
        said = entries.get(str(id))
        said = said if isinstance(said, dict) else {}
        flags = {name: said[name] for name in FLAGS if isinstance(said.get(name), bool)}
        token = AddedToken(piece, special=special, **({"normalized": not special} | flags))
        (built.add_special_tokens if special else built.add_tokens)([token])
        if built.token_to_id(piece) != id:
            raise DataError(
                f"{where}: the added token {piece!r} should have the id {id}, but its place is "
                f"{built.token_to_id(piece)}; the files do not belong together"
            )
