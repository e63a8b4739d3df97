"""What the generator is asked, in each language: texts that a plain language model can continue.

Three stages, as in the paper: new instructions after eight examples; is an instruction classification; its
instances, input first, or for classification label first (asked input first, a model writes inputs of
one label only).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_jax.instruct.self_instruct.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The fixed texts of one language. Markers stand at the start of a line."""

    instructions: str
    classify: str
    input_first: str
    label_first: str
    task: str
    kind: str  # asks whether a task is classification
    yes: str
    no: str
    example: str
    input: str
    output: str
    label: str
    none: str  # stands for an input where there is none


ENGLISH = Wording(
    instructions="Below is a numbered list of tasks for an assistant that reads and writes text. Every task is "
    "stated in one line and can be done with text alone. No two of them are alike in subject, in form or in the "
    "kind of work they ask for.",
    classify="Some tasks are classification: the right answer is one label out of a few that are known "
    "beforehand. For all others the answer is free text.",
    input_first="Every task below is followed by examples. An example has an input, or \"none\" where the task "
    "says all, and the right output.",
    label_first="Every task below asks for a label. For each label there is an example: first the label, then an "
    "input for which it is right.",
    task="Task:",
    kind="Classification:",
    yes="yes",
    no="no",
    example="Example",
    input="Input:",
    output="Output:",
    label="Label:",
    none="none",
)  # fmt: skip
CHINESE = Wording(
    instructions="下面是给文字助手的任务清单，逐条编号。每个任务用一行写完，只靠文字就能完成；各个任务的主题、"
    "形式和要做的事情都不相同。",
    classify="有些任务是分类任务：正确答案是事先知道的几个标签之一。其余任务的答案是自由的文字。",
    input_first="下面每个任务之后都有示例。示例包括输入和正确的输出；任务本身已经说清楚、不需要输入时，输入写“无”。",
    label_first="下面每个任务都要求给出一个标签。每个标签有一个示例：先写标签，再写一个应当得到该标签的输入。",
    task="任务：",
    kind="是否分类：",
    yes="是",
    no="否",
    example="示例",
    input="输入：",
    output="输出：",
    label="标签：",
    none="无",
)
WORDINGS = {"en": ENGLISH, "zh": CHINESE}


def one_line(text: str) -> str:
    """The text with every run of blanks and line ends as one blank."""
    return " ".join(text.split())


def instructions_prompt(language: str, examples: Sequence[Task]) -> str:
    """Asks for instructions that go on a numbered list of examples."""
    rows = [f"{n}. {one_line(task.instruction)}" for n, task in enumerate(examples, start=1)]
    # no blank at the end: tokenizers join it with the next word
    return "\n".join([WORDINGS[language].instructions, "", *rows, f"{len(rows) + 1}."])


def instructions_stop(examples: int, wanted: int) -> tuple[str, ...]:
    """Ends an answer once it holds `wanted` instructions."""
    return (f"\n{examples + wanted + 1}.", "\n\n\n")


def classify_prompt(language: str, examples: Sequence[Task], instruction: str) -> str:
    """Asks whether an instruction is classification."""
    w = WORDINGS[language]
    parts = [w.classify, ""]
    for task in examples:
        answer = w.yes if task.is_classification else w.no
        parts += [f"{w.task} {one_line(task.instruction)}", f"{w.kind} {answer}", ""]
    return "\n".join([*parts, f"{w.task} {instruction}", w.kind])


def instances_prompt(
    language: str, examples: Sequence[Task], instruction: str, label_first: bool
) -> str:
    """Asks for instances of an instruction."""
    w = WORDINGS[language]
    parts = [w.label_first if label_first else w.input_first, ""]
    for task in examples:
        parts.append(f"{w.task} {one_line(task.instruction)}")
        for number, instance in enumerate(task.instances, start=1):
            given = f"{w.input} {instance.input or w.none}"
            if label_first:
                parts += [f"{w.label} {instance.output}", given]
            else:
                parts += [f"{w.example} {number}", given, f"{w.output} {instance.output}"]
        parts.append("")
    first = [w.label] if label_first else [f"{w.example} 1", w.input]
    return "\n".join([*parts, f"{w.task} {instruction}", *first])


def instances_stop(language: str) -> tuple[str, ...]:
    """Ends an answer before the next task."""
    return (f"\n{WORDINGS[language].task}",)
