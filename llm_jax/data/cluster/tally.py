"""Counts and first samples of many units, merged in any grouping into what one machine would have seen.

A unit is read by one worker in order and counted by the classes that one machine uses; a `Tally` is what
they hold, with the place of each sample, so that of two tallies the earlier samples stay.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_jax.data import documents, sift
from llm_jax.data.clean import report
from llm_jax.data.clean.report import RuleCounts, Sample
from llm_jax.data.documents import Reject, Rejects
from llm_jax.data.sift import Seen

TOTALS = ("documents", "kept", "untouched", "characters", "kept_characters")
LIMITS = {
    "reject": documents.SAMPLES_PER_REASON,
    "rule": report.SAMPLES,
    "seen": sift.SAMPLES,
}


class Placed(NamedTuple):
    """A sample and where it stands."""

    unit: int
    number: int
    sample: Any  # a JSON value


@dataclass
class Tally:
    """Counts by name, and by name the first samples."""

    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    samples: dict[tuple[str, ...], list[Placed]] = field(default_factory=dict)


def tally(unit: int, rejects: Rejects, rules: RuleCounts, seen: Seen) -> Tally:
    """What the reading of one unit found."""
    made = Tally()
    counts = made.counts
    counts["records",] = rejects.records
    for reason, count in rejects.counts.items():
        counts["reject", reason] = count
    for reason, count in rejects.repairs.items():
        counts["repair", reason] = count
    for name, value in zip(TOTALS, _totals(rules), strict=True):
        counts["rules", name] = value
    for kind, files in (("file", rejects.files), ("rule file", rules.files)):
        for file, count in files.items():
            counts[kind, file] = count
    for (rule, reason), count in rules.rejected.items():
        counts["rule", rule, reason] = count
        counts["rule characters", rule, reason] = rules.rejected_characters[rule, reason]
    for rule, count in rules.changed.items():
        counts["changed", rule] = count
    for kind, labels in (("kept", seen.kept), ("dropped", seen.dropped)):
        for label, count in labels.items():
            counts[kind, label] = count
    for number, sample in enumerate(rejects.samples):
        made.samples.setdefault(("reject", sample.reason), []).append(
            Placed(unit, number, list(sample))
        )
    for key, samples in rules.samples.items():
        made.samples["rule", *key] = [Placed(unit, n, list(s)) for n, s in enumerate(samples)]
    for number, sample in enumerate(seen.samples):
        made.samples.setdefault(("seen", sample["reason"]), []).append(Placed(unit, number, sample))
    return made


def _totals(rules: RuleCounts) -> tuple[int, ...]:
    return (
        *(rules.documents, rules.kept, rules.untouched),
        *(rules.characters, rules.kept_characters),
    )


def merge(tallies: Iterable[Tally]) -> Tally:
    """The sum; associative and commutative."""
    merged = Tally()
    for one in tallies:
        merged.counts.update(one.counts)
        for key, samples in one.samples.items():
            both = [*merged.samples.get(key, ()), *samples]
            both.sort(key=lambda placed: placed[:2])
            merged.samples[key] = both[: LIMITS[key[0]]]
    return merged


def to_json(total: Tally) -> dict[str, Any]:
    """A tally as JSON values."""
    return {"counts": list(total.counts.items()), "samples": list(total.samples.items())}


def from_json(value: dict[str, Any]) -> Tally:
    """What `to_json` made, after its way through JSON."""
    read = Tally()
    read.counts.update({tuple(key): count for key, count in value["counts"]})
    for key, samples in value["samples"]:
        read.samples[tuple(key)] = [Placed(*sample) for sample in samples]
    return read


def rejects_of(total: Tally) -> Rejects:
    """Records left out and mended."""
    rejects = Rejects()
    rejects.records = total.counts["records",]
    rejects.counts = _named(total, "reject")
    rejects.repairs = _named(total, "repair")
    rejects.files = Counter(_named(total, "file"))
    rejects.samples = [Reject(*placed.sample) for placed in _in_order(total, "reject")]
    return rejects


def rules_of(total: Tally, names: tuple[str, ...]) -> RuleCounts:
    """What the rules did."""
    rules = RuleCounts(names)
    rules.documents, rules.kept, rules.untouched, rules.characters, rules.kept_characters = (
        total.counts["rules", name] for name in TOTALS
    )
    rules.files = Counter(_named(total, "rule file"))
    for key, count in total.counts.items():
        if key[0] == "rule":
            rules.rejected[key[1], key[2]] = count
        elif key[0] == "rule characters":
            rules.rejected_characters[key[1], key[2]] = count
        elif key[0] == "changed":
            rules.changed[key[1]] = count
    for key, samples in total.samples.items():
        if key[0] == "rule":
            rules.samples[key[1], key[2]] = [Sample(*p.sample) for p in samples]
    return rules


def seen_of(total: Tally) -> Seen:
    """What was kept and dropped by language."""
    seen = Seen()
    seen.kept, seen.dropped = Counter(_named(total, "kept")), Counter(_named(total, "dropped"))
    seen.samples = [placed.sample for placed in _in_order(total, "seen")]
    return seen


def _named(total: Tally, kind: str) -> dict[str, int]:
    found = {key[1]: count for key, count in total.counts.items() if key[0] == kind}
    return dict(sorted(found.items()))


def _in_order(total: Tally, kind: str) -> list[Placed]:
    found = [p for key, samples in total.samples.items() if key[0] == kind for p in samples]
    return sorted(found, key=lambda placed: placed[:2])
