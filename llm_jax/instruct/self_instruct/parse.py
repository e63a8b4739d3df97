"""From what the generator wrote to instructions, a class, and instances. Any text can be read; rubbish gives little."""

import re
from typing import NamedTuple

from llm_jax.instruct.self_instruct.prompts import WORDINGS, one_line
from llm_jax.instruct.self_instruct.tasks import Instance

# "9. ", "9)", "9、", "Task 9:", "任务9：", "**9.**", and bullets; not "3.5"
ITEM = re.compile(
    r"(?mi)^[ \t>*#]*(?:(?:task|任务)?[ \t]*\d{1,3}[.:)、．：）](?!\d)|[-•](?=\s))[*]*"
)
YES = re.compile(r"(?i)^\W*(yes|是)(?![a-z否])")
NO = re.compile(r"(?i)^\W*(no|not|否|不是)(?![a-z])")
# how models write that there is no input
NOTHING = {
    "",
    "none",
    "(none)",
    "n/a",
    "no input",
    "<noinput>",
    "无",
    "（无）",
    "(无)",
    "无输入",
    "没有",
}


class Parsed(NamedTuple):
    """What an answer holds."""

    found: list
    cut_off: bool  # the last one may be unfinished


def instructions(text: str, finished: str) -> Parsed:
    """The instructions in an answer that goes on a numbered list, each as one line."""
    items = [one_line(item).strip("*") for item in ITEM.split(text)]
    return Parsed([item for item in items if item], finished == "length")


def is_classification(text: str) -> bool | None:
    """Yes, no, or None where the answer says neither."""
    if NO.match(text):
        return False
    return True if YES.match(text) else None


class Draft(NamedTuple):
    """An instance as it was written; None: a part is missing."""

    input: str | None
    output: str | None


def drafts(text: str, language: str, label_first: bool, finished: str) -> Parsed:
    """The instances in an answer. It goes on after the marker that ends the prompt."""
    w = WORDINGS[language]
    first, second = (w.label, w.input) if label_first else (w.input, w.output)
    # a colon of either width, bold or not: chat models write both
    names = {marker.rstrip(":："): marker for marker in (w.input, w.output, w.label, w.task)}
    pattern = rf"(?mi)^[ \t*#]*({'|'.join(names)}|{w.example}[ \t]*\d*)[ \t*]*[:：][ \t*]*|^[ \t*#]*{w.example}[ \t]*\d+[ \t*]*$"
    parts = re.split(pattern, text)
    # before the first marker stands what belongs to the prompt's last one
    fields = [(first, parts[0])] if parts[0].strip() else []
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        marker = names.get((name or "").capitalize(), names.get(name or "", ""))
        if marker == w.task:
            break
        if marker in (first, second):
            fields.append((marker, content))
    found: list[Draft] = []
    for marker, content in fields:
        content = content.strip()
        if marker == first:
            found.append(Draft(None, content) if label_first else Draft(content, None))
        elif found and (found[-1].input if label_first else found[-1].output) is None:
            last = found[-1]
            found[-1] = Draft(content, last.output) if label_first else Draft(last.input, content)
        elif not label_first:
            found.append(Draft("", content))  # a task without inputs: the output alone
    return Parsed(found, finished == "length")


def to_instance(draft: Draft) -> Instance:
    """The instance of a draft whose parts are there; an input that says "none" is none."""
    given = (draft.input or "").strip()
    if given.strip(" .。").lower() in NOTHING:
        given = ""
    return Instance(given, (draft.output or "").strip())
