"""Small real tokenizers, one of each kind, trained once."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from llm_jax import tokenizer
from llm_jax.tokenizer import TokenizerTrainConfig

TEXTS = [
    "The model reads text and learns which letters follow each other. It was the best of times.\n",
    "def add(first, second):\n    return first + second  # 12345\n\n\tprint(add(1, 2))\n",
    "机器学习是人工智能的一个分支。我们训练模型，让它学会预测下一个词。\n今天天气很好，我们去公园散步吧！\n",
    "小明问：“你吃饭了吗？”小红说：“还没有，我们一起去吧。”\n",
    "Every morning the old fisherman walked down to the harbour, looked at the sky and waited.\n",
    "We measured the training speed, the memory and the quality of several language models.\n",
    "从前有一座山，山上有一座庙，庙里有一个老和尚在给小和尚讲故事。\n",
    "数据处理、模型训练、文本生成，都可以在一台普通的电脑上完成。\n",
] * 3


def small(**settings) -> TokenizerTrainConfig:
    """Settings that the few texts above can fill."""
    defaults = {"vocab_size": 400, "character_coverage": 1.0, "threads": 2}
    return TokenizerTrainConfig(**(defaults | settings))


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def trained(request):
    return tokenizer.train(small(kind=request.param), TEXTS)


@pytest.fixture(scope="session")
def bpe():
    return tokenizer.train(small(), TEXTS)


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """A byte-level BPE as GPT-2 has it, with special and ordinary added tokens."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([*TEXTS, "<|<|<| |>|>|>\n" * 9], trainer)
    built.add_tokens(["<|fim_prefix|>", "<think>"])
    built.enable_truncation(4)
    return built.to_str()


@pytest.fixture(scope="session")
def unigram_json() -> str:
    """A unigram list whose own pieces spell </s>, as T5's does, behind a rewriting normaliser."""
    letters = [(letter, -4.0) for letter in "abcdefgs</>"]
    built = Tokenizer(
        models.Unigram(
            [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *letters], unk_id=2
        )
    )
    built.normalizer = normalizers.NFKC()
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(["<pad>", "</s>", AddedToken("<unk>", special=True)])
    return built.to_str()


@pytest.fixture
def byte_level(tmp_path, byte_level_json):
    (tmp_path / "byte-level").mkdir()
    (tmp_path / "byte-level" / "tokenizer.json").write_text(byte_level_json, encoding="utf-8")
    return tokenizer.load(tmp_path / "byte-level")


@pytest.fixture
def unigram_list(tmp_path, unigram_json):
    (tmp_path / "unigram").mkdir()
    (tmp_path / "unigram" / "tokenizer.json").write_text(unigram_json, encoding="utf-8")
    return tokenizer.load(tmp_path / "unigram" / "tokenizer.json")


def edited(text: str, **changes) -> str:
    """A tokenizer.json with some of its top fields replaced."""
    return json.dumps(json.loads(text) | changes)
