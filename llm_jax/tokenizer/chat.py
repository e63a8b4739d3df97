"""A tokenizer made ready for conversations: their markers as special tokens, EOS at the end of a turn.

Markers that the vocabulary lacks take reserved ids where it has some (Llama 3, Gemma), whose rows the
model has already; otherwise ids behind the vocabulary. All other ids stay.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.base import Tokenizer
from llm_jax.tokenizer.huggingface import HuggingFaceTokenizer
from llm_jax.tokenizer.sentencepiece import PieceType, SentencePieceTokenizer, parse_model

SETTINGS, SPECIALS = tokenizer_files.COMPANIONS[:2]
# special tokens that no training text held, by the name of their kind
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|<\|?unused_?\d+\|?>|\[unused_?\d+\]")


def for_chat(
    tokenizer: Tokenizer, specials: Sequence[str], end_of_turn: str, template: str
) -> Tokenizer:
    """The tokenizer with every piece of `specials` special, and the template among its files.

    Args:
      tokenizer: the base model's.
      specials: pieces that a template writes.
      end_of_turn: the piece that becomes EOS, so that generation stops there; "" leaves EOS as it is.
      template: Jinja text.

    Raises:
      DataError: a piece is in the vocabulary as ordinary text.
    """
    files = dict(tokenizer.files)
    lacking = []
    for piece in specials:
        id = tokenizer.id_of(piece)
        if id < 0:
            lacking.append(piece)
        elif id not in tokenizer.special_ids:
            raise DataError(
                f"the chat template needs {piece!r} as a special token, but id {id} of the tokenizer is text of "
                "that spelling; choose another template"
            )
    placed = _places(tokenizer, lacking)
    if tokenizer_files.HUGGING_FACE in files:
        files[tokenizer_files.HUGGING_FACE] = _in_json(files, placed, tokenizer.vocab_size)
    else:
        files[tokenizer_files.SENTENCEPIECE] = _in_model(files, placed)
    settings = _object(files, SETTINGS)
    settings.pop("chat_template", None)  # else two would be said
    behind = {i: p for i, p in placed.items() if i >= tokenizer.vocab_size}
    entries = dict(settings.get("added_tokens_decoder", {}))
    for id, piece in placed.items():
        if str(id) in entries or (id in behind and tokenizer_files.HUGGING_FACE not in files):
            entries[str(id)] = _added(piece)
    if entries:
        settings["added_tokens_decoder"] = entries
    if end_of_turn:
        settings["eos_token"] = end_of_turn
    if settings:
        files[SETTINGS] = _json(settings)
    if SPECIALS in files:
        files[SPECIALS] = _json(_renamed(_object(files, SPECIALS), tokenizer, placed, end_of_turn))
    files[tokenizer_files.CHAT_TEMPLATE] = template.encode()
    kind = HuggingFaceTokenizer if tokenizer_files.HUGGING_FACE in files else SentencePieceTokenizer
    made = kind(files, "the tokenizer with the chat template's tokens")
    for id, piece in placed.items():
        if made.id_of(piece) != id or id not in made.special_ids:
            raise DataError(
                f"the chat template's {piece!r} should become id {id} of the tokenizer, but became "
                f"{made.id_of(piece)}; choose another template"
            )
    return made


def _places(tokenizer: Tokenizer, lacking: Sequence[str]) -> dict[int, str]:
    """Id -> piece for every piece that the vocabulary lacks."""
    if not lacking:
        return {}
    reserved = [
        i for i in sorted(tokenizer.special_ids) if RESERVED.fullmatch(tokenizer.piece_of(i))
    ]
    behind = range(tokenizer.vocab_size, tokenizer.vocab_size + len(lacking))
    return dict(zip([*reserved, *behind], lacking, strict=False))


def _in_json(files: Mapping[str, bytes], placed: Mapping[int, str], size: int) -> bytes:
    """`tokenizer.json` with these pieces at these ids; byte for byte as it was where there are none."""
    content = files[tokenizer_files.HUGGING_FACE]
    if not placed:
        return content
    data = tokenizer_files.parse_json(content, tokenizer_files.HUGGING_FACE)
    vocab = data["model"].get("vocab")
    tokens = data.setdefault("added_tokens", [])
    for id, piece in placed.items():
        if id >= size:
            tokens.append({"id": id, **_added(piece)})
            continue
        for token in tokens:
            if token.get("id") == id:
                token |= _added(piece)
        if isinstance(vocab, dict):
            for old in [old for old, found in vocab.items() if found == id]:
                vocab[piece] = vocab.pop(old)
        elif isinstance(vocab, list) and id < len(vocab):
            vocab[id][0] = piece
    return _json(data)


def _in_model(files: Mapping[str, bytes], placed: Mapping[int, str]) -> bytes:
    """`tokenizer.model` with reserved pieces renamed; those behind it are declared in the settings."""
    content = files[tokenizer_files.SENTENCEPIECE]
    proto = parse_model(content, tokenizer_files.SENTENCEPIECE)
    renamed = {id: piece for id, piece in placed.items() if id < len(proto.pieces)}
    if not renamed:
        return content
    for id, piece in renamed.items():
        proto.pieces[id].piece = piece
        proto.pieces[id].type = PieceType.CONTROL
    return proto.SerializeToString()


def _renamed(
    data: dict[str, Any], tokenizer: Tokenizer, placed: Mapping[int, str], end_of_turn: str
) -> dict[str, Any]:
    """special_tokens_map.json in the new names."""
    names = {tokenizer.piece_of(i): p for i, p in placed.items() if i < tokenizer.vocab_size}
    more = data.get("additional_special_tokens")
    if isinstance(more, list):
        data["additional_special_tokens"] = [
            names.get(token, token) if isinstance(token, str) else token for token in more
        ]
    return {**data, **({"eos_token": end_of_turn} if end_of_turn else {})}


def _added(piece: str) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"content": piece, **dict.fromkeys(flags, False), "special": True}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return tokenizer_files.parse_json(files[name], name) if name in files else {}


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n"
