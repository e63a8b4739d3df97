"""A tokenizer whose ids can be worked out by hand, and data prepared with it."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llm_jax.data.prepare import PrepareConfig, prepare
from llm_jax.data.shards import Prepared
from llm_jax.data.sources import SourceConfig

BOS, EOS = 256, 257


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Path:
    """Every byte is one token: a byte-level BPE without merges. BOS is 256, EOS 257."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    model.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    model.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    return folder


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make_prepared(tmp_path, byte_tokenizer):
    """Prepares {source: texts}; settings go to PrepareConfig."""
    made = 0

    def make(sources: dict[str, list[str]], **settings) -> Prepared:
        nonlocal made
        made += 1
        configs = tuple(
            SourceConfig(name=name, path=str(write_jsonl(tmp_path / f"{made}-{name}.jsonl", texts)))
            for name, texts in sources.items()
        )
        return prepare(
            PrepareConfig(
                sources=configs,
                tokenizer=str(byte_tokenizer),
                output=str(tmp_path / f"prepared-{made}"),
                **settings,
            )
        )

    return make
