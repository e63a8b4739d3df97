"""`llm-jax eval MODEL --tasks FILE`: what a tuned model answers, beside reference answers.

FILE holds conversations in any of the formats of `llm-jax data conversations`; the last answer of each
is the reference. Measured are bits per character of the reference, and of what the model writes itself
exact match and ROUGE-L. `--against MODEL2` puts a second model on the same prompts and counts which of
the two is better at each. A model without a chat template is asked in the template `plain`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm_jax.config import nearest
from llm_jax.errors import ConfigError

if TYPE_CHECKING:
    from llm_jax.api import Model
    from llm_jax.generate import SamplingConfig
    from llm_jax.instruct.conversations import Turn
    from llm_jax.instruct.masks import ChatEncoder

SAMPLES = 20  # answers in the report, evenly spaced


class Answered(NamedTuple):
    """One task and what a model makes of it."""

    nats: float  # of the reference
    characters: int  # of the reference, as the template writes it
    answer: str
    exact: bool
    rouge_l: float


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All tasks of one model."""

    model: str
    step: int
    template: str
    tasks: tuple[Answered, ...]

    @property
    def bits_per_character(self) -> float:
        """Of all references together."""
        nats = sum(task.nats for task in self.tasks)
        return nats / np.log(2) / sum(task.characters for task in self.tasks)

    @property
    def rouge_l(self) -> float:
        """Mean over tasks."""
        return sum(task.rouge_l for task in self.tasks) / len(self.tasks)

    @property
    def exact(self) -> int:
        """Tasks whose answer is the reference."""
        return sum(task.exact for task in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """The figures and every answer."""
        return {
            "model": self.model,
            "step": self.step,
            "template": self.template,
            "bits_per_character": self.bits_per_character,
            "exact": self.exact,
            "rouge_l": self.rouge_l,
            "tasks": [task._asdict() for task in self.tasks],
        }


def main(arguments: Any) -> None:
    """Runs the command; `run.eval` has parsed its arguments."""
    from llm_jax import load
    from llm_jax.checkpoint import write_json_atomic
    from llm_jax.generate import SamplingConfig

    sampling = SamplingConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
    )
    tasks = read_tasks(arguments.tasks)
    model = load(arguments.model, arguments.step)
    out = Path(arguments.out) if arguments.out else beside_tasks(Path(model.path))
    results = [answer_tasks(model, tasks, sampling)]
    del model  # two large ones need not fit at once
    if arguments.against:
        results.append(answer_tasks(load(arguments.against), tasks, sampling))
    wins = compare(*results) if len(results) == 2 else {}
    console = Console()
    for table in make_tables(results, wins):
        console.print(table)
    report = {"tasks": arguments.tasks, "wins": wins, "models": [r.to_dict() for r in results]}
    write_json_atomic(out, report)
    page = out.with_suffix(".md")
    page.write_text(samples_page(tasks, results, arguments.tasks), encoding="utf-8")
    console.print(f"written to {out} and {page}", soft_wrap=True, highlight=False)


def read_tasks(file: str) -> list[tuple["Turn", ...]]:
    """The conversations of a file. Raises DataError if it has none, or bad ones."""
    from llm_jax.data.documents import Rejects
    from llm_jax.data.sources import SourceConfig
    from llm_jax.instruct.conversations import read_conversations

    if not os.path.exists(file):
        near = nearest(file, [str(path) for path in Path(file).absolute().parent.glob("*.jsonl")])
        raise ConfigError(f"--tasks {file}: no such file; {near}")
    rejects, source = Rejects(), SourceConfig(name="tasks", path=file)
    tasks = [conversation.turns for conversation in read_conversations(source, "auto", rejects)]
    rejects.check("tasks", max_fraction=0)
    return tasks


def chat_of(model: "Model") -> "ChatEncoder":
    """How a model is talked to: in its own template, or in `plain` if it has none."""
    from llm_jax.instruct.masks import ChatEncoder, chat_tokenizer
    from llm_jax.instruct.templates import TEMPLATES, find_template, own_template

    tokenizer = model.tokenizer
    own = bool(own_template(tokenizer.files, model.path))
    template = find_template("base", tokenizer.files, model.path) if own else TEMPLATES["plain"]
    return ChatEncoder(tokenizer if own else chat_tokenizer(tokenizer, template), template, "last")


