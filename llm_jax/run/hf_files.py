"""What lies beside the weights in a Hugging Face folder: tokenizer, special ids, how to generate.

Four files say which ids are BOS, EOS and PAD: config.json, generation_config.json, tokenizer_config.json
and special_tokens_map.json. Where they disagree, a model never stops; here all are made from the tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.checkpoint.safetensors_files import find_file, parse_object, read_json
from llm_jax.errors import DataError
from llm_jax.model import ModelConfig
from llm_jax.tokenizer import Tokenizer, from_files, probe, vocab_merges
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.convert import to_tokenizer_json
from llm_jax.tokenizer.sentencepiece import SentencePieceTokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
SETTINGS, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER_FILES = (
    tokenizer_files.HUGGING_FACE,
    tokenizer_files.SENTENCEPIECE,
    *tokenizer_files.COMPANIONS,
    tokenizer_files.CHAT_TEMPLATE,
)
ROLES = ("bos", "eos", "pad")
MAX_JSON = 16 << 20


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder of others; empty if it has no tokenizer that can be read.

    `vocab.json` with `merges.txt`, where there is nothing newer, become a tokenizer.json.

    Raises CheckpointError for a link out of the folder, DataError for a file too large or broken.
    """
    found = _found(folder, TOKENIZER_FILES)
    if tokenizer_files.HUGGING_FACE in found or tokenizer_files.SENTENCEPIECE in found:
        return found
    older = _found(folder, (vocab_merges.VOCABULARY, vocab_merges.MERGES))
    if len(older) < 2:
        return {}
    made = vocab_merges.to_tokenizer_json({**older, **found}, str(folder))
    return {tokenizer_files.HUGGING_FACE: made, **found}


def _found(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    paths = {name: find_file(folder, name) for name in names}
    return {name: tokenizer_files.read_file(path) for name, path in paths.items() if path}


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, or nothing."""
    path = find_file(folder, GENERATION)
    return read_json(path, MAX_JSON) if path else {}


def special_ids(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that a config.json or generation_config.json says; EOS may be several."""
    return {role: hf_config.get(f"{role}_token_id") for role in ROLES}


def tokenizer_for_export(
    tokenizer: Tokenizer, files: Mapping[str, bytes], max_seq_len: int
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tokenizer's files as transformers reads them, and what was proven about them.

    Raises:
      DataError: a SentencePiece model whose tokenizer.json would give other ids.
    """
    out = dict(files)
    facts: dict[str, Any] = {"fingerprint": tokenizer.fingerprint}
    made = tokenizer_files.HUGGING_FACE not in out
    if made:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        out[tokenizer_files.HUGGING_FACE] = to_tokenizer_json(tokenizer)
    settings = parse_object(out.get(SETTINGS, b"{}"), SETTINGS)
    settings.pop("auto_map", None)
    if made:
        # the class that takes tokenizer.json as it is; LlamaTokenizer would build one of its own
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["clean_up_tokenization_spaces"] = False
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("model_max_length", max_seq_len)
    specials = parse_object(out.get(SPECIALS, b"{}"), SPECIALS)
    for role in ROLES:
        id = role_ids(tokenizer)[role]
        piece = None if id is None else tokenizer.piece_of(id)
        for data in (settings, specials):
            data.pop(f"{role}_token", None)
            if piece is not None:
                data[f"{role}_token"] = piece
    unknown = _unknown(out[tokenizer_files.HUGGING_FACE])
    for data in (settings, specials):
        if unknown and "unk_token" not in data:
            data["unk_token"] = unknown
    out[SETTINGS], out[SPECIALS] = to_json(settings), to_json(specials)
    if made:
        facts["converted"] = _prove_equal(tokenizer, out)
    return out, facts


def _prove_equal(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Compares the tokenizer.json made here with the SentencePiece model it was made from."""
    json_only = {n: f for n, f in files.items() if n != tokenizer_files.SENTENCEPIECE}
    other = from_files(json_only, "the tokenizer.json made from tokenizer.model")
    probes = probe.texts(tokenizer)
    found = probe.differences(tokenizer, other, probes)
    if found:
        first = found[0]
        raise DataError(
            f"tokenizer.model cannot be exported as tokenizer.json: {len(found)} of {len(probes)} probe texts "
            f"differ, first {first.text[:30]!r} with {first.what} {str(first.first)[:60]} against "
            f"{str(first.second)[:60]}; export with --no-tokenizer and ship tokenizer.model yourself"
        )
    return {"from": tokenizer_files.SENTENCEPIECE, "texts": len(probes), "different": 0}


def _unknown(tokenizer_json: bytes) -> str:
    model = parse_object(tokenizer_json, tokenizer_files.HUGGING_FACE)["model"]
    if isinstance(model.get("unk_id"), int):
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token") or ""


def role_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """BOS, EOS and PAD of a tokenizer; None where it has none."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {role: id if id >= 0 else None for role, id in ids.items()}


def chosen_ids(tokenizer: Tokenizer | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """The ids for config.json and generation_config.json.

    The tokenizer's. A source that stops at several ids, the tokenizer's among them, keeps them all.
    """
    said = source.get("special_ids", {})
    if tokenizer is None:
        return {role: said.get(role) for role in ROLES}
    ids: dict[str, Any] = dict(role_ids(tokenizer))
    stops = source.get("generation_config", {}).get("eos_token_id") or said.get("eos")
    if isinstance(stops, list) and ids["eos"] in stops:
        ids["eos"] = stops
    return ids


def model_files(
    hf_config: Mapping[str, Any], ids: Mapping[str, Any], source: Mapping[str, Any], dtype: str
) -> dict[str, bytes]:
    """config.json and generation_config.json."""
    named = {f"{role}_token_id": id for role, id in ids.items() if id is not None}
    generation = dict(source.get("generation_config", {}))
    for key in [*(f"{role}_token_id" for role in ROLES), "transformers_version"]:
        generation.pop(key, None)
    # older versions of transformers read the second spelling of the dtype
    config = {**hf_config, **named, "dtype": dtype, "torch_dtype": dtype}
    return {CONFIG: to_json(config), GENERATION: to_json({**generation, **named})}


def agreement(files: Mapping[str, bytes], tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    """Role -> what each file says, read back from what was written."""
    said: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    for name in (CONFIG, GENERATION):
        data = parse_object(files.get(name, b"{}"), name)
        for role in ROLES:
            said[role][name] = data.get(f"{role}_token_id")
    for name in (SETTINGS, SPECIALS) if tokenizer is not None else ():
        data = parse_object(files.get(name, b"{}"), name)
        for role in ROLES:
            piece = data.get(f"{role}_token")
            piece = piece.get("content") if isinstance(piece, dict) else piece
            said[role][name] = None if piece is None else tokenizer.id_of(piece)  # pyright: ignore[reportOptionalMemberAccess]
    return said


def disagreements(said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Roles whose files say different ids; a list of ids agrees with each of its members."""
    found = []
    for role, by_file in said.items():
        sets = [set(v) if isinstance(v, list) else {v} for v in by_file.values()]
        if sets and not set.intersection(*sets):
            told = ", ".join(f"{name} {id}" for name, id in by_file.items())
            found.append(f"{role}: {told}")
    return found


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Raises DataError if there are ids without a row of the embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, but the embedding "
            f"{config.vocab_size} rows; one of the two belongs to another model"
        )


def to_json(data: Mapping[str, Any]) -> bytes:
    """As the hub writes it."""
    return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"
