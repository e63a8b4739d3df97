"""What happened to every document, counted by rule and reason, with samples: JSON and a page to read."""

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.data.clean.rules import Outcome
from llm_jax.data.documents import Document, file_of, worst_files
from llm_jax.data.shard_writer import write_file
from llm_jax.errors import DataError

JSON_REPORT, HTML_REPORT = "report.json", "report.html"
SAMPLES = 8  # for each reason and for each rule that changed something
EXCERPT = 400  # characters of a sample
AROUND = 60  # characters before the first difference of a changed text
WORST = 3  # reasons that an error names


class Sample(NamedTuple):
    """One document that a rule rejected or changed."""

    id: str
    detail: str
    before: str
    after: str  # "" when it was rejected


class RuleCounts:
    """Counts of one source. Documents come in a fixed order, so counts and samples are reproducible."""

    def __init__(self, rules: tuple[str, ...]) -> None:
        self.rules = rules
        self.documents = self.kept = self.untouched = self.characters = self.kept_characters = 0
        self.rejected: Counter[tuple[str, str]] = Counter()  # (rule, reason)
        self.rejected_characters: Counter[tuple[str, str]] = Counter()
        self.changed: Counter[str] = Counter()
        self.samples: dict[tuple[str, str], list[Sample]] = {}
        self.files: Counter[str] = Counter()  # rejected documents by file

    def add(self, document: Document, outcome: Outcome) -> None:
        """Counts one document."""
        self.documents += 1
        self.characters += len(document.text)
        if outcome.rejection is not None:
            key = (outcome.rejected_by, outcome.rejection.reason)
            self.rejected[key] += 1
            self.files[file_of(document.id)] += 1
            self.rejected_characters[key] += len(document.text)
            kept = self.samples.setdefault(key, [])
            if len(kept) < SAMPLES:
                head = outcome.text[:EXCERPT]
                kept.append(Sample(document.id, outcome.rejection.detail, head, ""))
            return
        self.kept += 1
        self.kept_characters += len(outcome.text)
        self.untouched += not outcome.changed
        for rule in outcome.changed:
            self.changed[rule] += 1
            kept = self.samples.setdefault((rule, ""), [])
            if len(kept) < SAMPLES:
                # of the whole way through the rules; the rule names where to look
                start = _first_difference(document.text, outcome.text)
                cut = slice(max(0, start - AROUND), start + EXCERPT - AROUND)
                kept.append(Sample(document.id, "", document.text[cut], outcome.text[cut]))

    def merge(self, later: "RuleCounts") -> None:
        """Adds what was counted of the documents that follow, as if all had been counted here."""
        self.documents += later.documents
        self.kept += later.kept
        self.untouched += later.untouched
        self.characters += later.characters
        self.kept_characters += later.kept_characters
        self.rejected.update(later.rejected)
        self.rejected_characters.update(later.rejected_characters)
        self.changed.update(later.changed)
        self.files.update(later.files)
        for key, samples in later.samples.items():
            held = self.samples.setdefault(key, [])
            held += samples[: SAMPLES - len(held)]

    def check(self, source: str, max_fraction: float) -> None:
        """Raises DataError naming the worst reasons when the rules rejected more than allowed."""
        rejected = self.documents - self.kept
        if self.kept and rejected <= max_fraction * self.documents:
            return
        worst = ", ".join(
            f"{reason!r} ({n})" for (_, reason), n in self.rejected.most_common(WORST)
        )
        key = self.rejected.most_common(1)[0][0]
        first = self.samples[key][0]
        rule = (
            "none is left"
            if not self.kept
            else f"more than max_drop_fraction={max_fraction:g} allows"
        )
        raise DataError(
            f"source {source!r}: the rules reject {rejected} of {self.documents} documents, {rule}. "
            f"Most often {worst}; the first at {first.id} ({first.detail}); change the rules or raise it"
            f"{worst_files(self.files)}"
        )

    def counts(self) -> dict[str, Any]:
        """Plain JSON values: totals, then by rule in the order of the config."""
        by_rule = {}
        for rule in self.rules:
            reasons = {
                reason: {"documents": n, "characters": self.rejected_characters[name, reason]}
                for (name, reason), n in sorted(self.rejected.items())
                if name == rule
            }
            by_rule[rule] = {"changed": self.changed[rule], "rejected": reasons}
        return {
            "documents": self.documents,
            "kept": self.kept,
            "kept_untouched": self.untouched,
            "characters": self.characters,
            "kept_characters": self.kept_characters,
            "by_rule": by_rule,
        }


