"""A run as one HTML page that needs nothing else: curves, held-out scores, samples, where the time went."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_jax.report.chart import line_chart
from llm_jax.report.goodput import goodput, sessions, totals
from llm_jax.report.run_files import RunFiles

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f8fa; padding: 8px; overflow-x: auto; white-space: pre-wrap }
figure { margin: 1em 0; display: inline-block; width: 480px } svg { width: 100%; font-size: 11px }
polyline { fill: none; stroke-width: 1.5 } .grid { stroke: #eee } .bar { background: #1f6feb; height: .8em }
"""
UNLISTED = ("ledger",)  # events of every checkpoint: the ledger sums them up
CURVES = (
    ("Loss, nats per token", "loss"),
    ("Share of pairs whose better answer wins", "preference_accuracy"),
    ("Lead of the better answer", "reward_margin"),
    ("Gradient norm", "grad_norm"),
    ("Learning rate", "learning_rate"),
    ("Tokens per second", "tokens_per_second"),
)


def run_page(run: RunFiles) -> str:
    """The whole page."""
    name = html.escape(run.folder.name)
    sections = [
        ("Curves", curves(run)),
        ("Held-out text", evaluations(run)),
        ("Where the time went", ledger(run)),
        ("Events", events(run)),
        ("Samples", samples(run)),
        ("Environment", facts(run.environment)),
        (
            "Config",
            f"<pre>{html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))}</pre>",
        ),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{content}" for title, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{overview(run)}\n{body}\n</body></html>\n"
    )


def overview(run: RunFiles) -> str:
    """How far it came."""
    step = run.steps[-1]["step"] if run.steps else 0
    wanted = run.config.get("train", {}).get("steps", "?")
    kept = ", ".join(map(str, run.checkpoints)) or "none"
    return f"<p>Step {step} of {wanted}; checkpoints: {kept}.</p>"


def curves(run: RunFiles) -> str:
    """Training by step, then held-out bits per character of every source."""
    drawn = [line_chart(title, {name: points(run.steps, name)}) for title, name in CURVES]
    ending = "bits_per_character"
    names = sorted({name for row in run.evaluations for name in row if name.endswith(ending)})
    held_out = {
        name.removeprefix("eval/").removesuffix(ending).rstrip("/") or "all": points(
            run.evaluations, name
        )
        for name in names
    }
    return "\n".join([*drawn, line_chart("Held-out bits per character", held_out)])


def points(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever the value is a number; what was not finite is written as text."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def evaluations(run: RunFiles) -> str:
    """Every evaluation, a row each."""
    names = sorted(
        {n for row in run.evaluations for n in row if n.startswith("eval/") and n.count("/") <= 2}
    )
    names = [name for name in names if name.endswith(("bits_per_character", "perplexity"))]
    rows = [[row["step"], *(row.get(name, "") for name in names)] for row in run.evaluations]
    return table(["step", *(name.removeprefix("eval/") for name in names)], rows) if rows else ""


def ledger(run: RunFiles) -> str:
    """Seconds by phase over all sessions, then the sessions."""
    found = sessions(run.events)
    sums = totals(found)
    total = sum(sums.values())
    if not total:
        return ""
    bars = "".join(
        f"<tr><td>{name}</td><td class=number>{seconds:,.1f} s</td><td class=number>{seconds / total:.1%}</td>"
        f'<td><div class=bar style="width:{300 * seconds / total:.0f}px"></div></td></tr>'
        for name, seconds in sums.items()
        if seconds
    )
    lives = [
        [
            s.begun,
            s.first_step,
            s.last_step,
            s.lost_steps,
            s.ending,
            round(sum(s.seconds.values()), 1),
        ]
        for s in found
    ]
    heads = ["session", "from step", "to step", "steps lost", "ended by", "seconds"]
    return f"<p>Goodput {goodput(sums):.1%}.</p><table>{bars}</table>\n{table(heads, lives)}"


def events(run: RunFiles) -> str:
    """What happened, newest last."""
    rows = []
    for event in run.events:
        if event["event"] in UNLISTED:
            continue
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "step", "seconds")}
        told = json.dumps(rest, ensure_ascii=False) if rest else ""
        rows.append([event.get("time", ""), event["event"], event.get("step", ""), told])
    return table(["time", "event", "step", ""], rows) if rows else ""


def samples(run: RunFiles) -> str:
    """The newest generated texts, as the model wrote them."""
    return "\n".join(
        f"<h3>step {html.escape(name.lstrip('0') or '0')}</h3><pre>{html.escape(text)}</pre>"
        for name, text in run.samples.items()
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    rows = [
        [name, value if isinstance(value, str) else json.dumps(value)]
        for name, value in values.items()
    ]
    return table(["", ""], rows) if rows else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells are escaped; numbers stand to the right."""

    def cell(value: Any) -> str:
        number = isinstance(value, int | float)
        shown = f"{value:,.4f}" if isinstance(value, float) else str(value)
        return f"<td{' class=number' * number}>{html.escape(shown)}</td>"

    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>\n{lines}</table>"
