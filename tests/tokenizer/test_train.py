"""Training: nothing skipped, nothing random, mistakes told in one line."""

import pytest

from llm_jax import tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer.train import MAX_LINE_CHARS, TokenizerTrainConfig, sample, split_lines
from tests.tokenizer.conftest import TEXTS, small


def test_ids_are_laid_out_as_documented(trained):
    assert [trained.id_of(piece) for piece in ("<unk>", "<s>", "</s>", "<pad>")] == [0, 1, 2, 3]
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (1, 2, 3)
    assert trained.id_of("<|im_start|>") == 4
    assert trained.id_of("<|im_end|>") == 5
    assert trained.id_of("\n") == 6
    assert trained.id_of("no such piece") == -1
    assert trained.vocab_size == 400
    assert trained.encode("\n\n") == [6, 6]


def test_the_same_text_gives_the_same_tokenizer(trained):
    kind = trained.kind.split()[-1]
    assert tokenizer.train(small(kind=kind), iter(TEXTS)).fingerprint == trained.fingerprint


def test_bpe_does_not_depend_on_the_number_of_threads(bpe):
    assert tokenizer.train(small(threads=7), TEXTS).fingerprint == bpe.fingerprint


def test_other_settings_give_another_fingerprint(bpe):
    others = [
        tokenizer.train(small(vocab_size=401), TEXTS),
        tokenizer.train(small(special_tokens=("<|user|>", "<|im_end|>")), TEXTS),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_word_late_in_a_single_long_line_is_learned():
    line = "the cat sat on the mat and " * 40_000 + "zyzzyva " * 500  # 1.08 MB, the word at the end
    learned = tokenizer.train(small(vocab_size=319), [line])
    assert learned.id_of("▁zyzzyva") > 0


def test_a_late_word_in_a_long_chinese_line_is_learned():
    line = "我们去公园散步" * 3000 + "饕餮" * 300  # 65 kB without one space
    learned = tokenizer.train(small(vocab_size=290), [line])
    assert learned.id_of("饕餮") > 0


def test_lines_with_the_trainers_reserved_character_are_not_skipped():
    learned = tokenizer.train(small(vocab_size=303), ["quixotic \u2585 bar\u2581chart\n"] * 50)
    assert learned.id_of("▁bar") > 0
    assert len(learned.encode("quixotic")) == 1
    assert learned.id_of("bar▁chart") == -1


def test_indentation_is_one_piece():
    learned = tokenizer.train(small(vocab_size=294), ["if x:\n        return y\n"] * 50)
    assert len(learned.encode("        return")) <= 2


def test_digits_stand_alone(trained):
    assert len(trained.encode("12345")) == 5


def test_long_lines_are_cut_before_spaces_and_lose_nothing():
    text = "word " * 1000 + "汉" * 2500
    lines = list(split_lines(text))
    assert "".join(lines) == text
    assert max(map(len, lines)) <= MAX_LINE_CHARS
    assert lines[1].startswith(" word")
    assert list(split_lines("a\n\nb\u2028c")) == ["a", "b\u2028c"]


def test_the_sample_is_even_ordered_and_seeded():
    lines = [f"{number:04}" for number in range(5000)]
    kept = sample(lines, 4000, seed=1)
    assert len(kept) == 1000
    assert kept == sorted(kept) == sample(iter(lines), 4000, seed=1)
    assert kept != sample(lines, 4000, seed=2)
    # 200 expected in each fifth, standard deviation 11.3; the seed is fixed
    fifths = [sum(int(line) // 1000 == part for line in kept) for part in range(5)]
    assert all(150 < count < 250 for count in fifths)
    assert sample(lines, 20_000, seed=1) == lines


def test_more_text_than_max_bytes_trains_on_the_sample():
    settings = small(vocab_size=420, max_bytes=1500, seed=3)
    lines = [line for text in TEXTS for line in split_lines(text)]
    kept = sample(lines, 1500, seed=3)
    assert 0 < len(kept) < len(lines)
    learned = tokenizer.train(settings, TEXTS)
    assert learned.fingerprint == tokenizer.train(small(vocab_size=420), kept).fingerprint
    assert learned.fingerprint != tokenizer.train(small(vocab_size=420), TEXTS).fingerprint


def test_without_byte_fallback_rare_text_is_unknown_and_reads_as_such():
    learned = tokenizer.train(small(vocab_size=160, byte_fallback=False), TEXTS)
    assert 0 in learned.encode("龘")
    assert learned.decode(learned.encode("龘")) == "\ufffd"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_little_text_names_the_largest_size_and_that_size_works(kind):
    with pytest.raises(
        ConfigError, match=r"vocab_size=5000 .* the largest possible is \d+: "
    ) as caught:
        tokenizer.train(small(kind=kind, vocab_size=5000), ["hello world, hello words"])
    largest = int(str(caught.value).split("possible is ")[1].split(":")[0])
    settings = small(kind=kind, vocab_size=largest)
    assert tokenizer.train(settings, ["hello world, hello words"]).vocab_size == largest


def test_too_small_a_vocabulary_names_the_size_it_needs():
    with pytest.raises(
        ConfigError, match=r"vocab_size=263 is too small .* more than \d+: "
    ) as caught:
        tokenizer.train(small(vocab_size=263), TEXTS)
    needed = int(str(caught.value).split("more than ")[1].split(":")[0])
    assert tokenizer.train(small(vocab_size=needed + 1), TEXTS).vocab_size == needed + 1


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", " \t"]])
def test_no_text_is_a_data_error(texts):
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        tokenizer.train(small(), texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 3}, "vocab_size=3 must be"),
        ({"character_coverage": 0.5}, "character_coverage=0.5 must be"),
        ({"threads": 0}, "threads=0 must be"),
        ({"max_bytes": 0}, "max_bytes=0 must be"),
        ({"special_tokens": ("<s>",)}, "special_tokens: '<s>' must be"),
        ({"special_tokens": ("§",)}, "special_tokens: '§' must be"),
        ({"special_tokens": ("<a b>",)}, "special_tokens: '<a b>' must be"),
        ({"special_tokens": ("<a>", "<a>")}, "special_tokens: '<a>' must be"),
        ({"special_tokens": ("<0x0A>",)}, "special_tokens: '<0x0A>' must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerTrainConfig(**settings)
