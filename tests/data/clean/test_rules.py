"""Each rule on planted cases, and all of them on labelled junk, labelled clean text and a real corpus."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.clean.markup import BoilerplateConfig, MarkupConfig, boilerplate, markup
from llm_jax.data.clean.mojibake import repair
from llm_jax.data.clean.normalise import NormaliseConfig, normalise
from llm_jax.data.clean.page import Page, Rejection
from llm_jax.data.clean.personal import PersonalConfig, is_bank_card, is_resident_id, personal
from llm_jax.data.clean.quality import QualityConfig, quality
from llm_jax.data.clean.rules import RULES, CleanConfig, cleaner
from llm_jax.errors import ConfigError

JUNK = Path(__file__).parent.parent / "junk"
CORPUS = Path(__file__).parents[3].parent / "shared" / "corpus"
PROSE = "今天天气很好，我们去公园散步吧！湖面上有几条小船，岸边的人很多。"
CLEAN = [
    PROSE,
    "He said: “it’s ½ done” — and left… (see §3, ①②, ㎡ ℃).",
    "第一章 总则\n\n第一条 为了规范管理，制定本办法。",
    "    indented code stays\n\tand tabs too",
    "姓名 年龄 性别\n张三 二十 男",
    "use List<int> & #include <vector>; a < b && c > d",
    "می‌خواهم",
]


def labelled(name: str) -> list[dict]:
    # not splitlines: broken encodings hold U+0085
    lines = (JUNK / name).read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def clean():
    return cleaner(CleanConfig())


@pytest.mark.parametrize("language", ["zh", "en"])
def test_at_least_95_percent_of_labelled_junk_is_rejected(clean, language):
    pieces = labelled(f"{language}.jsonl")
    kept = [p["label"] for p in pieces if not clean(p["text"]).rejected_by]
    assert len(pieces) >= 50
    assert len(kept) <= 0.05 * len(pieces), Counter(kept)


def test_labelled_clean_text_is_kept_in_both_languages(clean):
    pieces = labelled("clean.jsonl")
    rejected = {p["label"]: o.rejection for p in pieces if (o := clean(p["text"])).rejected_by}
    assert len(pieces) >= 24
    assert rejected == {}


# The second by somebody who had not read the rules, third and fourth after reading them; the share right at first sight, before anything
# was mended: second zh 28 of 31 and en 26 of 31, third 13 of 16, fourth 9 of 12, fifth 27 of 34 pieces of junk;
# second 60 of 60, third 6 of 8, fourth 7 of 8, fifth 12 of 12 clean documents. What was mended are kinds, not
# pieces, but each set has been seen since.
@pytest.mark.parametrize(
    ("name", "least"),
    [("second_junk_zh", 30), ("second_junk_en", 30), ("third", 16), ("fourth", 10), ("fifth", 33)],
)
def test_junk_of_kinds_that_the_rules_were_not_written_for_is_rejected(clean, name, least):
    pieces = [p for p in labelled(f"{name}.jsonl") if not p["label"].startswith("clean")]
    assert sum(bool(clean(p["text"]).rejected_by) for p in pieces) >= least


@pytest.mark.parametrize("name", ["second_clean_zh", "second_clean_en", "third", "fourth", "fifth"])
def test_clean_text_that_speaks_of_what_junk_speaks_of_is_kept(clean, name):
    pieces = [p for p in labelled(f"{name}.jsonl") if not p["label"].startswith("junk")]
    rejected = {p["label"]: o.rejection for p in pieces if (o := clean(p["text"])).rejected_by}
    assert len(pieces) >= 8
    assert rejected == {}


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/corpus")
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("zh-d2l", 0.95),  # a textbook: prose
        ("zh-python-docs", 0.95),
        ("zh-oi-wiki", 0.75),
        ("zh-tidb-docs", 0.75),
        ("zh-paddle-docs", 0.75),
        ("en-python-docs", 0.75),
        ("en-postgresql-docs", 0.75),
    ],
)
def test_clean_documents_of_the_corpus_are_kept(clean, name, least):
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][::4]
    kept = sum(not clean(text).rejected_by for text in texts)
    assert kept >= least * len(texts)


@pytest.mark.parametrize("text", CLEAN)
def test_clean_text_passes_the_normaliser_bitwise(text):
    assert normalise(Page(text), NormaliseConfig()) is None
    assert repair(Page(text)) is None
    assert markup(Page(text), MarkupConfig()) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ＡＢＣ１２３，（你好）！", "ABC123，（你好）！"),
        ("a\u200bb\u00adc\ufeff\x00", "abc"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("cafe\u0301", "café"),
        ("今 天 天 气 很 好", "今天天气很好"),
        ("这 是，一句 话。 对吗？", "这是，一句话。对吗？"),
        ("使用 Python 编程，很 好", "使用 Python 编程，很好"),
        ("end  \n\n\n\nnext\u3000\n", "end\n\nnext"),
    ],
)
def test_what_looks_the_same_is_spelled_the_same(before, after):
    assert normalise(Page(before), NormaliseConfig()) == after


@given(
    st.text(alphabet=st.sampled_from("aＡ１ 今天，。\u200b\r\n\t\u3000\u00a0e\u0301\x00|\u2028！é"))
)
def test_normalising_twice_is_normalising_once(text):
    for config in (NormaliseConfig(), NormaliseConfig(han_spaces="all")):
        once = normalise(Page(text), config)
        assert normalise(Page(text if once is None else once), config) is None


def test_with_everything_off_the_normaliser_changes_nothing():
    off = NormaliseConfig(
        **dict.fromkeys(("nfc", "line_ends", "control", "width", "blank_space"), False),
        han_spaces="keep",
    )
    assert normalise(Page("Ａ \x00今 天\r\n e\u0301  \n\n\n\n"), off) is None


@pytest.mark.parametrize(
    ("written", "codec"), [("你好", "gbk"), ("天气很好，café", "latin-1"), ("don’t", "cp1252")]
)
def test_utf8_that_was_misread_is_read_again(written, codec):
    misread = written.encode().decode(codec)
    assert repair(Page(misread)) == written


def test_one_misread_line_is_repaired_and_the_others_are_left():
    misread = "好文章".encode() + b" "
    assert repair(Page(f"{PROSE}\n{'你好世界'.encode().decode('gbk')}")) == f"{PROSE}\n你好世界"
    assert repair(Page(misread.decode())) is None


def test_a_lost_byte_is_not_guessed_at():
    lossy = PROSE.encode().decode("gbk", "replace")
    assert "\ufffd" in lossy
    assert repair(Page(lossy)) is None


def test_rare_characters_alone_are_no_mojibake():
    assert repair(Page("犇骉麤鱻羴，淼焱垚鑫森")) is None


def test_html_becomes_text_and_code_stays_code():
    text = "<p>你好&amp;<b>世界</b></p><script>var x = '<p>';</script>`<p>&lt;`\n```\n<div>\n```\n<!-- c -->"
    assert markup(Page(text), MarkupConfig()) == "\n你好&世界\n`<p>&lt;`\n```\n<div>\n```\n"


def test_front_matter_goes_and_a_rule_between_paragraphs_stays():
    assert markup(Page("---\ntitle: x\ntags:\n  - y\n---\n\n# T"), MarkupConfig()) == "# T"
    assert markup(Page("---\nplain words\n---\nmore"), MarkupConfig()) is None


def test_templates_without_text_and_cut_off_lines_are_rejected_and_what_speaks_of_them_is_kept(
    clean,
):
    filler = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt. "
    article = (
        "Printers fill a page with lorem ipsum to show the type before there is a text. The words are "
        "from a treatise of Cicero's, which somebody took apart in the sixteenth century, as far as "
        "anyone knows. They mean nothing, and that is the point: a reader who understands what stands "
        "on a page looks at the sense of it and not at the letters. Designers have tried other texts, "
        "but the old one is still what clients expect to see, and it comes with every program."
    )
    cut = """旧房翻新的第一步是量房，然后才是设计和预算……
