"""Extended vocabularies in the libraries that others use: the same ids."""

import json

import pytest
import sentencepiece

from llm_jax import tokenizer
from llm_jax.tokenizer.extend import ExtendConfig, extend
from tests.tokenizer.conftest import TEXTS, small
from tests.tokenizer.tiny_bases import BASES, CHINESE, ENGLISH, prose

MIXED = [*ENGLISH[:4], *CHINESE[:4], *prose(0)[:4], "a    b", "汉字 and English，混排。"]


def extension_in(folder, name, config=None):
    files = BASES[name]()
    if config:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    made = extend(files, ExtendConfig(add_pieces=120), texts=[*CHINESE, *prose(0)]).tokenizer
    made.save(folder)
    return made


@pytest.mark.parametrize("name", ["bpe", "unigram", "bpe, dummy prefix", "unigram, no bytes"])
def test_sentencepiece_loads_the_file_and_gives_equal_ids(name, tmp_path):
    made = extension_in(tmp_path, name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert theirs.vocab_size() == made.vocab_size
    for text in MIXED:
        assert theirs.EncodeAsIds(text) == made.encode(text)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["byte-level", "llama-3"])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPTNeoXTokenizerFast"])
def test_transformers_loads_a_byte_level_extension_and_gives_equal_ids(name, kind, tmp_path):
    from transformers import AutoTokenizer

    if name == "llama-3" and kind == "GPTNeoXTokenizerFast":
        pytest.skip("that class has a splitter of its own")
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    made = extension_in(tmp_path, name, config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # GPTNeoXTokenizer adds <|padding|> to any base without one
    assert len(theirs) == made.vocab_size + (kind == "GPTNeoXTokenizerFast")
    for text in MIXED:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == made.encode(text)
        assert theirs.decode(ids) == text


@pytest.mark.oracle
def test_transformers_converts_a_sentencepiece_extension_with_equal_ids(tmp_path):
    from transformers import AutoTokenizer

    # its LlamaTokenizer assumes Llama's settings: a space in front, spaces kept, no normalisation
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    made = extension_in(tmp_path, "llama-2", config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == made.vocab_size
    for text in (text.strip() for text in MIXED):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == made.encode(text)


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "size"), [("byte-bpe", 400), ("wordpiece", 290)])
def test_transformers_loads_what_is_trained_here(kind, size, tmp_path):
    from transformers import AutoTokenizer

    coverage = {"character_coverage": 0.9995} if kind == "byte-bpe" else {}
    made = tokenizer.train(small(kind=kind, vocab_size=size, threads=8, **coverage), TEXTS)
    made.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == made.eos_id
    for text in TEXTS[:8]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == made.encode(text)
