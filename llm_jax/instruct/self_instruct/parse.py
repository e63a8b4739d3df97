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
# of both languages: some models answer Chinese with English markers
ROLES = {
    getattr(wording, role).rstrip(":：").lower(): role
    for wording in WORDINGS.values()
    for role in ("input", "output", "label", "task")
}
EXAMPLES = "|".join(wording.example for wording in WORDINGS.values())
# at the start of a line, with a colon of either width, bold or not; or the line that numbers an example
MARKER = re.compile(
    rf"(?mi)^[ \t*#]*(?:({'|'.join(ROLES)})[ \t*]*[:：][ \t*]*|(?:{EXAMPLES})[ \t]*\d*[ \t*]*(?:[:：][ \t*]*|$))"
)
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


def drafts(text: str, label_first: bool, finished: str) -> Parsed:
    """The instances in an answer. It goes on after the marker that ends the prompt."""
    first, second = ("label", "input") if label_first else ("input", "output")
    parts = MARKER.split(text)
    # before the first marker stands what belongs to the prompt's last one
    fields = [(first, parts[0])] if parts[0].strip() else []
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        role = ROLES.get((name or "").lower(), "")  # none: the line that numbers an example
        if role == "task":
            break
        if role in (first, second):
            fields.append((role, content))
    found: list[Draft] = []
    for role, content in fields:
        content = content.strip()
        if role == first:
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