很多人在装修之前都会问，水电到底要不要全部重新做……
有经验的师傅会先看墙里的管线，再决定从哪里开槽……
防水层至少要做到一米八，淋浴的那面墙最好到顶……
油漆干透以前不要关窗，否则味道几个月都散不掉……"""
    assert clean(filler * 3).rejection == Rejection("template without text", "lorem ipsum")
    assert not clean(article).rejected_by
    assert clean(cut).rejection == Rejection("lines cut off", "1.000 > 0.3")
    assert not clean(cut.replace("……", "。", 4)).rejected_by


def test_frame_lines_go_and_a_page_of_frames_is_rejected():
    body = [f"这是正文的第{i}句话，说的是别的事情。" for i in range(9)]
    text = "\n".join(["首页 > 新闻 > 正文", *body, "上一篇：某事", "版权所有 某某网"])
    assert boilerplate(Page(text), BoilerplateConfig()) == "\n".join(body)
    rejected = boilerplate(Page("上一篇：某事\n下一篇：他事\n一句话。"), BoilerplateConfig())
    assert rejected == Rejection("boilerplate", "2 of 3 lines > 0.3")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("写信给 zhang.san+x@mail.sina.com.cn 即可", "写信给 [email] 即可"),
        ("see user@example.com and @decorator", None),
        ("from 8.8.8.8 to 192.168.1.1, v1.2.3.4.5", "from [ip] to 192.168.1.1, v1.2.3.4.5"),
        ("电话13812345678，或 +86 138-1234-5678。", "电话[phone]，或 [phone]。"),
        ("号码 23812345678 和 138123456789", None),
        ("身份证11010519491231002X。", "身份证[id]。"),
        ("身份证110105194912310021。", None),
        ("卡号 4111 1111 1111 1111。", "卡号 [card]。"),
        ("卡号 4111 1111 1111 1112。", None),
        ("π = 3.14159265358979323846", None),
    ],
)
def test_personal_data_goes_when_its_check_digits_hold(before, after):
    assert personal(Page(before), PersonalConfig()) == after


def test_check_digits_are_those_of_the_standards():
    assert is_resident_id("11010519491231002X")  # the example of GB 11643-1999
    assert not is_resident_id("110105194912310020")
    assert is_bank_card("6222021234567890128") == (_luhn("6222021234567890128") == 0)


def _luhn(digits: str) -> int:
    """The definition, digit by digit from the right."""
    total = 0
    for place, character in enumerate(reversed(digits)):
        value = int(character) * (2 if place % 2 else 1)
        total += value // 10 + value % 10
    return total % 10


def test_terms_get_one_spelling_and_latin_ones_match_whole_words(tmp_path):
    table = tmp_path / "terms.txt"
    table.write_text("# 注释\n登陆\t登录\njavascript -> JavaScript\n登陆系统\t登录系统\n", "utf-8")
    config = CleanConfig(rules=("terms",), terms=str(table))
    outcome = cleaner(config)("登陆系统用 javascript，不是 javascripts。")
    assert outcome.text == "登录系统用 JavaScript，不是 javascripts。"
    assert cleaner(config)(outcome.text).changed == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one word\n", r"terms.txt:1: 'one word' must be WRONG<TAB>RIGHT"),
        ("a\tb\na\tc\n", r"terms.txt:2: 'a' already becomes 'b'; keep one"),
        ("甲\t乙\n乙\t丙\n", "'甲' becomes '乙', which holds the term '乙'"),
        ("乙\t乙丙\n", "'乙' becomes '乙丙', which holds the term '乙'"),
        ("# nothing\n", "is empty; fill it"),
    ],
)
def test_a_term_table_that_cannot_end_is_told(tmp_path, content, message):
    table = tmp_path / "terms.txt"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        cleaner(CleanConfig(rules=("terms",), terms=str(table)))


def test_a_blocked_phrase_rejects_and_says_which(tmp_path):
    blocked = tmp_path / "blocked.txt"
    blocked.write_text("Forbidden Word\n/第\\d+号机密/\n", encoding="utf-8")
    clean = cleaner(CleanConfig(rules=("block_list",), block_list=str(blocked)))
    assert clean("a FORBIDDEN word here").rejection == Rejection(
        "block list", "holds 'forbidden word'"
    )
    assert clean("第12号机密文件").rejected_by == "block_list"
    assert clean("forbidden words are fine").rejected_by == ""


def test_traditional_becomes_simplified_by_word():
    clean = cleaner(CleanConfig(rules=("simplify",)))
    assert clean("皇后在後面梳頭髮，乾燥的乾坤").text == "皇后在后面梳头发，干燥的乾坤"


def test_rules_run_in_the_order_of_the_config():
    text = "ＡＢＣ＠mail.com写信给ａ@mail.com"
    first = cleaner(CleanConfig(rules=("normalise", "personal")))(text)
    second = cleaner(CleanConfig(rules=("personal", "normalise")))(text)
    assert first.text.endswith("写信给[email]")
    assert second.text.endswith("写信给a@mail.com")


def test_another_language_is_rejected_unless_kept():
    text = "Это предложение написано по-русски, и в нём достаточно букв для суждения о языке."
    assert quality(Page(text), QualityConfig()) == Rejection(
        "language", "ru; there are thresholds for zh, en"
    )
    assert quality(Page(text), QualityConfig(keep_other_languages=True)) is None
    assert quality(Page("123 456 !!!"), QualityConfig(keep_other_languages=True)) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": ("qualty",)}, "did you mean 'quality'"),
        ({"rules": ()}, "rules is empty"),
        ({"rules": ("quality", "quality")}, "twice"),
        ({"rules": ("terms",)}, "go together"),
        ({"terms": "x.txt"}, "go together"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CleanConfig(**settings)


def test_every_rule_has_a_pure_result(clean):
    text = labelled("clean.jsonl")[0]["text"]
    assert clean(text) == clean(text)
    assert set(CleanConfig().rules) <= set(RULES)
