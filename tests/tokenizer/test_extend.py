"""An extended vocabulary: old ids and old text as they were, every new piece can be produced."""

import functools
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as schema

from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer import Tokenizer, audit, scripts
from llm_jax.tokenizer.extend import ExtendConfig, Extension, extend
from llm_jax.tokenizer.given import Given
from llm_jax.tokenizer.huggingface import HuggingFaceTokenizer
from llm_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.tokenizer.tiny_bases import BASES, CHINESE, ENGLISH, byte_level_base, prose

NEW = 150
UNHURRIED = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
]  # bases are trained in the first example
LOSSLESS = [
    name for name in BASES if "no bytes" not in name and "dummy" not in name and name != "llama-2"
]


@functools.cache
def files_of(name: str) -> dict[str, bytes]:
    return BASES[name]()


def open_files(files: dict[str, bytes]) -> Tokenizer:
    kind = HuggingFaceTokenizer if "tokenizer.json" in files else SentencePieceTokenizer
    return kind(files)


@functools.cache
def extended(name: str, seed: int = 0) -> tuple[Tokenizer, Extension]:
    files = files_of(name)
    config = ExtendConfig(add_pieces=NEW)
    return open_files(files), extend(files, config, texts=[*CHINESE, *prose(seed)])


def listed(*pieces: str) -> list[Given]:
    return [Given(piece, f"list:{number}") for number, piece in enumerate(pieces, 1)]


def lost_of(extension: Extension) -> set[int]:
    return {piece.id for piece in extension.added} & set(audit.unreachable(extension.tokenizer))


@pytest.mark.parametrize("name", BASES)
def test_old_ids_keep_their_pieces_and_new_ones_follow(name):
    base, extension = extended(name)
    new = extension.tokenizer
    assert [base.decode([id]) for id in range(base.vocab_size)] == [
        new.decode([id]) for id in range(base.vocab_size)
    ]
    assert new.special_ids >= base.special_ids
    assert all(base.decode([id]) == "" for id in new.special_ids - base.special_ids)  # gaps
    assert (new.bos_id, new.eos_id, new.pad_id) == (base.bos_id, base.eos_id, base.pad_id)
    first = base.vocab_size
    assert [piece.id for piece in extension.added] == list(range(first, first + NEW))
    assert new.vocab_size == first + NEW
    assert new.fingerprint != base.fingerprint
    for piece in extension.added[-20:]:
        assert new.decode([piece.id]) == piece.piece.decode("utf-8", "replace")


@pytest.mark.parametrize("name", BASES)
def test_every_new_piece_can_be_produced(name):
    _, extension = extended(name)
    assert lost_of(extension) == set()
    used = set(itertools.chain.from_iterable(extension.tokenizer.encode(t) for t in prose(0)))
    # the others are joins that longer pieces went through
    assert len([piece for piece in extension.added if piece.id in used]) > 0.5 * NEW


@pytest.mark.parametrize("name", BASES)
def test_the_new_language_gets_shorter_and_the_old_one_keeps_its_ids(name):
    base, extension = extended(name)
    held_out = prose(0, documents=80)[60:]
    before, after = (sum(len(t.encode(x)) for x in held_out) for t in (base, extension.tokenizer))
    if "no bytes" in name:  # unknown text was one token, whatever its length
        told = extension.tokenizer.decode(extension.tokenizer.encode(held_out[0]))
        assert set(scripts.SCRIPTS["han"].any_character.findall(held_out[0])) <= set(told)
    else:
        assert after < before / 1.7
    for text in [*ENGLISH, "naïve café — “quoted” … 12,345 €", "    indented\n\n\n\tx"]:
        assert extension.tokenizer.encode(text) == base.encode(text)


@pytest.mark.parametrize("name", ["byte-level", "bpe", "unigram"])
def test_the_same_input_gives_the_same_bytes(name):
    again = extend(files_of(name), ExtendConfig(add_pieces=NEW), texts=[*CHINESE, *prose(0)])
    assert dict(again.tokenizer.files) == dict(extended(name)[1].tokenizer.files)


@settings(max_examples=60, deadline=None, suppress_health_check=UNHURRIED)
@given(
    text=st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n机器学习模型，。的a")
        )
    )
)
def test_any_text_comes_back(text):
    for name in LOSSLESS:
        new = extended(name)[1].tokenizer
        assert new.decode(new.encode(text)) == text


