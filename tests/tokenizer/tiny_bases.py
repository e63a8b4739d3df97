"""Bases that know English only, and Chinese to extend them with: small enough for property tests."""

import json
import random

from sentencepiece import sentencepiece_model_pb2 as schema
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_jax import tokenizer
from tests.tokenizer.conftest import TEXTS, small

ENGLISH = [text for text in TEXTS if text.isascii()]
CHINESE = [text for text in TEXTS if not text.isascii()]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prose(seed: int, documents: int = 60) -> list[str]:
    """Chinese-looking text: sentences of words that repeat, between Chinese punctuation."""
    draw = random.Random(seed)
    characters = "".join(sorted({c for text in CHINESE for c in text if "\u4e00" <= c <= "\u9fff"}))
    words = ["".join(draw.choices(characters, k=draw.choice((1, 2, 2, 3, 4)))) for _ in range(80)]
    return [
        "".join(
            draw.choice(words) + draw.choice(["", "", "", "，", "。", " API ", "“"])
            for _ in range(60)
        )
        for _ in range(documents)
    ]


def byte_level_base(ignore_merges: bool = False) -> dict[str, bytes]:
    """GPT-NeoX's shape: special token at 0, runs of spaces as added tokens behind the merges.

    With `ignore_merges` Llama 3's: another splitter, and words that are pieces skip the merges.
    """
    built = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignore_merges)
    if ignore_merges:
        from tokenizers import Regex

        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        built.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        built.pre_tokenizer = byte_level
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # a little Chinese, as every English base has seen, so that merges cross characters
    built.train_from_iterator([*ENGLISH, CHINESE[0]], trainer)
    built.add_tokens([AddedToken(" " * count, normalized=False) for count in (4, 3, 2)])
    built.add_special_tokens(["<|im_end|>"])
    description = json.loads(built.to_str())
    description["model"]["ignore_merges"] = ignore_merges
    return {"tokenizer.json": json.dumps(description).encode()}


def sentencepiece_base(kind: str, **settings) -> dict[str, bytes]:
    """A SentencePiece model of English; any setting of `TokenizerTrainConfig` may be given."""
    size = {"vocab_size": 340 if settings.get("byte_fallback", True) else 84}
    trained = tokenizer.train(small(kind=kind, **(size | settings)), ENGLISH)
    return dict(trained.files)


def with_added_token(files: dict[str, bytes]) -> dict[str, bytes]:
    """The base with a token of `added_tokens.json` behind a gap, as Chinese-Alpaca's [PAD]."""
    size = len(schema.ModelProto.FromString(files["tokenizer.model"]).pieces)  # pyright: ignore[reportAttributeAccessIssue]
    return files | {"added_tokens.json": json.dumps({"<|tool|>": size + 2}).encode()}


BASES = {
    "byte-level": byte_level_base,
    "llama-3": lambda: byte_level_base(ignore_merges=True),
    "bpe": lambda: sentencepiece_base("bpe"),
    "bpe, dummy prefix": lambda: sentencepiece_base(
        "bpe", add_dummy_prefix=True, remove_extra_whitespaces=True, normalization="nmt_nfkc"
    ),
    "llama-2": lambda: sentencepiece_base("bpe", add_dummy_prefix=True),
    "bpe, no bytes": lambda: sentencepiece_base("bpe", byte_fallback=False),
    "bpe, added token": lambda: with_added_token(sentencepiece_base("bpe")),
    "unigram": lambda: sentencepiece_base("unigram"),
    "unigram, no bytes": lambda: sentencepiece_base("unigram", byte_fallback=False),
}
