"""What a run says about itself: a live line for people, `metrics.jsonl` for everything else."""

import collections
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

log = logging.getLogger(__name__)

# dense bf16 peak per chip in FLOP/s, from the vendors' data sheets; key: start of jax's device_kind
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself "TPU v5"
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float:
    """Peak bf16 FLOP/s of one chip, or 0 where it is not known (a CPU, a chip not in the table)."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else 0.0


class Throughput:
    """Tokens per second, MFU and the share of time spent waiting for data, over the last steps."""

    def __init__(self, flops_per_token: float, window: int = 20):
        devices = jax.devices()
        self.flops_per_token = flops_per_token
        self.peak = peak_flops(devices[0].device_kind) * len(devices)
        self.marks: collections.deque[tuple[float, float, float]] = collections.deque(
            maxlen=window + 1
        )

    def pause(self) -> None:
        """Forgets the past: what follows was preceded by a compile, an evaluation or a save."""
        self.marks.clear()

    def mark(self, tokens: float, data_wait: float) -> None:
        """One step is done: its target tokens, and the seconds it waited for its batch."""
        self.marks.append((time.perf_counter(), tokens, data_wait))

    def rates(self) -> dict[str, float]:
        """`tokens_per_second`, `data_wait_share`, and `mfu` where the chip's peak is known."""
        if len(self.marks) < 2:
            return {}
        seconds = self.marks[-1][0] - self.marks[0][0]
        done = list(self.marks)[1:]
        tokens_per_second = sum(tokens for _, tokens, _ in done) / seconds
        rates = {
            "tokens_per_second": tokens_per_second,
            "data_wait_share": sum(wait for _, _, wait in done) / seconds,
            "seconds_per_step": seconds / len(done),
        }
        if self.peak:
            rates["mfu"] = tokens_per_second * self.flops_per_token / self.peak
        return rates


class MetricsWriter:
    """Appends rows to `metrics.jsonl`; a resumed run first drops the rows after its step."""

    def __init__(self, path: Path, start_step: int = 0):
        self.path = path
        if path.exists():
            # a killed run may have logged steps it never saved, and may have torn its last line
            rows = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= start_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(row + b"\n" for row in rows))
            temporary.replace(path)
        self.file = path.open("ab", buffering=0)
        self.failed = False

    def write(self, row: dict[str, Any]) -> None:
        """One JSON object a line; numbers JSON does not know (NaN, inf) become strings.

        A full disk loses rows, not the run; the checkpoints decide whether it can go on.
        """
        row = {**row, "time": round(time.time(), 3)}  # when a crashed run was last alive
        safe = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in row.items()
        }
        # a line that was cut short is ended first, so that it spoils nothing but itself
        line = b"\n" * self.failed + json.dumps(safe).encode() + b"\n"
        try:
            failed, reason = self.file.write(line) < len(line), "the disk is full"
        except OSError as error:
            failed, reason = True, error.strerror
        if failed and not self.failed:
            log.error("%s cannot be written: %s; rows are lost until it can", self.path, reason)
        self.failed = failed

    def close(self) -> None:
        """Closes the file; further writes are errors."""
        self.file.close()


def lost(path: Path, step: int) -> tuple[int, float]:
    """(steps, seconds) of a run that was logged beyond `step`, from where it goes on: to be done again.

    To be asked before `MetricsWriter` drops those rows. Seconds are 0 when nothing was logged before.
    """
    rows = (
        [json.loads(line) for line in path.read_bytes().split(b"\n") if _step_of(line) < math.inf]
        if path.exists()
        else []
    )
    kept = [row.get("time", 0.0) for row in rows if row["step"] <= step]
    beyond = [row for row in rows if row["step"] > step]
    if not beyond:
        return 0, 0.0
    seconds = beyond[-1].get("time", 0.0) - kept[-1] if kept else 0.0
    return beyond[-1]["step"] - step, max(0.0, seconds)


def _step_of(line: bytes) -> float:
    """The step of a metrics row; infinity for a line that is no row."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class LiveLine:
    """Progress of a run: a bar that rewrites itself on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, start_step: int, console: Console):
        self.steps, self.console = steps, console
        # the metrics come last and give way: on a narrow terminal the time left is worth more
        metrics = Column(no_wrap=True, overflow="ellipsis")
        self.progress = Progress(
            TextColumn("[bold]{task.completed}/{task.total}", table_column=Column(min_width=7)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TextColumn("ETA", table_column=Column(min_width=3)),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=7)),
            TextColumn("{task.fields[line]}", table_column=metrics),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=start_step, line="compiling")
        self.progress.start()

    def show(self, row: dict[str, Any]) -> None:
        """Shows one row of metrics."""
        line = describe(row)
        self.progress.update(self.task, completed=row["step"], line=line)
        if not self.console.is_terminal:
            left = row.get("seconds_per_step", math.nan) * (self.steps - row["step"])
            eta = f"  ETA {left / 60:.1f} min" if math.isfinite(left) else ""
            self.say(f"step {row['step']}/{self.steps}  {line}{eta}")

    def say(self, text: str) -> None:
        """A line that stays: an evaluation, a save, a warning."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self.progress.stop()


def describe(row: dict[str, Any]) -> str:
    """`loss 3.21  1.42 bits/byte  lr 3.0e-04  |g| 0.87  5,120 tok/s  MFU 41 %  data 1 %`."""
    parts = [f"loss {row['loss']:.3f}"]
    if "bits_per_byte" in row:
        parts.append(f"{row['bits_per_byte']:.3f} bits/byte")
    if "preference_accuracy" in row:
        parts.append(f"{row['preference_accuracy']:.0%} preferred, lead {row['reward_margin']:.3f}")
    parts += [f"lr {row['learning_rate']:.1e}", f"|g| {row['grad_norm']:.2f}"]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    if "data_wait_share" in row:
        parts.append(f"data {row['data_wait_share']:.0%}")
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']:.0f}")
    return "  ".join(parts)
