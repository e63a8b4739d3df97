"""Why an instruction or an instance is not kept: each function gives the first reason, or "" for a good one."""

import re
import unicodedata
from functools import cache

from llm_jax.data.language import identify
from llm_jax.instruct.self_instruct.novelty import rouge_l, tokens
from llm_jax.instruct.self_instruct.parse import Draft, to_instance
from llm_jax.instruct.self_instruct.settings import FilterConfig
from llm_jax.instruct.self_instruct.tasks import Instance
from llm_jax.instruct.self_instruct.word_lists import (
    CHINESE_KEYWORDS,
    ENGLISH_EVIDENCE,
    ENGLISH_KEYWORDS,
    ENGLISH_VERBS,
)

# quotes and brackets may begin a good instruction, as in “春天”是什么意思
OPENING = "\"'“‘《「『(（["
INSTRUCTION_REASONS = (
    "cut off", "starts with punctuation", "another language", "too short", "too long", "asks for more than text",
    "too similar",
)  # fmt: skip
INSTANCE_REASONS = (
    "cut off", "no input", "no output", "ends in a colon", "output is the input", "output repeats the instruction",
    "duplicate", "conflicting outputs", "near-duplicate", "more than wanted",
)  # fmt: skip


def judge_instruction(text: str, language: str, config: FilterConfig) -> str:
    """The reason to reject an instruction, novelty apart."""
    if text[:1] not in OPENING and unicodedata.category(text[0])[0] in "PSC":
        return "starts with punctuation"
    if not is_in(text, language):
        return "another language"  # before the length, which is counted in its own units
    size = size_of(text, language)
    least, most = (
        (config.min_words, config.max_words)
        if language == "en"
        else (config.min_characters, config.max_characters)
    )
    if not least <= size <= most:
        return "too short" if size < least else "too long"
    if keywords(config.keywords, language).search(text):
        return "asks for more than text"
    return ""


def size_of(text: str, language: str) -> int:
    """Words of an English text, characters that are not blank of a Chinese one."""
    return len(text.split()) if language == "en" else len("".join(text.split()))


def is_in(text: str, language: str) -> bool:
    """Whether an instruction is in the language asked for.

    Scripts tell Chinese. A few Latin words could be many languages: English ones hold a verb that begins
    English tasks, or a word that few other languages have.
    """
    found = identify(text).language
    if language == "zh":
        return found == "zh"
    words = set(re.findall("[a-z]+", text.lower()))
    return found in ("en", "latin") and not words.isdisjoint(ENGLISH_VERBS | ENGLISH_EVIDENCE)


@cache
def keywords(more: tuple[str, ...], language: str) -> re.Pattern[str]:
    """Matches an instruction that holds a keyword: a whole word of Latin letters, any place in Chinese."""
    known = ENGLISH_KEYWORDS if language == "en" else CHINESE_KEYWORDS
    parts = [
        rf"(?<![a-z]){re.escape(word.lower())}(?![a-z])" if word.isascii() else re.escape(word)
        for word in (*known, *more)
    ]
    return re.compile("|".join(parts), re.IGNORECASE)


def judge_drafts(
    drafts: list[Draft],
    cut_off: bool,
    instruction: str,
    language: str,
    config: FilterConfig,
    is_classification: bool,
) -> tuple[list[Instance], list[tuple[Draft, str]]]:
    """The instances of a task worth keeping, and the others with their reasons."""
    rejected: list[tuple[Draft, str]] = []
    good: list[tuple[Draft, Instance]] = []
    for number, draft in enumerate(drafts):
        last = cut_off and number == len(drafts) - 1
        reason = "cut off" if last else _judge_draft(draft, instruction, is_classification)
        if reason:
            rejected.append((draft, reason))
        else:
            good.append((draft, to_instance(draft)))
    outputs: dict[str, set[str]] = {}
    for _, instance in good:
        outputs.setdefault(_plain(instance.input), set()).add(_plain(instance.output))
    kept: list[Instance] = []
    for draft, instance in good:
        reason = ""
        if len(outputs[_plain(instance.input)]) > 1:
            reason = "conflicting outputs"  # which one is right cannot be told
        else:
            reason = _judge_against(instance, kept, language, config)
        if reason:
            rejected.append((draft, reason))
        else:
            kept.append(instance)
    return kept, rejected


def _judge_draft(draft: Draft, instruction: str, is_classification: bool) -> str:
    """The reason to reject one instance by itself."""
    instance = to_instance(draft)
    if draft.input is None or (is_classification and not instance.input):
        return "no input"
    if not instance.output:
        return "no output"
    if instance.input.endswith((":", "：")) or instance.output.endswith((":", "：")):
        return "ends in a colon"  # what should follow is missing
    if instance.input.split() == instance.output.split():
        return "output is the input"
    if _plain(instruction) in _plain(instance.output):
        return "output repeats the instruction"
    return ""


def _judge_against(
    instance: Instance, kept: list[Instance], language: str, config: FilterConfig
) -> str:
    """The reason to reject an instance because of those kept before."""
    for other in kept:
        if _plain(other.input) == _plain(instance.input):
            return "duplicate"  # same output too, or both would be in conflict
    for other in kept:
        texts = ("\n".join(instance), "\n".join(other))
        if rouge_l(*texts, language) > config.max_instance_similarity:
            return "near-duplicate"
    return "more than wanted" if len(kept) >= config.max_instances else ""


def _plain(text: str) -> str:
    """A text without what two copies may differ by: case, width, blanks, punctuation."""
    return " ".join(tokens(text, "zh")) or text.strip()
