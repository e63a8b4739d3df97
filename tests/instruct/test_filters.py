"""What is read from an answer, and which instructions and instances are kept: each reason by a case."""

import pytest

from llm_jax.instruct.self_instruct import FilterConfig, parse
from llm_jax.instruct.self_instruct.diversity import describe, leading_verb, topics, verb_and_object
from llm_jax.instruct.self_instruct.filters import (
    INSTANCE_REASONS,
    INSTRUCTION_REASONS,
    judge_drafts,
    judge_instruction,
)
from llm_jax.instruct.self_instruct.parse import Draft
from llm_jax.instruct.self_instruct.tasks import Instance, Task

SETTINGS = FilterConfig()

# ---- reading -------------------------------------------------------------------------------------

LISTS = {
    "a continued list": (" Sing a song.\n10. Tell a joke\n11. Count.", ["Sing a song.", "Tell a joke", "Count."]),
    "a list of its own": ("9. Sing a song.\n\n10. Tell a joke", ["Sing a song.", "Tell a joke"]),
    "Task 9:": ("Task 9: Sing a song.\nTask 10: Tell a joke", ["Sing a song.", "Tell a joke"]),
    "bold numbers": ("**9.** Sing a song.\n**10.** Tell", ["Sing a song.", "Tell"]),
    "bullets": ("- Sing a song.\n- Tell a joke", ["Sing a song.", "Tell a joke"]),
    "Chinese numbering": ("写诗\n10、讲笑话\n11．唱歌\n任务12：数数", ["写诗", "讲笑话", "唱歌", "数数"]),
    "several lines an item": ("Sing\n  a song.\n10. Tell", ["Sing a song.", "Tell"]),
    "numbers that are no markers": ("Round 3.5 and\n3.5 again\n10. Tell", ["Round 3.5 and 3.5 again", "Tell"]),
    "rubbish": ("}{]\x00 \n\n .", ["}{]\x00 ."]),
    "nothing": ("", []),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_instructions_are_read_from(case):
    text, expected = LISTS[case]
    assert parse.instructions(text, "stop").found == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" Yes.", True), ("no", False), ("**No**, because", False), ("是", True), ("：否。", False),
     ("不是", False), ("是否分类", None), ("Nothing", None), ("maybe", None), ("", None), ("yesterday", None)],
)  # fmt: skip
def test_a_class_is_read_from(text, kind):
    assert parse.is_classification(text) is kind


INPUT_FIRST = {
    "one, without input": (" none\nOutput: a poem\nof two lines", [("none", "a poem\nof two lines")]),
    "two": (" 1\nOutput: 2\n\nExample 2\nInput: 3\nOutput: 4", [("1", "2"), ("3", "4")]),
    "markers of its own": ("**Input:** 1\n**Output:** 2", [("1", "2")]),
    "an example's number again": ("Example 1\nInput: 1\nOutput: 2", [("1", "2")]),
    "the next task": (" 1\nOutput: 2\nTask: more\nInput: 5\nOutput: 6", [("1", "2")]),
    "no output": (" 1\n", [("1", None)]),
    "outputs alone": ("Output: 2\nOutput: 3", [("", "2"), ("", "3")]),
    "markers of both languages": (" 1\n输出： 2\n示例 2\n输入：3\nOUTPUT: 4", [("1", "2"), ("3", "4")]),
    "nothing": ("  \n", []),
}  # fmt: skip


@pytest.mark.parametrize("case", INPUT_FIRST)
def test_instances_are_read_from(case):
    text, expected = INPUT_FIRST[case]
    assert parse.drafts(text, False, "stop").found == [Draft(*pair) for pair in expected]


def test_labels_come_before_their_inputs_in_classification_in_both_languages():
    text = " 好评\n输入：很甜\n标签：差评\n输入: 太酸，\n不买了\n标签：中评"
    found = parse.drafts(text, True, "stop").found
    assert found == [Draft("很甜", "好评"), Draft("太酸，\n不买了", "差评"), Draft(None, "中评")]
    english = parse.drafts(" good\nInput: sweet\nLabel: bad\nInput: sour", True, "stop").found
    assert english == [Draft("sweet", "good"), Draft("sour", "bad")]


# ---- instructions --------------------------------------------------------------------------------

JUDGED = [
    ("en", "Write a short poem about the sea.", ""),
    ("en", "Translate the word 'bread' into French", ""),
    ("en", "Summarise recent space news", ""),  # no common word, but a verb that begins tasks
    ("en", "\"Time flies\": what does it mean?", ""),
    ("en", "!Write a short poem about it.", "starts with punctuation"),
    ("en", "- write a poem about it", "starts with punctuation"),
    ("en", "Écrivez un poème sur une nuit à Paris", "another language"),
    ("en", "Schreibe ein Gedicht ueber den Winter", "another language"),
    ("en", "Escribe un cuento corto sobre un perro", "another language"),
    ("en", "写一首关于春天的诗歌。", "another language"),
    ("en", "Напиши стихотворение о море", "another language"),
    ("en", "Write a poem", "too short"),
    ("en", "Write the word again" + " and again" * 80, "too long"),
    ("en", "Describe the picture of a horse.", "asks for more than text"),
    ("en", "Write a program that sorts the numbers.", "asks for more than text"),
    ("en", "Describe how a cartographer works.", ""),  # holds "graph", but not as a word
    ("zh", "写一首关于春天的诗", ""),
    ("zh", "“春天”是什么意思？", ""),
    ("zh", "用 Python 写一个排序函数", ""),
    ("zh", "。写一首关于春天的诗", "starts with punctuation"),
    ("zh", "Write a short poem about the sea.", "another language"),
    ("zh", "海についての短い詩を書いてください", "another language"),
    ("zh", "写诗", "too short"),
    ("zh", "写" + "很长的诗" * 80, "too long"),
    ("zh", "描述这张图片里的内容", "asks for more than text"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "text", "reason"), JUDGED)
