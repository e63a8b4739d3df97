"""Streaming: whole characters only, nothing lost, constant work per id."""

import pytest

from llm_jax.generate.text_stream import CONTEXT_IDS, MAX_HELD_IDS, TextStream
from tests.tiny_text import CHINESE, TOKENIZERS, byte_level, metaspace_bytes, sentencepiece_bytes

TEXTS = [
    "the fisherman, 你好 world. 一座山，山上有一座庙\n",
    "emoji \N{FAMILY} \N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-5}, é à ü",
    CHINESE[0] * 3,
    "  two leading spaces and\n\n\ttabs  ",
    "a",
]


def pieces_of(tokenizer, ids, **settings):
    stream = TextStream(tokenizer, **settings)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_decoded_text_and_never_hold_a_broken_character(kind, text):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_complete_character_is_out_as_soon_as_its_last_byte_came(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode("好山好水")
    stream, shown = TextStream(tokenizer), ""
    for count in range(1, len(ids) + 1):
        shown += stream.push(ids[count - 1])
        whole = tokenizer.decode(ids[:count])
        assert "\ufffd" in whole or shown == whole
    assert shown == "好山好水"


def test_the_space_between_prompt_and_continuation_is_kept():
    tokenizer = metaspace_bytes()
    prompt, more = tokenizer.encode("and the"), tokenizer.encode(" the")[-1:]
    assert tokenizer.decode(more) == "the"  # alone, the space is dropped
    assert "".join(pieces_of(tokenizer, more, context=prompt)) == " the"


def test_bytes_that_never_form_a_character_come_out_as_replacements():
    tokenizer = byte_level()
    half = tokenizer.encode("薯")[:1]
    assert tokenizer.decode(half) == "\ufffd", "no piece for the whole character"
    assert "".join(pieces_of(tokenizer, half)) == "\ufffd"
    letters = tokenizer.encode("ab")
    assert "".join(pieces_of(tokenizer, half + letters)) == "\ufffdab"


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, inner):
        self.inner, self.decoded = inner, 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.inner.decode(ids)


@pytest.mark.parametrize("garbage", [False, True])
def test_work_per_id_does_not_grow_with_the_length(garbage):
    tokenizer = sentencepiece_bytes()
    once = tokenizer.encode("薯")[:1] if garbage else tokenizer.encode("一座山, the sky. ")
    counting = CountingTokenizer(tokenizer)
    ids = once * (2000 // len(once))
    text = "".join(pieces_of(counting, ids))
    assert text == tokenizer.decode(ids)
    assert counting.decoded < len(ids) * 2 * (MAX_HELD_IDS + CONTEXT_IDS)


def test_a_stop_string_ends_the_stream_and_nothing_of_it_is_shown():
    tokenizer = byte_level()
    ids = tokenizer.encode("one two STOP three")
    stream = TextStream(tokenizer, stop=("STOP", "never"))
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    assert "".join(pieces) == "one two "
    assert stream.push(ids[0]) == stream.flush() == ""


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end():
    tokenizer = byte_level()
    pieces = pieces_of(tokenizer, tokenizer.encode("half a ST"), stop=("STOP",))
    assert "".join(pieces) == "half a ST"
    assert pieces[-1] == "ST"
