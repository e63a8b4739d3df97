"""Text <-> ids: loading what others made, training our own. No jax here, so workers start fast.

    base            the protocol every tokenizer keeps, and how fingerprints are made
    files           which files a tokenizer is, read with a size cap and written atomically
    specials        which ids are special; text never becomes one
    sentencepiece   `tokenizer.model`
    huggingface     `tokenizer.json`
    train           a vocabulary from text: SentencePiece BPE and unigram
    train_huggingface   the same: byte-level BPE, WordPiece
    extend          a second language behind a base, whose ids stay; merges learns the pieces, given
                    reads a list of them, byte_level, piece_list and unigram are the kinds of base
    scripts         which characters, and which bytes, belong to a script
    spelling        new pieces in the ids of the base, and whether a tokenizer extends another
    audit           what a vocabulary does to text: unreachable pieces, rates, round trips, identity
    convert         `tokenizer.model` as an equal `tokenizer.json`
    probe           texts that tell two tokenizers apart
    chat            a tokenizer with the special tokens of a chat template

    tokenizer = load("runs/demo/tokenizer")
    ids = [tokenizer.bos_id, *tokenizer.encode("你好, world"), tokenizer.eos_id]
    tokenizer.decode(ids)  # "你好, world"

What is promised, and tested: text that spells a special token is plain text; with a tokenizer trained
here by its defaults `decode(encode(text)) == text` for every text without lone surrogates; `save`
gives back the bytes that were loaded; equal fingerprints mean equal ids.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from llm_jax.tokenizer import files as _files
from llm_jax.tokenizer.base import Tokenizer
from llm_jax.tokenizer.huggingface import HuggingFaceTokenizer
from llm_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from llm_jax.tokenizer.train import TokenizerTrainConfig, train

__all__ = ["Tokenizer", "TokenizerTrainConfig", "from_files", "load", "train"]


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer in a folder, or from one file ending in `.json` or `.model`.

    A folder with `tokenizer.json` and `tokenizer.model` gives the former, see `files.read`.

    Raises:
      DataError: missing, ambiguous, oversize, broken, or without an end-of-text id.
    """
    path = Path(path)
    return from_files(_files.read(path), str(path))


def from_files(files: Mapping[str, bytes], where: str) -> Tokenizer:
    """A tokenizer from its files by name, as `files.read` gives them. Raises DataError as `load`."""
    kind = HuggingFaceTokenizer if _files.HUGGING_FACE in files else SentencePieceTokenizer
    return kind(files, where)
