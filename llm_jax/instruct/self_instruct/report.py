"""What a run asked, kept and left out, and how varied the result is: report.json, and a page to read."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import to_dict
from llm_jax.instruct.self_instruct import diversity, folder
from llm_jax.instruct.self_instruct.filters import INSTANCE_REASONS, INSTRUCTION_REASONS
from llm_jax.instruct.self_instruct.pipeline import STAGES, Progress
from llm_jax.instruct.self_instruct.settings import SelfInstructConfig

JSON_REPORT, HTML_REPORT = "report.json", "report.html"
SAMPLES = 12  # tasks of each language on the page
EXCERPT = 400  # characters of a sample
NAMES = {"en": "English", "zh": "Chinese"}
ENDINGS = {
    "target": "the target is reached",
    "budget": "max_requests are used up",
    "patience": "rounds without a new task: more of the same would follow",
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.1em .8em .1em 0;text-align:left;vertical-align:top}
td.n{text-align:right}.bar{display:inline-block;height:.8em;background:#4a7ebb}.kept{background:#5a9e5a}
pre{white-space:pre-wrap;background:#f5f5f5;padding:.5em;margin:.2em 0}small{color:#777}"""


def make_report(
    path: Path,
    config: SelfInstructConfig,
    provenance: dict[str, Any],
    found: Mapping[str, Progress],
) -> dict[str, Any]:
    """Writes both reports into the run's folder; returns what report.json holds."""
    report = {
        "settings": to_dict(config),
        **provenance,
        "tasks_sha256": folder.sha256(path / folder.TASKS),
        "languages": {language: _counts(progress) for language, progress in found.items()},
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    folder.write_whole(path / JSON_REPORT, text + "\n")
    folder.write_whole(path / HTML_REPORT, _page(report, found))
    return report


def _counts(progress: Progress) -> dict[str, Any]:
    """Every filter is named, those that rejected nothing too."""
    return {
        "ended": progress.ended,
        "rounds": progress.round,
        "seeds": len(progress.seeds),
        "requests": {stage: progress.requests[stage] for stage in STAGES},
        "failed_requests": progress.failed,
        "instructions": {r: progress.instructions[r] for r in ("kept", *INSTRUCTION_REASONS)},
        "class_unclear": progress.unclear,
        "instances": {r: progress.instances[r] for r in ("kept", *INSTANCE_REASONS)},
        "instructions_without_instance": progress.without_instance,
        "result": diversity.describe(progress.tasks, progress.similarities),
    }


def _page(report: dict[str, Any], found: Mapping[str, Progress]) -> str:
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Self-Instruct</title><style>{STYLE}</style>",
        "<h1>Self-Instruct</h1>",
        f"<p>Written by {html.escape(json.dumps(report['generator'], ensure_ascii=False))}, "
        f"seed {report['settings']['seed']}; tasks.jsonl has sha256 "
        f"<code>{report['tasks_sha256'][:16]}</code></p>",
    ]
    for language, progress in found.items():
        counts = report["languages"][language]
        result = counts["result"]
        requests = ", ".join(f"{n:,} for {stage}" for stage, n in counts["requests"].items())
        parts += [
            f"<h2>{NAMES[language]}</h2>",
            f"<p>{result['tasks']:,} tasks with {result['instances']:,} instances after {counts['rounds']:,} "
            f"rounds; {ENDINGS[counts['ended']]}. Requests: {requests}; {counts['failed_requests']:,} got no "
            f"usable answer. {counts['class_unclear']:,} instructions of no clear class, "
            f"{counts['instructions_without_instance']:,} left without an instance.</p>",
            _bars("Instructions", counts["instructions"]),
            _bars("Instances", counts["instances"]),
        ]
        if progress.tasks:
            parts += _diversity(language, result)
            parts += ["<h3>Samples</h3>", *map(_sample, progress.tasks[-SAMPLES:])]
    return "\n".join(parts) + "\n"


def _diversity(language: str, result: dict[str, Any]) -> list[str]:
    unit = "words" if language == "en" else "characters"
    parts = [
        _bars("ROUGE-L to the nearest in the pool, hundredths", result["similarity"]),
        _bars(f"Length of instructions, {unit}", result["instruction_lengths"]),
        _bars(f"Length of inputs, {unit}", result["input_lengths"]),
        _bars(f"Length of outputs, {unit}", result["output_lengths"]),
    ]
    if language == "zh":
        return [
            *parts,
            _bars("Verbs they begin with", result["verbs"]),
            _bars("Topics: pairs of characters in several tasks", result["topics"]),
        ]
    rows = [
        f"<tr><td>{html.escape(verb)}<td class=n>{entry['tasks']:,}<td>"
        + html.escape(", ".join(f"{noun} {n}" for noun, n in entry["objects"].items()))
        for verb, entry in result["verbs"].items()
    ]
    return [*parts, "<h3>Verbs and their objects</h3><table>", *rows, "</table>"]


def _bars(title: str, counts: Mapping[str, int]) -> str:
    """A table with a bar a row."""
    most = max(counts.values(), default=0) or 1
    rows = [
        f"<tr><td>{html.escape(name)}<td class=n>{count:,}<td>"
        f"<span class='bar{' kept' if name == 'kept' else ''}' style='width:{20 * count / most:.2f}em'></span>"
        for name, count in counts.items()
    ]
    return "\n".join([f"<h3>{html.escape(title)}</h3><table>", *rows, "</table>"])


def _sample(task: Any) -> str:
    instance = task.instances[0]
    shown = [f"<p><b>{html.escape(task.instruction)}</b> <small>{task.id}</small></p>"]
    if instance.input:
        shown.append(f"<pre>{html.escape(instance.input[:EXCERPT])}</pre>")
    shown.append(f"<pre>{html.escape(instance.output[:EXCERPT])}</pre>")
    return "\n".join(shown)