def _first_difference(before: str, after: str) -> int:
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return index
    return min(len(before), len(after))


def write_reports(root: Path, sources: dict[str, RuleCounts]) -> None:
    """Writes `report.json` and `report.html` into the folder of the stage's output."""
    content = {
        name: {
            **counts.counts(),
            "samples": [
                {"rule": rule, "reason": reason, **sample._asdict()}
                for (rule, reason), samples in sorted(counts.samples.items())
                for sample in samples
            ],
        }
        for name, counts in sources.items()
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_file(root / JSON_REPORT, text.encode("utf-8", "replace"))
    write_file(root / HTML_REPORT, page(content).encode("utf-8", "replace"))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { text-align: left; padding: .2rem .8rem .2rem 0 }
td.n { text-align: right; font-variant-numeric: tabular-nums } tr.total { border-top: 1px solid #999 }
.bar { display: inline-block; height: .7em; background: #c0392b } .bar.kept { background: #2e8b57 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; margin: .3rem 0 }
pre.after { background: #eef7f0 } summary { cursor: pointer; margin: .3rem 0 } small { color: #666 }
"""


def page(content: dict[str, Any]) -> str:
    """The report as one HTML page that needs nothing else; all text of documents is escaped."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>data clean</title>",
        f"<style>{STYLE}</style><h1>What cleaning did</h1>",
    ]
    for name, source in content.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(_table(source))
        parts.append(_samples(source["samples"]))
    return "\n".join(parts) + "</html>\n"


def _table(source: dict[str, Any]) -> str:
    total = max(1, source["documents"])
    rows = ["<table><tr><th>rule<th>reason<th>documents<th>share<th></tr>"]

    def row(rule: str, reason: str, count: int, kind: str = "") -> None:
        share = count / total
        bar = f"<span class='bar {kind}' style='width:{max(share * 14, 0.05):.2f}em'></span>"
        rows.append(
            f"<tr><td>{html.escape(rule)}<td>{html.escape(reason)}<td class=n>{count:,}"
            f"<td class=n>{share:.2%}<td>{bar}</tr>"
        )

    for rule, counts in source["by_rule"].items():
        if counts["changed"]:
            row(rule, "changed, kept", counts["changed"], "kept")
        for reason, rejected in counts["rejected"].items():
            row(rule, reason, rejected["documents"])
    row("kept", f"{source['kept_untouched']:,} of them untouched", source["kept"], "kept")
    rows.append(
        f"<tr class=total><td>read<td>{source['characters']:,} characters, "
        f"{source['kept_characters']:,} kept<td class=n>{source['documents']:,}</tr></table>"
    )
    return "\n".join(rows)


def _samples(samples: list[dict[str, str]]) -> str:
    parts, title = [], None
    for sample in samples:
        named = f"{sample['rule']}: {sample['reason'] or 'changed'}"
        if named != title:
            parts.append(
                ("</details>" if title else "")
                + f"<details><summary>{html.escape(named)}</summary>"
            )
            title = named
        parts.append(f"<small>{html.escape(sample['id'])} {html.escape(sample['detail'])}</small>")
        parts.append(f"<pre>{html.escape(sample['before'])}</pre>")
        if sample["after"]:
            parts.append(f"<pre class=after>{html.escape(sample['after'])}</pre>")
    return "\n".join(parts) + ("</details>" if title else "")
