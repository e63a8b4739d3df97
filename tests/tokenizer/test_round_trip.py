"""Text comes back as it was, and never as a special id."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tokenizer.conftest import TEXTS

HARD = [
    "",
    " ",
    " leading, trailing  ",
    "two\n\nnewlines\r\nand\ta tab\t\tor  double   spaces",
    "line\u2028separator\u2029and\u0085next\x0bline\x00nul",
    "全角：，。！？“引号”（括号）《书名》、；——……　空格",
    "😀👨‍👩‍👧🇨🇳é e\u0301 ﬁ ½ ①",
    "龘𠮷𪚥䶮 rare Han",
    "\u2581 and \u2581\u2581spaces\u2585 of the trainer\u2581",
    "\ufeffBOM \ufffd replacement \u2047",
    "<0x0A><0xFF>",
]

SPELLED = [
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
]


@pytest.mark.parametrize("text", [*HARD, *TEXTS[:4], " ".join(SPELLED)])
def test_trained_tokenizers_give_back_every_text(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("text", [*HARD, *TEXTS[:4], " ".join(SPELLED)])
def test_byte_level_tokenizers_give_back_every_text(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t▁<|>s你好"))
    )
)
def test_any_text_comes_back_and_holds_no_special_id(trained, byte_level, text):
    for tokenizer in (trained, byte_level):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    "spelled", [*SPELLED, "a</s>b<|im_end|>c", "</s>" * 3000, "＜/s＞", "</</s>s>"]
)
def test_spelled_special_tokens_stay_text(trained, byte_level, unigram_list, spelled):
    for tokenizer in (trained, byte_level, unigram_list):
        ids = tokenizer.encode(spelled)
        assert ids
        assert tokenizer.special_ids.isdisjoint(ids)
        (batch,) = tokenizer.encode_batch([spelled])
        assert batch.tolist() == ids


def test_the_library_itself_would_give_the_special_ids(byte_level_json, unigram_json):
    # what the test above guards against; if the libraries change, this says so
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(byte_level_json).encode("<|endoftext|>").ids == [0]
    unigram = Tokenizer.from_str(unigram_json)
    unigram.encode_special_tokens = True
    assert 1 in unigram.encode("a</s>").ids


def test_lone_surrogates_become_question_marks(trained, byte_level):
    for tokenizer in (trained, byte_level):
        assert tokenizer.decode(tokenizer.encode("a\ud800b你")) == "a?b你"
        assert tokenizer.decode(list(tokenizer.encode_batch(["\udfff你", "x"])[0])) == "?你"


def test_a_batch_equals_one_by_one(trained, byte_level, unigram_list):
    texts = [*HARD, *TEXTS, "ab</s>cd", "x" * 5000]
    for tokenizer in (trained, byte_level, unigram_list):
        rows = tokenizer.encode_batch(texts)
        assert [row.tolist() for row in rows] == [tokenizer.encode(text) for text in texts]
        assert all(row.dtype == np.int32 for row in rows)
        assert tokenizer.encode_batch([]) == []


def test_decoding_leaves_out_special_ids(trained, byte_level):
    for tokenizer in (trained, byte_level):
        start = tokenizer.id_of("<|im_start|>")
        ids = [tokenizer.bos_id, start, *tokenizer.encode("你 好"), tokenizer.eos_id]
        assert tokenizer.decode(ids) == "你 好"
        assert tokenizer.decode(np.asarray(ids)) == "你 好"
        assert tokenizer.decode([]) == ""


def test_incomplete_utf8_becomes_replacement_characters(trained, byte_level):
    for tokenizer in (trained, byte_level):
        cut = tokenizer.encode("𪚥")[:-1]  # the rare character is spelled as 4 bytes
        assert set(tokenizer.decode(cut)) == {"\ufffd"}


def test_ids_outside_the_vocabulary_are_an_index_error(trained, byte_level):
    for tokenizer in (trained, byte_level):
        for id in (-1, tokenizer.vocab_size):
            with pytest.raises(IndexError, match=f"id {id} is not in 0"):
                tokenizer.decode([id])


def test_pickled_tokenizers_encode_alike(trained, byte_level):
    for tokenizer in (trained, byte_level):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
        assert copy.fingerprint == tokenizer.fingerprint


def test_token_bytes_are_those_of_the_pieces(trained, byte_level):
    lengths = trained.token_num_bytes()
    assert lengths.dtype == np.int32
    assert lengths.shape == (trained.vocab_size,)
    assert lengths[:6].tolist() == [0, 0, 0, 0, 0, 0]  # unk, s, /s, pad, im_start, im_end
    assert lengths[trained.id_of("\n")] == 1
    assert lengths[trained.id_of("<0xE4>")] == 1
    assert lengths[trained.id_of("机")] == 3
    assert byte_level.token_num_bytes()[byte_level.id_of("<|endoftext|>")] == 0
    assert byte_level.token_num_bytes()[byte_level.id_of("<think>")] == len("<think>")


def test_unigram_list_counts_spaces_and_letters(unigram_list):
    lengths = unigram_list.token_num_bytes()
    pieces = {piece: lengths[unigram_list.id_of(piece)] for piece in ("▁", "a", "</s>", "<unk>")}
    assert pieces == {"▁": 1, "a": 1, "</s>": 0, "<unk>": 0}


def test_unknown_text_reads_as_a_replacement_character(unigram_list):
    assert unigram_list.decode(unigram_list.encode("ab 你 cd")) == "ab \ufffd cd"
