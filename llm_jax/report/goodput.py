"""The goodput ledger: where the time of a run went, from `events.jsonl`.

Every checkpoint notes the seconds of each phase so far in its session. What a session did after the checkpoint
that the next one resumed from is lost; between the two nobody worked. So

    total = init + compile + data + step + eval + sample + save + lost + down
    goodput = step / total
"""

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PHASES = ("step", "data", "compile", "eval", "sample", "save", "init", "lost", "down")
BEGIN = ("start", "resume")
END = ("end", "stop")


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process's life, as far as it counts."""

    begun: str  # ISO time
    first_step: int
    last_step: int  # that the next session, or the end, builds on
    ending: str  # end, stop, hang, or crash
    seconds: dict[str, float]  # by phase; `down` is before the session
    lost_steps: int  # done after `last_step`, or before going back, and done again


def sessions(events: Sequence[dict[str, Any]]) -> list[Session]:
    """The sessions of a run in order of time."""
    begins = [at for at, event in enumerate(events) if event["event"] in BEGIN]
    found: list[Session] = []
    alive = None  # until when the session before was at work
    for number, at in enumerate(begins):
        last = begins[number + 1] if number + 1 < len(begins) else len(events)
        successor = events[last] if last < len(events) else None
        session, alive = _session(events[at:last], successor, alive)
        found.append(session)
    return found


def _session(
    events: Sequence[dict[str, Any]], successor: dict[str, Any] | None, alive: float | None
) -> tuple[Session, float]:
    begin = events[0]
    base = successor["step"] if successor else float("inf")
    noted = [event for event in events if "seconds" in event and event["step"] <= base]
    back = [event for event in events if event["event"] == "rolled back"]
    seconds = dict(noted[-1]["seconds"]) if noted else {}
    lost = sum(event.get("lost_seconds", 0.0) for event in back)
    seconds["step"] = max(0.0, seconds.get("step", 0.0) - lost)
    crashed_after = successor.get("lost_seconds", 0.0) if successor else 0.0
    seconds["lost"] = lost + crashed_after
    if alive is not None:
        seconds["down"] = max(0.0, _time(begin) - seconds.get("init", 0.0) - alive)
    endings = [event["event"] for event in events if event["event"] in (*END, "hang")]
    session = Session(
        begun=begin["time"],
        first_step=begin["step"],
        last_step=noted[-1]["step"] if noted else begin["step"],
        ending=endings[-1] if endings else "crash" if successor else "not ended",
        seconds={name: seconds[name] for name in PHASES if name in seconds},
        lost_steps=sum(event.get("lost_steps", 0) for event in back)
        + (successor.get("lost_steps", 0) if successor else 0),
    )
    return session, _time(noted[-1] if noted else begin) + crashed_after


def _time(event: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def totals(found: Iterable[Session]) -> dict[str, float]:
    """Seconds of every phase over all sessions, largest share of work first as in `PHASES`."""
    sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for session in found:
        for name, seconds in session.seconds.items():
            sums[name] += seconds
    return sums


def goodput(sums: dict[str, float]) -> float:
    """Share of all time that went into steps that count; 0 for a run without time."""
    total = sum(sums.values())
    return sums["step"] / total if total else 0.0


def ledger_lines(found: Sequence[Session]) -> list[str]:
    """The ledger as text: a line a session, then the sums."""
    lines = [f"{'session':<27}{'steps':>15}{'lost':>6}  {'ended':<10}{'seconds':>9}"]
    for session in found:
        steps = f"{session.first_step:,} - {session.last_step:,}"
        lines.append(
            f"{session.begun:<27}{steps:>15}{session.lost_steps:>6}  {session.ending:<10}"
            f"{sum(session.seconds.values()):>9.1f}"
        )
    sums = totals(found)
    total = sum(sums.values()) or 1.0
    lines += [
        f"{name:<10}{seconds:>10.1f} s {seconds / total:>7.1%}"
        for name, seconds in sums.items()
        if seconds
    ]
    lines.append(f"goodput   {goodput(sums):>20.1%}")
    return lines
