"""Weak scaling, simulated: the same batch on each of 8 to 1024 chips: tools/results/scaling.md and .svg.

    python tools/show_scaling.py           every row whose program is not the one in scaling.json
    python tools/show_scaling.py 64 256    these only

The real step is compiled for chips that are not here, and what one device computes and receives is read
off the program. Needs libtpu 0.0.52 and a jaxlib that can show its programs (0.11 or newer for v5p).
"""

import sys
from typing import Any

from compiled_rows import ROOT, Answer, Row, ask, fill, gigabytes, markdown

from llm_jax.plan import Collective, estimate
from llm_jax.plan.products import Products
from llm_jax.plan.roofline import Time, program_time
from llm_jax.report.chart import line_chart

RESULTS = ROOT / "tools" / "results" / "scaling.json"
TABLE, PLOT = RESULTS.with_suffix(".md"), RESULTS.with_suffix(".svg")
CONFIG, ROWS_EACH = "pretrain_1b", 4
SLICES = {  # devices -> topology
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    64: "v5p:4x4x4",
    256: "v5p:4x8x8",
    1024: "v5p:8x8x16",
}
ROWS = {
    str(devices): Row(
        CONFIG,
        topology,
        ("--step.batch-size", str(ROWS_EACH * devices), "--step.micro-batches", "1"),
    )
    for devices, topology in SLICES.items()
}
HEAD = (
    "chips", "topology", "memory GB", "estimated", "TFLOP in products", "in kernels", "all-gather", "reduce-scatter",
    "all-reduce", "permute", "received GB", "estimated", "s a step", "of it waiting", "MFU", "compiled by",
)  # fmt: skip
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")
STYLE = (
    "<style>text{font:12px sans-serif}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}</style>"
    '<rect width="640" height="240" fill="#fff"/>'
)


def time_of(row: Row, compiled: dict[str, Any]) -> Time:
    """The roofline of what the program computes and receives."""
    request, topology = ask(row)
    memory = estimate(request, topology).memory
    found = tuple(Collective(**one) for one in compiled["collectives"])
    return program_time(request, topology, memory, Products(**compiled["products"]), found)


def line(name: str, answer: Answer) -> str:
    """A row of the table."""
    row, found = ROWS[name], answer["compiled"]
    if not found["products"]:
        return f"| {name} | {row.topology} " + "| – " * (len(HEAD) - 2) + "|"
    time = time_of(row, found)
    cells = [
        name,
        row.topology,
        gigabytes(found["total"]),
        gigabytes(answer["estimate"]["memory"]["total"]),
        f"{found['products']['matrices'] / 1e12:.1f}",
        f"{found['products']['kernels'] / 1e12:.1f}",
    ]
    for kind in KINDS:
        times, size = of_kind(found, kind)
        cells.append(f"{times:.0f}: {gigabytes(size)}" if times else "–")
    cells += [
        gigabytes(sum(one["bytes"] for one in found["collectives"])),
        gigabytes(sum(one["bytes"] for one in answer["estimate"]["traffic"])),
        f"{time.seconds:.3f}",
        f"{max(time.traffic - time.products, 0) + time.exposed:.3f}",
        f"{time.mfu:.1%}",
        found["compiler"],
    ]
    return f"| {' | '.join(cells)} |"


def of_kind(found: dict[str, Any], kind: str) -> tuple[float, float]:
    """How often, and bytes."""
    same = [one for one in found["collectives"] if one["kind"] == kind]
    return sum(one["times"] for one in same), sum(one["bytes"] for one in same)


def table(answers: dict[str, Answer]) -> str:
    """The page."""
    names = [name for name in ROWS if name in answers]
    request, _ = ask(ROWS[names[0]])
    before = f"""# Weak scaling, simulated

Command: `python tools/show_scaling.py`. The training step of `configs/{CONFIG}.py` (1.1 billion parameters), {ROWS_EACH} rows of
{request.seq_len} tokens on every chip, parameters and optimizer state split over all of them (`mesh.fsdp`), compiled for TPU v5p slices
that are not here. All of one device and one step, read off the compiled program: its memory at once, its operations, and its
collectives as *count: GB received*. The step time is a roofline of those (products at 80 % of the peak, attention 60 %,
received bytes over the links beside them; assumptions, see `llm_jax/plan/roofline.py`), not a measurement. On few chips
libtpu turns gathers into permutations beside the products they feed; on many it writes gathers and scatters as sums over
the whole torus (all-reduce), which bring a device twice the bytes that are estimated.

![GB received by a device in a step](scaling.svg)
"""
    rows = [line(name, answers[name]) for name in names]
    return "\n".join([before, *markdown(HEAD, rows), ""])


def plot(answers: dict[str, Answer]) -> str:
    """GB received over the number of chips, a line for each kind of collective."""
    lines = {
        kind: [
            (device.bit_length() - 1, of_kind(answers[str(device)]["compiled"], kind)[1] / 1e9)
            for device in SLICES
            if str(device) in answers
        ]
        for kind in KINDS
    }
    lines = {kind: points for kind, points in lines.items() if any(y for _, y in points)}
    chart = line_chart("GB received by a device in a step; chips, as a power of 2", lines)
    inner = chart[chart.index("<svg") : chart.index("</svg>") + len("</svg>")]
    begin, rest = inner.split(">", 1)
    return f'{begin} xmlns="http://www.w3.org/2000/svg">{STYLE}{rest}\n'


def main() -> None:
    """Runs what is asked for, keeps it, writes the page and the plot."""
    answers, failed = fill(__doc__ or "", ROWS, RESULTS, line)
    TABLE.write_text(table(answers), encoding="utf-8")
    PLOT.write_text(plot(answers), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