@settings(max_examples=60, deadline=None, suppress_health_check=UNHURRIED)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_without_the_script_keeps_its_ids(text):
    text = scripts.SCRIPTS["han"].any_character.sub("x", text)
    for name in BASES:
        base, extension = extended(name)
        assert extension.tokenizer.encode(text) == base.encode(text)


@settings(max_examples=12, deadline=None, suppress_health_check=UNHURRIED)
@given(
    texts=st.lists(st.text("一二三四五，。ab ", min_size=4, max_size=40), min_size=3, max_size=12),
    name=st.sampled_from(sorted(BASES)),
)
def test_new_pieces_from_any_text_can_be_produced(texts, name):
    # repeated, so that there is something to learn; few characters, so that merges overlap
    try:
        extension = extend(files_of(name), ExtendConfig(add_pieces=12), texts=texts * 3)
    except (ConfigError, DataError):
        return
    assert lost_of(extension) == set()
    for text in texts:
        if name in LOSSLESS:
            ids = extension.tokenizer.encode(text)
            assert extension.tokenizer.decode(ids) == text


@settings(max_examples=15, deadline=None, suppress_health_check=UNHURRIED)
@given(
    pieces=st.lists(
        st.text("机器学习模型中华人民", min_size=1, max_size=6),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    name=st.sampled_from(sorted(BASES)),
)
def test_given_pieces_are_single_tokens_whatever_their_order(pieces, name):
    extension = extend(files_of(name), ExtendConfig(), wanted=listed(*pieces), skip_known=True)
    new = extension.tokenizer
    prefix = new.encode("")
    for piece in pieces:
        found = [id for id in new.encode(piece) if id not in prefix]
        assert piece.encode() in {p.piece for p in extension.added if p.id in found} or (
            len(open_files(files_of(name)).encode(piece)) <= 2
        )
    assert lost_of(extension) == set()


@pytest.mark.parametrize("name", BASES)
def test_common_characters_become_single_tokens(name):
    extension = extend(files_of(name), ExtendConfig(common_characters="gb2312-1"))
    new = extension.tokenizer
    plain = len(new.encode("x"))
    for character in scripts.common_characters("gb2312-1")[::97]:
        assert len(new.encode(f"x{character}")) == plain + 1
    helpers = sum(piece.origin == "helper" for piece in extension.added)
    # a byte-level list needs their first two bytes: U+4E00-9FFF has 328 such pairs
    assert helpers <= (328 if "tokenizer.json" in files_of(name) else 0)
    assert lost_of(extension) == set()


def test_given_pieces_come_before_learned_ones_and_count():
    wanted = listed("机器学习", "语言模型")
    extension = extend(files_of("bpe"), ExtendConfig(add_pieces=60), texts=prose(0), wanted=wanted)
    origins = [piece.origin for piece in extension.added]
    assert len(origins) == 60
    assert origins == sorted(origins, key=["given", "helper", "learned"].index) or (
        origins.index("learned") > max(i for i, o in enumerate(origins) if o != "learned")
    )
    assert origins.count("given") == 2


def test_added_tokens_keep_their_ids_when_pieces_are_put_behind_them():
    # the library numbers an added token that its model lacks by the size of the vocabulary
    base, extension = extended("byte-level")
    for token in ("  ", "    ", "<|im_end|>", "<|endoftext|>"):
        assert extension.tokenizer.id_of(token) == base.id_of(token) >= 0
    assert extension.tokenizer.encode("a    b") == base.encode("a    b")


def test_sentencepiece_scores_lie_below_the_old_ones_in_the_order_made():
    base, extension = extended("bpe")
    proto = schema.ModelProto.FromString(extension.tokenizer.files["tokenizer.model"])  # pyright: ignore[reportAttributeAccessIssue]
    old = [p.score for p in proto.pieces[: base.vocab_size] if p.type == 1]
    new = [p.score for p in proto.pieces[base.vocab_size :]]
    assert max(new) < min(old)
    assert new == sorted(new, reverse=True)
    assert len(set(new)) == len(new)


def test_appending_with_score_zero_loses_pieces_which_the_audit_finds():
    # what the scripts of Chinese-LLaMA do; it is why scores are set here
    _, extension = extended("bpe")
    proto = schema.ModelProto.FromString(extension.tokenizer.files["tokenizer.model"])  # pyright: ignore[reportAttributeAccessIssue]
    long = [p for p in extension.added if len(p.piece.decode()) >= 3]
    kept = {p.piece for p in extension.added if len(p.piece.decode()) == 1} | {
        p.piece for p in long
    }
    pieces = [p for p in proto.pieces[:340]] + [
        p for p in proto.pieces[340:] if p.piece.encode() in kept
    ]
    for piece in pieces[340:]:
        piece.score = 0.0
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    naive = SentencePieceTokenizer({"tokenizer.model": proto.SerializeToString()})
    assert len(audit.unreachable(naive)) > 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("中国", "中国"), r"list:2: piece '中国' is given twice, first at list:1; remove it"),
        (("a",), r"list:1: piece 'a' is in the base already; remove it, or add --skip-known"),
    ],
)
def test_repeated_and_known_pieces_are_refused_or_skipped(wanted, message):
    files = files_of("byte-level")
    with pytest.raises(DataError, match=message):
        extend(files, ExtendConfig(), wanted=listed(*wanted))
    extension = extend(files, ExtendConfig(), wanted=listed(*wanted, "模型"), skip_known=True)
    assert "模型".encode() in {piece.piece for piece in extension.added}


