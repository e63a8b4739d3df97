"""Tokenizers of two kinds, random conversations in two languages, and what transformers makes of them."""

import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_jax import tokenizer as tokenizers
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.masks import chat_tokenizer
from llm_jax.instruct.templates import TEMPLATES, ChatTemplate
from llm_jax.run.hf_files import tokenizer_for_export

ENGLISH = [
    "the",
    "a",
    "function",
    "returns",
    "list",
    "of",
    "keeper",
    "river",
    "old",
    "walked",
    "slowly",
    "under",
    "seven",
    "white",
    "stones",
]
CHINESE = "函数返回一个新的列表从前有条大河山上的人走得很慢".strip()
# Llama 3's and Qwen's pre-tokenizer, which keeps a run of line ends together
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def sentence(rng: random.Random) -> str:
    """A few words of one of the two languages, some with line ends, markup or digits."""
    if rng.random() < 0.5:
        text = " ".join(rng.choice(ENGLISH) for _ in range(rng.randint(1, 12)))
    else:
        text = "".join(rng.choice(CHINESE) for _ in range(rng.randint(1, 20)))
    return text + rng.choice(["", ".", "。", "\n\n1. `x`", "\n" + rng.choice(ENGLISH), "？ 42"])


def conversations(count: int, seed: int = 0) -> list[tuple[Turn, ...]]:
    """One to four exchanges, half of them behind a system turn."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        turns = [Turn("system", sentence(rng))] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 4)):
            turns += [Turn("user", sentence(rng)), Turn("assistant", sentence(rng))]
        made.append(tuple(turns))
    return made


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 pieces with BOS and EOS."""
    rng = random.Random(1)
    built = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    built.train_from_iterator([sentence(rng) for _ in range(2000)], trainer)
    return tokenizers.from_files({"tokenizer.json": built.to_str().encode()}, "byte level")


def sentencepiece(add_dummy_prefix: bool = False) -> tokenizers.Tokenizer:
    """A SentencePiece BPE of 450 pieces, with two reserved ones."""
    rng = random.Random(2)
    config = tokenizers.TokenizerTrainConfig(
        vocab_size=450,
        special_tokens=("<unused0>", "<unused1>"),
        add_dummy_prefix=add_dummy_prefix,
        character_coverage=1.0,
    )
    return tokenizers.train(config, [sentence(rng) for _ in range(2000)])


def open_theirs(tokenizer: tokenizers.Tokenizer, template: ChatTemplate, folder: Path) -> Any:
    """transformers' tokenizer of the exported files."""
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    ours = chat_tokenizer(tokenizer, template)
    files, _ = tokenizer_for_export(ours, ours.files, 512)
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def apply(loaded: Any, turns: tuple[Turn, ...]) -> tuple[list[int], list[int]]:
    """`apply_chat_template` with the mask of the generation markers."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    made = loaded.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(made["input_ids"]), list(made["assistant_masks"])


NAMES = tuple(TEMPLATES)