def answer_tasks(
    model: "Model", tasks: Sequence[tuple["Turn", ...]], sampling: "SamplingConfig"
) -> Answers:
    """The model's answers to all tasks, and how well it predicts the references."""
    from llm_jax.data.shards import ANSWER
    from llm_jax.eval.answers import exact_match, rouge_l
    from llm_jax.eval.perplexity import Evaluator
    from llm_jax.eval.windows import Corpus, EvalConfig
    from llm_jax.generate import generate

    chat = chat_of(model)
    made = [chat.encode(turns) for turns in tasks]
    corpus = Corpus(
        np.concatenate([one.tokens for one in made]),
        np.cumsum([0, *(len(one.tokens) for one in made)]).astype(np.int64),
        np.array([one.num_bytes for one in made]),
        np.array([one.num_characters for one in made]),
        np.concatenate([one.mask == ANSWER for one in made]),
    )
    settings = EvalConfig(batch_size=sampling.batch_size)
    nats = Evaluator(model.config, {"tasks": corpus}, settings).document_nats(model.params)
    prompts = [chat.prompt(turns[:-1]) for turns in tasks]
    texts = generate(model.params, model.config, model.tokenizer, prompts, sampling)
    answered = []
    for turns, one, cost, text in zip(tasks, made, nats, texts, strict=True):
        reference, answer = turns[-1].content, text.text.strip()
        answered.append(
            Answered(
                float(cost),
                one.num_characters,
                answer,
                exact_match(answer, reference),
                rouge_l(answer, reference),
            )
        )
    return Answers(
        model=model.path, step=model.step, template=chat.template.name, tasks=tuple(answered)
    )


def compare(one: Answers, other: Answers) -> dict[str, dict[str, int]]:
    """How often the first model is better, worse and equal, by each measure."""
    found = {}
    for name, value in (
        ("bits_per_character", lambda task: -task.nats / task.characters),
        ("rouge_l", lambda task: task.rouge_l),
        ("exact", lambda task: task.exact),
    ):
        pairs = [(value(a), value(b)) for a, b in zip(one.tasks, other.tasks, strict=True)]
        wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        found[name] = {"wins": wins, "losses": losses, "ties": len(pairs) - wins - losses}
    return found


def make_tables(results: Sequence[Answers], wins: dict[str, dict[str, int]]) -> list[Table]:
    """Figures of every model, and the win table of two."""
    look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    figures = Table("model", "template", **look)
    for name in ("tasks", "bits/char of reference", "ROUGE-L", "exact"):
        figures.add_column(name, justify="right")
    for result in results:
        figures.add_row(
            *(escape(result.model), result.template, f"{len(result.tasks):,}"),
            *(f"{result.bits_per_character:.4f}", f"{result.rouge_l:.4f}", f"{result.exact:,}"),
        )
    if not wins:
        return [figures]
    table = Table("the first model against the second", **look)
    for name in ("wins", "losses", "ties"):
        table.add_column(name, justify="right")
    names = {
        "bits_per_character": "fewer bits for the reference",
        "rouge_l": "higher ROUGE-L",
        "exact": "exact where the other is not",
    }
    for name, counts in wins.items():
        table.add_row(names[name], *(f"{count:,}" for count in counts.values()))
    return [figures, table]


def samples_page(tasks: Sequence[tuple["Turn", ...]], results: Sequence[Answers], file: str) -> str:
    """Prompts, references and answers side by side, as Markdown."""
    lines = [f"# Answers to {file}", ""]
    for result in results:
        lines.append(
            f"- {result.model}: {result.bits_per_character:.4f} bits per character of the reference, ROUGE-L "
            f"{result.rouge_l:.4f}, {result.exact} of {len(result.tasks)} exact"
        )
    for index in np.unique(np.linspace(0, len(tasks) - 1, SAMPLES).astype(int)).tolist():
        lines += ["", f"## {index + 1}", ""]
        lines += [
            f"**{turn.role}** {json.dumps(turn.text, ensure_ascii=False)}  "
            for turn in tasks[index]
        ]
        for number, result in enumerate(results, start=1):
            task = result.tasks[index]
            lines.append(
                f"**model {number}** ({task.nats / np.log(2) / task.characters:.2f} bits/char, ROUGE-L "
                f"{task.rouge_l:.2f}) {json.dumps(task.answer, ensure_ascii=False)}  "
            )
    return "\n".join(lines) + "\n"


def beside_tasks(checkpoint: Path) -> Path:
    """`tasks.json` in the run folder of a checkpoint, or in an imported model's folder."""
    in_run = checkpoint.parent.name == "checkpoints"
    return (checkpoint.parent.parent if in_run else checkpoint) / "tasks.json"