def test_a_piece_that_the_splitter_cuts_is_refused():
    with pytest.raises(
        DataError, match=r"list:1: piece '中，国' could never .* splits it into 3 words"
    ):
        extend(files_of("byte-level"), ExtendConfig(), wanted=listed("中，国"))


def test_a_piece_that_the_normaliser_rewrites_is_refused():
    with pytest.raises(DataError, match=r"list:1: piece '，' could never .* rewrites it to ','"):
        extend(files_of("bpe, dummy prefix"), ExtendConfig(), wanted=listed("，"))


def test_too_few_and_too_many_pieces_name_the_number():
    with pytest.raises(ConfigError, match=r"add_pieces=1 is less than the 3 that the given pieces"):
        extend(files_of("bpe"), ExtendConfig(add_pieces=1), texts=CHINESE, wanted=listed("机器"))
    with pytest.raises(ConfigError, match=r"add_pieces is \d+ more than this text can fill"):
        extend(files_of("bpe"), ExtendConfig(add_pieces=90_000), texts=CHINESE)
    with pytest.raises(ConfigError, match="nothing to add"):
        extend(files_of("bpe"), ExtendConfig())


@pytest.mark.parametrize("texts", [[], [""], ["only English here"]])
def test_text_without_the_script_is_one_line(texts):
    with pytest.raises(DataError, match="no line holds a character of the script 'han'"):
        extend(files_of("byte-level"), ExtendConfig(add_pieces=5), texts=texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "WordPiece"}, "its model is WordPiece"),
        ({"end_of_word_suffix": "</w>"}, "its BPE uses end_of_word_suffix"),
        ({"vocab": {"a": 0}}, "its vocabulary lacks some of the 256 bytes"),
    ],
)
def test_a_base_that_cannot_be_extended_says_why(change, message):
    description = json.loads(byte_level_base()["tokenizer.json"])
    description["model"] |= change
    files = {"tokenizer.json": json.dumps(description).encode()}
    with pytest.raises(DataError, match=f"the base: cannot be extended: {message}"):
        extend(files, ExtendConfig(add_pieces=5), texts=CHINESE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"script": "hann"}, "did you mean 'han'"),
        ({"add_pieces": -1}, "add_pieces=-1 must be"),
        ({"max_piece_characters": 0}, "max_piece_characters=0 must be"),
        ({"min_saved": 0}, "min_saved=0 must be"),
        ({"max_bytes": 0}, "max_bytes=0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        ExtendConfig(**setting)


@pytest.mark.parametrize("name", ["byte-level", "bpe", "unigram"])
def test_a_script_with_spaces_gets_words_with_the_space_in_front(name):
    text = "большой дом стоял на берегу реки и большой сад рос у дома " * 20
    extension = extend(files_of(name), ExtendConfig(add_pieces=40, script="cyrillic"), texts=[text])
    new = extension.tokenizer
    assert any(piece.piece.startswith(b" ") for piece in extension.added)
    assert lost_of(extension) == set()
    assert new.decode(new.encode(text)) == text
    assert new.encode(ENGLISH[0]) == open_files(files_of(name)).encode(ENGLISH[0])
