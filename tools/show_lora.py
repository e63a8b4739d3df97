"""Shows what adapters reach: a small base model carried to another domain, by full tuning and by LoRA.

Run: .venv/bin/python tools/show_lora.py [CORPUS] [--output tools/results/lora.md]
     (CORPUS: default ../shared/corpus; some 6 minutes on two shared cores)
Expect: a table; the last line says "all bars met", exit status 0.

A model of 1.6 million parameters learns Python's documentation. From it, on PostgreSQL's, at the same
steps and rows: every parameter, and adapters on all seven projections, each at the better of two learning
rates. All through the commands a user types.
Bars: adapters have under 5 % of the parameters; their bits per character of held-out documents are within
10 % of full tuning's, and they come at least half of the way from the base to it; merged for
transformers, the model is the same.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import llm_jax
from llm_jax.model import ModelConfig, count_adapters, count_params
from llm_jax.train.state import count_trained
from llm_jax.train.trainable import ALL, Trainable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.show_continuation import command, write_text  # noqa: E402

VOCABULARY, SEQ_LEN, ROWS = 2048, 256, 4
WITHIN, MOST, WAY = 0.10, 0.05, 0.5
SIZES = {
    "vocab-size": VOCABULARY, "embed-dim": 128, "num-layers": 4, "num-heads": 4, "num-kv-heads": 4,
    "head-dim": 32, "mlp-dim": 384, "max-seq-len": SEQ_LEN,
}  # fmt: skip
ADAPTED = "LoRA, rank 4"
LORA = ("--model.lora.rank", 4, "--model.lora.rank-stabilised", "true")
# name -> words, learning rates tried, part that is trained
WAYS: dict[str, tuple[tuple[Any, ...], tuple[float, ...], Trainable]] = {
    "full": ((), (1e-3, 3e-3), ALL),
    ADAPTED: (LORA, (3e-3, 1e-2), Trainable("adapters")),
}


def train(root: Path, run: str, source: str, steps: int, *words: Any) -> float:
    """One run; returns bits per character of held-out documents at its end."""
    settings = {
        "run": root / run, "data.prepared": root / source, "data.seq-len": SEQ_LEN, "step.batch-size": ROWS,
        "step.micro-batches": 1, "train.steps": steps, "train.eval-every-steps": 0, "eval.max-documents": 8,
        "train.sample-every-steps": 0, "train.log-every-steps": 50, "checkpoint.save-every-steps": 10_000,
        "data.sources": json.dumps([{"name": "en", "weight": 1.0}]),
    }  # fmt: skip
    common = [word for name, value in settings.items() for word in (f"--{name}", value)]
    page = "configs/demo.py" if "--init-from" not in words else "configs/continue_zh.py"
    command("pretrain", page, *common, *words)
    return [row for row in metrics(root / run) if "eval/bits_per_character" in row][-1][
        "eval/bits_per_character"
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def prepare(corpus: Path, root: Path) -> None:
    """One tokenizer, two domains."""
    for name, folder in (("python-docs", "base-data"), ("postgresql-docs", "domain-data")):
        text = write_text(corpus, "en", (name,), root / f"{name}.jsonl")
        if folder == "base-data":
            words = ("--input", text, "--vocab-size", VOCABULARY, "--output", root / "tokenizer")
            command("tokenizer", "train", *words)
        words = ("--source", f"en={text}", "--tokenizer", root / "tokenizer")
        command("data", "prepare", *words, "--output", root / folder)


def tuned(root: Path, steps: int) -> dict[str, tuple[float, float, str]]:
    """Of every way: bits per character, the learning rate and the run, the best of those tried."""
    found = {}
    for name, (words, rates, _) in WAYS.items():
        tries = []
        for rate in rates:
            run = f"{name.split(',')[0]}-{rate}"
            settings = ("--optimizer.peak-lr", rate, "--optimizer.warmup-steps", 10)
            fixed = ("--init-from", root / "base", "--stages.new-rows-steps", 0)
            guard = ("--forgetting.sources", "[]")
            bits = train(root, run, "domain-data", steps, *fixed, *guard, *settings, *words)
            tries.append((bits, rate, run))
        found[name] = min(tries)
    return found


def main() -> int:
    """Prints the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="adapters against full tuning")
    parser.add_argument("corpus", nargs="?", type=Path, default=Path("../shared/corpus"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="a folder to keep the runs in")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=120)
    words = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = words.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(words.corpus, root)
        model = [word for name, value in SIZES.items() for word in (f"--model.{name}", value)]
        train(root, "base", "base-data", words.base_steps, *model)
        found = tuned(root, words.steps)
        before = metrics(root / found["full"][2])[0]["eval/bits_per_character"]
        lines = [f"| nothing (the base) | 0 | | {before:.4f} |"]
        for name, (bits, rate, run) in found.items():
            count = count_trained(llm_jax.load(root / run).config, WAYS[name][2])
            lines.append(f"| {name} | {count:,} | {rate:g} | {bits:.4f} |")
        adapted = llm_jax.load(root / found[ADAPTED][2])
        command("export", adapted.path, root / "exported")
        command("import", root / "exported", root / "merged", "--no-logits")
        ids = np.arange(200, dtype=np.int32).reshape(2, 100)
        apart = np.abs(adapted.logits(ids) - llm_jax.load(root / "merged").logits(ids)).max()
    head = [
        "| what is trained | parameters | learning rate | bits per character, end |",
        "|---|---|---|---|",
    ]
    bars = bars_of(before, found["full"][0], found[ADAPTED][0], adapted.config, float(apart))
    told = [f"{'met ' if met else 'MISSED'} {bar}" for bar, met in bars.items()]
    text = "\n".join(
        [*head, *lines, "", *told, "", "all bars met" if all(bars.values()) else "bars missed"]
    )
    print(text)
    if words.output:
        words.output.write_text(text + "\n")
    return 0 if all(bars.values()) else 1


def bars_of(
    before: float, full: float, lora: float, config: ModelConfig, apart: float
) -> dict[str, bool]:
    """What was promised, and whether it is so."""
    count = count_adapters(config)
    share, way = count / (count_params(config) - count), (before - lora) / (before - full)
    return {
        f"adapters have {share:.2%} of the parameters, under {MOST:.0%}": share < MOST,
        f"within {WITHIN:.0%} of full tuning: {lora / full - 1:+.2%}": lora <= full * (1 + WITHIN),
        f"{way:.0%} of the way from the base to full tuning, at least {WAY:.0%}": way >= WAY,
        f"merged and unmerged logits differ by {apart:.1e}, at most 1e-4": apart < 1e-4,
    }


if __name__ == "__main__":
    sys.exit(main())
