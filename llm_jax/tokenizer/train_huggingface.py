"""Training a byte-level BPE or a WordPiece vocabulary, kept as `tokenizer.json`.

Byte-level BPE splits as GPT-2 and GPT-NeoX do, so that a clause of Chinese is one word for the merges,
and has no unknown text. WordPiece is BERT's, without its lower-casing and accent stripping; it is here
to be compared: its splitter makes every Han character a word, so no piece ever spans two, and it
drops all white space.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llm_jax.errors import ConfigError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.huggingface import HuggingFaceTokenizer

END, PADDING = "<|endoftext|>", "<|padding|>"  # ids 0 and 1 of byte-level BPE, as GPT-NeoX has them
WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0-4
MAX_PIECE_BYTES = 48  # 16 Han characters, SentencePiece's limit
CHUNK_CHARACTERS = 4000


def reserved(kind: str) -> tuple[str, ...]:
    """The special tokens that a kind has anyway."""
    return {"byte-bpe": (END, PADDING), "wordpiece": WORDPIECE_SPECIALS}.get(kind, ())


def chunks(text: str) -> Iterator[str]:
    """Parts of a document, cut before a newline where there is one, that lose nothing.

    Unlike lines they keep newlines and indentation, which byte-level pieces spell.
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        limit = start + CHUNK_CHARACTERS
        cut = max(text.rfind("\n", start + 1, limit), text.rfind(" ", start + 1, limit))
        end = cut if cut > start else limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def train_byte_bpe(
    parts: Iterable[str],
    *,
    vocab_size: int,
    normalization: str,
    add_dummy_prefix: bool,
    split_digits: bool,
    special_tokens: tuple[str, ...],
) -> HuggingFaceTokenizer:
    """Byte-level BPE: `END`, `PADDING`, the special tokens, the 256 bytes, the merges."""
    specials = [END, PADDING, *special_tokens]
    least = len(specials) + 256
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: {len(specials)} special tokens and 256 bytes need "
            f"{least}; raise vocab_size"
        )
    built = tokenizers.Tokenizer(models.BPE())
    built.normalizer = _normalizer(normalization)
    built.pre_tokenizer = _splitter(
        pre_tokenizers.ByteLevel(add_prefix_space=add_dummy_prefix), split_digits
    )
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_PIECE_BYTES,
        show_progress=False,
    )
    built.train_from_iterator(parts, trainer)
    return _finished(built, vocab_size, bos=END, eos=END, pad=PADDING)


def train_wordpiece(
    parts: Iterable[str],
    *,
    vocab_size: int,
    character_coverage: float,
    normalization: str,
    split_digits: bool,
    special_tokens: tuple[str, ...],
) -> HuggingFaceTokenizer:
    """WordPiece: BERT's five special tokens, the special tokens, characters, learned pieces."""
    parts = list(parts)
    specials = [*WORDPIECE_SPECIALS, *special_tokens]
    kept = _covering(parts, character_coverage)
    built = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    bert = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    first = _normalizer(normalization)
    built.normalizer = normalizers.Sequence([first, bert]) if first else bert
    built.pre_tokenizer = _splitter(pre_tokenizers.BertPreTokenizer(), split_digits)
    built.decoder = decoders.WordPiece(prefix="##", cleanup=False)

    def learn(size: int, first_ids: list[str]) -> None:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=first_ids,
            limit_alphabet=len(kept),
            initial_alphabet=kept,
            continuing_subword_prefix="##",
            show_progress=False,
        )
        built.train_from_iterator(parts, trainer)

    # The trainer numbers continuing characters in the order of a hash table with a random seed, and
    # breaks ties by these numbers. A first pass that learns nothing gives the characters; they are
    # then numbered like special tokens, in their order.
    learn(1, specials)
    continuing = sorted(piece for piece in built.get_vocab() if re.fullmatch("##.", piece))
    least = built.get_vocab_size()
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small for the characters of this text; it needs at least "
            f"{least}: raise vocab_size or lower character_coverage"
        )
    built.model = models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100)
    learn(vocab_size, [*specials, *continuing])
    description = json.loads(built.to_str())
    added = [token for token in description["added_tokens"] if token["content"] in specials]
    built = tokenizers.Tokenizer.from_str(json.dumps({**description, "added_tokens": added}))
    return _finished(built, vocab_size, bos="[CLS]", eos="[SEP]", pad="[PAD]", unk="[UNK]")


def _splitter(words: Any, split_digits: bool) -> Any:
    if not split_digits:
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def _normalizer(name: str) -> Any:
    return normalizers.NFKC() if name == "nfkc" else None


def _covering(parts: list[str], coverage: float) -> list[str]:
    """The most frequent characters that make up `coverage` of the text, white space aside."""
    counts = Counter()
    for part in parts:
        counts.update(re.sub(r"\s+", "", part))
    wanted, sofar, kept = coverage * sum(counts.values()), 0, []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if sofar >= wanted:
            break
        kept.append(character)
        sofar += count
    return kept


def _finished(built: tokenizers.Tokenizer, vocab_size: int, **roles: str) -> HuggingFaceTokenizer:
    """Our tokenizer over the trained one, with the file that tells transformers what it is."""
    size = built.get_vocab_size()
    if size < vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size} is more than this text can fill; the largest possible is {size}: "
            "lower vocab_size or give more text"
        )
    config = {f"{role}_token": piece for role, piece in roles.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(1e30),  # no limit, as transformers spells it
        "clean_up_tokenization_spaces": False,
    }
    return HuggingFaceTokenizer(
        {
            tokenizer_files.HUGGING_FACE: built.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }
    )
