"""Small real tokenizers of both kinds, trained once, and the text they were trained on."""

import functools
import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.tokenizer import Tokenizer, TokenizerTrainConfig, load, train
from llm_jax.tokenizer.vocab_merges import MERGES, VOCABULARY

ENGLISH = [
    "The model reads text and learns which letters follow each other.\n",
    "Every morning the old fisherman walked down to the harbour and looked at the sky.\n",
    "We measured the speed, the memory and the quality of several language models.\n",
]
CHINESE = [
    "从前有一座山，山上有一座庙，庙里有一个老和尚在给小和尚讲故事。\n",
    "今天天气很好，我们去公园散步吧！\n",
]


@functools.cache
def sentencepiece_bytes() -> Tokenizer:
    """Byte fallback: trained on English, so every Chinese character is three byte pieces."""
    return train(TokenizerTrainConfig(vocab_size=330, threads=1), ENGLISH * 3)


@functools.cache
def byte_level() -> Tokenizer:
    """GPT-2's kind of BPE: no BOS, pieces may end inside a character."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(CHINESE + ENGLISH, trainer)
    return _loaded(built)


@functools.cache
def metaspace_bytes() -> Tokenizer:
    """Llama 2's kind as tokenizer.json: the first space is dropped, byte runs decode all or nothing."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz,.", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    built = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _loaded(built)


def _loaded(built: tokenizers.Tokenizer) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(built.to_str(), encoding="utf-8")
        return load(path)


TOKENIZERS = {
    "sentencepiece": sentencepiece_bytes,
    "byte-level": byte_level,
    "metaspace": metaspace_bytes,
}


def older_files(**settings) -> dict[str, bytes]:
    """The tiny byte-level vocabulary in two files, and what tokenizer_config.json says."""
    model = json.loads(byte_level().files["tokenizer.json"])["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    files = {
        VOCABULARY: json.dumps(model["vocab"], ensure_ascii=False).encode(),
        MERGES: ("#version: 0.2\n" + "\n".join(pairs) + "\n").encode(),
    }
    if settings:
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    return files
