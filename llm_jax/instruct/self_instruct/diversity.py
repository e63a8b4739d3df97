"""How varied the tasks are: what they ask to do with what, how long they are, how new they were.

Word lists instead of a parser, so a few are read wrongly. English: the verb is the first word that begins
tasks (most are imperatives), and its object the head of the noun phrase after it, which ends before a
preposition, a conjunction or a mark. Chinese: the verb is the one that the task begins with, politeness
skipped, or else the first within it (as after 把 ...), and the topics are pairs of Han characters.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llm_jax.instruct.self_instruct.filters import size_of
from llm_jax.instruct.self_instruct.tasks import Task
from llm_jax.instruct.self_instruct.word_lists import (
    CHINESE_OPENINGS,
    CHINESE_VERBS,
    DETERMINERS,
    ENGLISH_QUESTIONS,
    ENGLISH_VERBS,
    PHRASE_ENDS,
)

TOP_VERBS, OBJECTS_OF_A_VERB, TOP_TOPICS = 20, 4, 30
HAN = "\u4e00-\u9fff"
# bigrams of these say how a task is put, not what it is about
NO_TOPIC = frozenset(
    "的了是在和与或一个这那下面以请把将给为从对成用写出列中里有不并及其要能会你我他它们么什哪几些"
)
VERBS_LONGEST_FIRST = sorted(CHINESE_VERBS, key=len, reverse=True)


def verb_and_object(instruction: str) -> tuple[str, str]:
    """Verb and object of an English instruction; a question word is a verb, "" stands for none."""
    words = re.findall(r"[a-z]+(?:['-][a-z]+)*|[.,;:?!()\"“”]", instruction.lower())
    verb = next(
        (
            n
            for n, word in enumerate(words)
            # "a list" is no verb
            if word in ENGLISH_VERBS and not (n and words[n - 1] in DETERMINERS)
        ),
        None,
    )
    if words and words[0] in ENGLISH_QUESTIONS and (verb is None or verb > 0):
        asked = [n for n, w in enumerate(words) if w in ("what", "how", "why", "who", "which")]
        if verb is None or (asked and asked[0] < verb):
            verb = asked[0] if asked else 0
    if verb is None:
        return "", ""
    phrase: list[str] = []
    for word in words[verb + 1 :]:
        if not word[0].isalpha() or word in PHRASE_ENDS:
            if phrase:
                break
            if not word[0].isalpha():
                break
            continue
        if word not in DETERMINERS:
            phrase.append(word)
    return words[verb], phrase[-1] if phrase else ""


def leading_verb(instruction: str) -> str:
    """The verb that a Chinese instruction begins with, or the first longer one within it; "" if it has none."""
    text = instruction.lstrip("“\"'（(《 ")
    for opening in CHINESE_OPENINGS:
        text = text.removeprefix(opening)
    for verb in VERBS_LONGEST_FIRST:
        if text.startswith(verb):
            return verb
    places = {verb: text.find(verb) for verb in VERBS_LONGEST_FIRST if len(verb) > 1}
    found = [(place, -len(verb), verb) for verb, place in places.items() if place >= 0]
    return min(found)[2] if found else ""


def topics(instructions: Sequence[str]) -> list[tuple[str, int]]:
    """Pairs of Han characters and how many instructions hold them, the commonest first."""
    found: Counter[str] = Counter()
    for text in instructions:
        runs = re.findall(f"[{HAN}]+", text)
        pairs = {"".join(pair) for run in runs for pair in itertools.pairwise(run)}
        found.update(sorted(pair for pair in pairs if NO_TOPIC.isdisjoint(pair)))
    return [(pair, count) for pair, count in found.most_common(TOP_TOPICS) if count > 1]


def describe(tasks: Sequence[Task], similarities: Sequence[float]) -> dict[str, Any]:
    """The figures of one language, as plain JSON values."""
    if not tasks:
        return {"tasks": 0, "instances": 0}
    language = tasks[0].language
    texts = [task.instruction for task in tasks]
    instances = [instance for task in tasks for instance in task.instances]
    told: dict[str, Any] = {
        "tasks": len(tasks),
        "classification": sum(task.is_classification for task in tasks),
        "instances": len(instances),
        "instances_without_input": sum(not instance.input for instance in instances),
        "instruction_lengths": histogram([size_of(t, language) for t in texts], 5, 60),
        "input_lengths": histogram([size_of(i.input, language) for i in instances], 10, 120),
        "output_lengths": histogram([size_of(i.output, language) for i in instances], 20, 240),
        "similarity": histogram([int(100 * s) for s in similarities], 5, 100),
        "mean_similarity": round(sum(similarities) / len(similarities), 4),
    }
    if language == "en":
        told["verbs"] = _verb_table(texts)
    else:
        told["verbs"] = dict(
            Counter(leading_verb(t) or "(none)" for t in texts).most_common(TOP_VERBS)
        )
        told["topics"] = dict(topics(texts))
    return told


def _verb_table(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    pairs = Counter(map(verb_and_object, texts))
    verbs: Counter[str] = Counter()
    for (verb, _), count in pairs.items():
        verbs[verb] += count
    table = {}
    for verb, count in verbs.most_common(TOP_VERBS):
        of_verb = Counter({noun: n for (v, noun), n in pairs.items() if v == verb and noun})
        table[verb or "(none)"] = {
            "tasks": count,
            "objects": dict(of_verb.most_common(OBJECTS_OF_A_VERB)),
        }
    return table


def histogram(values: Sequence[int], width: int, last: int) -> dict[str, int]:
    """How many values lie in each bin of `width` from 0, named "0-4"; from `last` on there is one bin."""
    counts = Counter(min(value // width * width, last) for value in values)
    names = {at: f"{at}-{at + width - 1}" for at in range(0, last, width)} | {last: f"{last}+"}
    top = max(counts, default=0)
    return {name: counts[at] for at, name in names.items() if at <= top}