def test_an_instruction_is_judged(language, text, reason):
    assert judge_instruction(text, language, SETTINGS) == reason
    assert not reason or reason in INSTRUCTION_REASONS


def test_keywords_can_be_added_in_either_language():
    settings = FilterConfig(keywords=("horse", "马"))
    assert judge_instruction("Tell the story of a Horse.", "en", settings)
    assert judge_instruction("讲一个关于马的故事", "zh", settings)
    assert not judge_instruction("Tell the story of a seahorse.", "en", settings)


# ---- instances -----------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
DRAFTS = {
    "no input": ([(None, "a")], 0),
    "no output": ([("1", None), ("2", " ")], 0),
    "ends in a colon": ([("The list:", "a"), ("1", "here it is：")], 0),
    "output is the input": ([("same words", "same  words")], 0),
    "output repeats the instruction": ([("1", "You asked: Count the WORDS! There are two.")], 0),
    "duplicate": ([("1", "a"), ("1", "A.")], 1),
    "conflicting outputs": ([("1", "a"), ("1", "b"), ("2", "c")], 1),
    "near-duplicate": ([(LONG, "a"), (LONG + " fifteen", "a")], 1),
    "more than wanted": ([(f"{n} " * n, "a") for n in range(1, 8)], 5),
    "cut off": ([("1", "a"), ("2", "unfin")], 1),
}


@pytest.mark.parametrize("reason", DRAFTS)
def test_an_instance_is_left_out_because(reason):
    drafts, kept = DRAFTS[reason]
    good, rejected = judge_drafts(
        [Draft(*pair) for pair in drafts], reason == "cut off", "Count the words.", "en", SETTINGS, False
    )  # fmt: skip
    assert {why for _, why in rejected} == {reason}
    assert len(good) == kept == len(drafts) - len(rejected)
    assert reason in INSTANCE_REASONS


def test_every_reason_has_a_case():
    told = {reason for _, _, reason in JUDGED if reason}
    assert told == set(INSTRUCTION_REASONS) - {"cut off", "too similar"}  # these need a run
    assert set(DRAFTS) == set(INSTANCE_REASONS)


def test_a_repaired_punctuation_is_an_answer_and_a_task_may_have_no_input():
    drafts = [Draft("its late", "It's late.")]
    good, _ = judge_drafts(drafts, False, "Add the punctuation.", "en", SETTINGS, False)
    assert good == [Instance("its late", "It's late.")]
    nothing, _ = judge_drafts([Draft("（无）", "诗")], False, "写首诗吧", "zh", SETTINGS, False)
    assert nothing == [Instance("", "诗")]
    label, why = judge_drafts([Draft("无", "好评")], False, "判断好坏", "zh", SETTINGS, True)
    assert (label, [reason for _, reason in why]) == ([], ["no input"])


# ---- the report's tables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verb", "noun"),
    [
        ("Write a short poem about the old sea.", "write", "poem"),
        ("Given a list of numbers, sort them.", "sort", ""),
        ("What is the capital of France?", "what", "capital"),
        ("Please translate this sentence into Chinese.", "translate", "sentence"),
        ("Describe the state-of-the-art method, and why", "describe", "method"),
        ("Hello there", "", ""),
    ],
)
def test_an_english_task_has_a_verb_and_an_object(text, verb, noun):
    assert verb_and_object(text) == (verb, noun)


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("请写一首诗", "写"),
        ("把下面的句子翻译成英文", "翻译"),
        ("“春”怎么读", ""),
        ("列举三种水果", "列举"),
    ],
)
def test_a_chinese_task_has_a_verb(text, verb):
    assert leading_verb(text) == verb


def test_topics_are_pairs_of_characters_that_several_tasks_share():
    assert topics(["写春天的诗", "介绍春天", "列举水果"]) == [("春天", 2)]


def test_the_figures_of_a_few_tasks_are_these():
    tasks = [
        Task(id=str(n), language="en", instruction=text, is_classification=n == 0,
             instances=(Instance("", "five words are in here"), Instance("two words", "one")))
        for n, text in enumerate(["Write a poem about rivers.", "Write a letter to a friend now please."])
    ]  # fmt: skip
    told = describe(tasks, [0.25, 0.5])
    assert (told["tasks"], told["classification"], told["instances"]) == (2, 1, 4)
    assert told["instances_without_input"] == 2
    assert told["instruction_lengths"] == {"0-4": 0, "5-9": 2}
    assert told["similarity"] == {
        **{f"{n}-{n + 4}": 0 for n in range(0, 25, 5)}, "25-29": 1,
        **{f"{n}-{n + 4}": 0 for n in range(30, 50, 5)}, "50-54": 1,
    }  # fmt: skip
    assert told["mean_similarity"] == 0.375
    assert told["verbs"] == {"write": {"tasks": 2, "objects": {"poem": 1, "letter": 1}}}
