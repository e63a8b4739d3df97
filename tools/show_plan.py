"""The estimate against the compiled step, on hardware that is not here: tools/results/plan.md.

    python tools/show_plan.py              every row whose program is not the one in plan.json
    python tools/show_plan.py v5e-16 ...   of these rows only

A row is compiled in a process of its own and kept in tools/results/plan.json as soon as it is known, so a
run that was cut goes on. What was compiled already, the same program by the same compiler, is not again.
Needs libtpu 0.0.52 beside jax (one row 0.0.42.1), rows for GPUs jax[cuda13]; what is not installed leaves its
rows as they were compiled, only estimated anew. A row takes about 100 seconds of one core.
"""

import sys

from compiled_rows import ROOT, Answer, Row, fill, gigabytes, markdown

RESULTS = ROOT / "tools" / "results" / "plan.json"
TABLE = RESULTS.with_suffix(".md")
B7 = "pretrain_7b_tpu"


ROWS = {
    "v5e-16": Row(B7, "v5e:4x4", ("--step.batch-size", "16"), 4.701),
    "v5e-16-before": Row(B7, "v5e:4x4", ("--step.batch-size", "16"), 4.701, "0.0.42.1"),
    "v5p-4": Row(B7, "v5p:2x2x1", ("--step.batch-size", "16"), 17.021),
    "v5e-256": Row(B7, "v5e:16x16", ("--step.batch-size", "1024", "--data.seq-len", "2048"), 4.289),
    "v5p-64": Row(B7, "v5p:4x4x4"),
    "v6e-64": Row(B7, "v6e:8x8"),
    "1b-v5e-16": Row("pretrain_1b", "v5e:4x4", ("--step.batch-size", "64")),
    "too-large": Row(B7, "v5e:2x4", ("--step.batch-size", "16")),
    "h100-8": Row("pretrain_7b_gpu", "h100:1x8"),
}
HEAD = (
    "run", "topology", "arguments", "temporaries", "bar", "at once", "estimated", "estimate is off",
    "fits", "attention", "received", "estimated", "TFLOP", "s a step", "MFU", "compiled in CPU s (s)", "by",
)  # fmt: skip
BEFORE = """# Planned and compiled

Command: `python tools/show_plan.py`. Memory in GB of one device, of a step compiled for hardware that is absent, with
our kernels in it. *Temporaries* are jax's `temp_size_in_bytes`; *at once* is the most that the compiler has alive at
once, arguments included (on a GPU: arguments and temporaries), which is what must fit. *Received* GB and *TFLOP* are of
one device and one step, read off the compiled program; a dash: this jaxlib cannot show it. Step time and MFU are
estimates from a roofline. From 64 chips on libtpu writes many gathers and scatters as sums over all chips, which
bring a device twice the bytes. *Fits* is the compiler's word, and the estimate's where they differ. The rows with a
bar were compiled while the machine, two cores, did nothing else; the others beside other work, where seconds on the clock
(in brackets) say little. CPU seconds are of all cores.
"""
AFTER = """
*Bar*: temporaries of MaxText's Llama-2-7B at the same sequence, batch, topology and full rematerialisation, compiled with
jax 0.10.2 and libtpu 0.0.52 on this kind of machine; its compiling took 47, 51 and 67 seconds. Of the temporaries the
compiler decides more than the program: libtpu 0.0.42.1 gives the step on v5e:4x4 two fifths more than are alive at once,
0.0.52 a hundredth. So what compares is the same libtpu; by it both measures, temporaries and *at once* less arguments, are
below the bar.
"""


def line(name: str, answer: Answer) -> str:
    """A row of the table."""
    row, counted, found = ROWS[name], answer["estimate"], answer["compiled"]
    fits = [found["fits"], counted["fits"]]
    words = ["yes" if fit else "no" for fit in dict.fromkeys(fits)]
    moved = sum(one["bytes"] for one in found["collectives"])
    done = found.get("products")
    cells = (
        " ".join((row.config, *row.overrides)),
        row.topology,
        gigabytes(found["arguments"]),
        gigabytes(found["temporaries"]),
        f"{row.bar:.2f}" if row.bar else "",
        gigabytes(found["total"]),
        gigabytes(counted["memory"]["total"]),
        f"{counted['memory']['total'] / found['total'] - 1:+.1%}" if found["total"] else "–",
        " / ".join(words),
        f"{found['attention']}, kernels: {len(found['kernels'])}" if found["kernels"] else "–",
        gigabytes(moved),
        gigabytes(sum(one["bytes"] for one in counted["traffic"])),
        f"{sum(done.values()) / 1e12:.0f}" if done else "–",
        f"{counted['time']['seconds']:.2f}",
        f"{counted['time']['mfu']:.0%}",
        f"{found['cpu_seconds']:.0f} ({found['seconds']:.0f})" if found["cpu_seconds"] else "–",
        found["compiler"],
    )
    return f"| {' | '.join(cells)} |"


def table(answers: dict[str, Answer]) -> str:
    """The page."""
    known = {name: answers[name] for name in ROWS if name in answers}
    told = [
        f"{ROWS[name].topology}, in the compiler's words: {answer['compiled']['too_large']}"
        for name, answer in known.items()
        if answer["compiled"]["too_large"]
    ]
    rows = [line(name, answer) for name, answer in known.items()]
    return "\n".join([BEFORE, *markdown(HEAD, rows), AFTER, *told, ""]).rstrip() + "\n"


def main() -> None:
    """Runs what is asked for, keeps it, writes the page."""
    answers, failed = fill(__doc__ or "", ROWS, RESULTS, line)
    TABLE.write_text(table(answers), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
