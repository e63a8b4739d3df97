"""`vocab.json` with `merges.txt`: the ids of the tokenizer.json that says the same, or a refusal in one line."""

import json

import pytest

from llm_jax.errors import DataError
from llm_jax.tokenizer import from_files, probe
from llm_jax.tokenizer.vocab_merges import MERGES, to_tokenizer_json
from tests.tiny_text import byte_level, older_files


def loaded(files: dict[str, bytes]):
    companions = {name: text for name, text in files.items() if name.endswith("_config.json")}
    made = to_tokenizer_json(files, "folder")
    return from_files({"tokenizer.json": made, **companions}, "folder")


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "GPT2TokenizerFast"}])
def test_two_files_give_the_ids_of_the_one_file(settings):
    expected, tokenizer = byte_level(), loaded(older_files(**settings))
    assert probe.differences(expected, tokenizer, probe.texts(expected)) == []
    assert tokenizer.eos_id == tokenizer.bos_id == expected.id_of("<|endoftext|>")
    assert tokenizer.special_ids == {tokenizer.eos_id}
    windows = older_files()
    windows[MERGES] = windows[MERGES].replace(b"\n", b"\r\n")
    assert loaded(windows).fingerprint == loaded(older_files()).fingerprint


def test_qwen_cuts_digits_one_by_one_and_composes_characters():
    tokenizer = loaded(older_files(tokenizer_class="Qwen2Tokenizer"))
    one_by_one = [id for digit in "2024" for id in tokenizer.encode(digit)]
    assert tokenizer.encode("2024") == one_by_one
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    gpt2 = loaded(older_files())
    assert gpt2.encode("e\u0301") != gpt2.encode("\u00e9")


def test_added_tokens_have_the_ids_and_flags_that_the_companions_say():
    entries = {
        "300": {"content": "  ", "special": False, "normalized": True},
        "301": {"content": "<|im_end|>", "special": True, "rstrip": True},
    }
    files = older_files(added_tokens_decoder=entries, eos_token="<|im_end|>")
    tokenizer = loaded(files)
    assert tokenizer.vocab_size == 302
    assert tokenizer.encode("a  b")[1] == 300
    assert tokenizer.eos_id == 301
    assert 301 not in tokenizer.encode("a<|im_end|>"), "users' text is never a special token"
    tokens = json.loads(to_tokenizer_json(files, "folder"))["added_tokens"]
    assert [token["rstrip"] for token in tokens if token["id"] == 301] == [True]


def broken(**changes) -> dict[str, bytes]:
    return {**older_files(), **{name.replace("_", "."): text for name, text in changes.items()}}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (older_files(tokenizer_class="CLIPTokenizer"), "of a CLIPTokenizer are not known, only"),
        (broken(vocab_json=b"[1]"), "must hold a JSON object"),
        (broken(vocab_json=b'{"a": 0, "b": 0}'), "two pieces have the same id"),
        (broken(vocab_json=b'{"a": -1}'), "'a' has the id -1"),
        (broken(merges_txt=b"a b c\n"), "merges.txt:1: 'a b c' is no pair of pieces"),
        (broken(merges_txt=b"\xff\n"), "not valid UTF-8 at byte 0"),
        (broken(merges_txt=b"zz qq\n"), "does not belong to vocab.json"),
        (older_files(eos_token="</s>"), "'</s>' has a role, but no id"),
        (
            older_files(added_tokens_decoder={"400": {"content": "<x>"}}),
            "should have the id 400, but its place is 300",
        ),
    ],
)
def test_broken_files_are_refused_in_one_line(files, said):
    with pytest.raises(DataError, match=r".") as caught:
        to_tokenizer_json(files, "folder")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer"])
def test_transformers_reads_the_same_ids_from_the_two_files(name, tmp_path):
    import transformers

    entries = {"300": {"content": "<|im_end|>", "special": True}}
    files = older_files(tokenizer_class=name, added_tokens_decoder=entries)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    ours = loaded(files)
    texts = [text for text in probe.texts(ours) if "<|" not in text and text]
    assert len(texts) > 1000
    for text in texts:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
