"""Shows what continued pretraining does: an English model carried to Chinese three ways at equal compute.

Run: .venv/bin/python tools/show_continuation.py [CORPUS] [--output tools/results/continuation.md]
     (CORPUS: default ../shared/corpus; some 12 minutes on two shared cores)
Expect: a table; the last line says "all bars met", exit status 0.

A model of 1.4 million parameters learns English, with 2 % Chinese in it, as every English base has seen
some. From it, on 60 % Chinese and 40 % English:

    base vocabulary     the English tokenizer; a Chinese character is three byte pieces
    extended, random    1,500 Chinese pieces, their rows drawn at random
    extended, default   the same pieces, their rows started by `--resize.init auto`

All through the commands a user types. The extended models make fewer steps, since a larger head costs
more: steps x tokens x flops_per_token is the same. Held-out documents are the same text for all.
Bars: the default start beats random at step 0 and at the end; English stays within the guard's bound;
the extended model reads at least 1.4 times the Chinese characters per second.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow

from llm_jax import config as config_files
from llm_jax.data.shards import open_prepared
from llm_jax.model import ModelConfig, count_params, flops_per_token
from llm_jax.run.pretrain import PretrainConfig

ENGLISH, CHINESE = ("python-docs", "postgresql-docs"), ("python-docs", "oi-wiki", "d2l")
CHARACTERS = 3000  # of each document: the first ones
VOCABULARY, NEW_PIECES, SEQ_LEN, ROWS = 2048, 1500, 256, 4
BOUND, SPEED = 0.05, 1.4
PROGRAM = "from llm_jax.run.cli import entry; entry()"  # what the script llm-jax holds
WAYS = ("base vocabulary", "extended, random", "extended, default")


def write_text(corpus: Path, language: str, names: tuple[str, ...], out: Path) -> Path:
    """One document a line, cut."""
    with out.open("w", encoding="utf-8") as file:
        for name in names:
            path = str(corpus / f"{language}-{name}.jsonl.gz")
            with pyarrow.input_stream(path, compression="gzip") as stream:
                for line in stream.read().splitlines():
                    text = json.loads(line)["text"][:CHARACTERS]
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return out


def command(verb: str, *words: object) -> float:
    """Runs `llm-jax VERB WORDS` and returns its CPU seconds."""
    texts = [str(word) for word in words]
    print("$ llm-jax", verb, shlex.join(texts), flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", PROGRAM, verb, *texts], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def common(steps: int, every: int) -> list[object]:
    """What all runs share."""
    words = {
        "data.seq-len": SEQ_LEN, "step.batch-size": ROWS, "step.micro-batches": 1, "train.steps": steps,
        "train.eval-every-steps": every, "train.sample-every-steps": 0, "train.log-every-steps": 10,
        "eval.max-documents": 6, "eval.max-tokens": 0, "checkpoint.save-every-steps": 1000,
    }  # fmt: skip
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def shares(chinese: float) -> str:
    """A mixture by its share of Chinese."""
    english = {"name": "en", "weight": round(1 - chinese, 2)}
    return json.dumps([english, {"name": "zh", "weight": chinese}])


def train_english(root: Path, steps: int) -> float:
    """The base model, in `root/english`; its CPU seconds."""
    sizes = {
        "vocab-size": VOCABULARY, "embed-dim": 128, "num-layers": 4, "num-heads": 4, "num-kv-heads": 4,
        "head-dim": 32, "mlp-dim": 384, "max-seq-len": SEQ_LEN,
    }  # fmt: skip
    model = [word for name, value in sizes.items() for word in (f"--model.{name}", value)]
    sources = ["--data.sources", shares(0.02), "--data.prepared", root / "data-base"]
    page = "configs/demo.py"
    return command(
        "pretrain", page, "--run", root / "english", *sources, *model, *common(steps, steps)
    )


def carry(root: Path, way: str, steps: int) -> float:
    """One of the three, in `root/WAY`; its CPU seconds."""
    data = "data-base" if way == WAYS[0] else "data-extended"
    words: list[object] = ["configs/continue_zh.py", "--init-from", root / "english"]
    words += ["--run", root / way, "--data.prepared", root / data, *common(steps, steps // 4)]
    words += ["--optimizer.peak-lr", 7e-4, "--optimizer.warmup-steps", 20]
    words += ["--data.sources", shares(0.6)]
    alone = 0 if way == WAYS[0] else steps // 8
    words += ["--stages.new-rows-steps", alone, "--stages.new-rows-lr", 3e-3]
    words += ["--stages.new-rows-warmup-steps", 5, "--forgetting.max-increase", BOUND]
    if way != WAYS[2]:  # these are to be compared at the end, whatever they forget
        words += ["--forgetting.sources", "[]"]
    if way == WAYS[1]:
        words += ["--resize.init", "random"]
    return command("pretrain", *words)


@dataclasses.dataclass
class Result:
    """What a run's files say."""

    parameters: int
    steps: int
    cpu_seconds: float
    start: dict[str, float]  # bits per character by source, at step 0
    end: dict[str, float]
    tokens_per_second: float  # median, by the clock
    characters_per_token: float  # of Chinese held-out text

    @property
    def speed(self) -> float:
        """Chinese characters per second in training."""
        return self.tokens_per_second * self.characters_per_token


def result_of(root: Path, way: str, seconds: float) -> Result:
    """Reads config.json, metrics.jsonl and the prepared data's counts."""
    run = root / way
    config = config_files.load(run / "config.json", PretrainConfig)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/zh/bits_per_character" in row]
    bits = [{s: row[f"eval/{s}/bits_per_character"] for s in ("zh", "en")} for row in evaluated]
    split = open_prepared(config.data.prepared).sources["zh"]["heldout"]
    tokens = sum(len(split.document(i)) - 2 for i in range(split.num_documents))
    return Result(
        parameters=count_params(config.model),
        steps=evaluated[-1]["step"],
        cpu_seconds=seconds,
        start=bits[0],
        end=bits[-1],
        tokens_per_second=statistics.median(
            row["tokens_per_second"] for row in rows if "tokens_per_second" in row
        ),
        characters_per_token=int(split.document_characters.sum()) / tokens,
    )


def model_of(run: Path) -> ModelConfig:
    """The model that a run trained."""
    return config_files.load(run / "config.json", PretrainConfig).model


def report(root: Path, results: dict[str, Result], base_steps: int, base_seconds: float) -> str:
    """Markdown: what was done, and the tables."""
    events = map(json.loads, (root / WAYS[2] / "events.jsonl").read_text().splitlines())
    facts = next(event for event in events if event["event"] == "continuation")
    scores = facts["bits_per_character"]
    base = scores["base"]
    lines = [
        "# From an English model to a Chinese one, measured",
        "",
        "Command: `.venv/bin/python tools/show_continuation.py`, on two CPU cores shared with other jobs.",
        "",
        f"Base: {count_params(model_of(root / 'english')):,} parameters, {base_steps} steps of "
        f"{SEQ_LEN * ROWS:,} tokens, 98 % English ({base_seconds:,.0f} CPU seconds), vocabulary {VOCABULARY:,}. "
        f"Extended by {NEW_PIECES:,} pieces. Then 60 % Chinese and 40 % English tokens at equal compute.",
        "",
        "| | parameters | steps | Chinese, step 0 | Chinese, end | English, step 0 | English, end | "
        "Chinese characters per token | Chinese characters per second | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way, r in results.items():
        lines.append(
            f"| {way} | {r.parameters:,} | {r.steps} | {r.start['zh']:.3f} | {r.end['zh']:.3f} | "
            f"{r.start['en']:.3f} | {r.end['en']:.3f} | {r.characters_per_token:.3f} | {r.speed:,.0f} | "
            f"{r.cpu_seconds:,.0f} |"
        )
    lines += [
        "",
        "Bits per character are of held-out documents, the same for all; the base model itself has "
        f"{base['zh']:.3f} and {base['en']:.3f}.",
        "",
        "How new rows may start, bits per character before the first step (`--resize.init auto` took "
        f"`{facts['init']}`):",
        "",
        "| | " + " | ".join(scores) + " |",
        "|---" * (len(scores) + 1) + "|",
    ]
    for source, name in (("zh", "Chinese"), ("en", "English")):
        shown = " | ".join(f"{by_source[source]:.3f}" for by_source in scores.values())
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def missed(results: dict[str, Result]) -> list[str]:
    """The bars that were not met."""
    base, random, default = (results[way] for way in WAYS)
    found = []
    for when, ours, theirs in (
        ("step 0", default.start, random.start),
        ("the end", default.end, random.end),
    ):
        if ours["zh"] >= theirs["zh"]:
            found.append(
                f"at {when} the default start has {ours['zh']:.3f}, random {theirs['zh']:.3f}"
            )
    if default.end["en"] > base.start["en"] * (1 + BOUND):
        found.append(f"English got worse from {base.start['en']:.3f} to {default.end['en']:.3f}")
    if default.speed < SPEED * base.speed:
        found.append(f"{default.speed / base.speed:.2f}x the characters per second, not {SPEED}x")
    return found


def prepare(corpus: Path, root: Path) -> None:
    """Text, both tokenizers, and token shards of each."""
    text: dict[str, Any] = {
        "en": write_text(corpus, "en", ENGLISH, root / "en.jsonl"),
        "zh": write_text(corpus, "zh", CHINESE, root / "zh.jsonl"),
    }
    old, new = root / "tokenizer", root / "extended"
    command(
        "tokenizer", "train", "--input", f"en={text['en']}", "--output", old, "--vocab-size", VOCABULARY
    )  # fmt: skip
    command(
        "tokenizer", "extend", old, "--input", f"zh={text['zh']}", "--add-pieces", NEW_PIECES,
        "--output", new,
    )  # fmt: skip
    sources = [word for name, path in text.items() for word in ("--source", f"{name}={path}")]
    for tokenizer, data in ((old, "data-base"), (new, "data-extended")):
        command(
            "data", "prepare", *sources, "--tokenizer", tokenizer, "--output", root / data,
            "--holdout-fraction", 0.02,
        )  # fmt: skip


def main() -> int:
    """Makes everything in a folder that is removed afterwards, or in --folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", nargs="?", type=Path, default=Path("../shared/corpus"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="keep everything here, and use what is there")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=240)
    words = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = words.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (root / "data-extended").exists():
            root.mkdir(exist_ok=True, parents=True)
            prepare(words.corpus, root)
        base_seconds = train_english(root, words.base_steps)
        model = model_of(root / "english")
        wide = dataclasses.replace(model, vocab_size=-(-(VOCABULARY + NEW_PIECES) // 128) * 128)
        ratio = flops_per_token(model, SEQ_LEN) / flops_per_token(wide, SEQ_LEN)
        results = {}
        for way in WAYS:
            steps = words.steps if way == WAYS[0] else round(words.steps * ratio)
            results[way] = result_of(root, way, carry(root, way, steps))
        table = report(root, results, words.base_steps, base_seconds)
    print(table)
    if words.output:
        words.output.write_text(table, encoding="utf-8")
    wrong = missed(results)
    print("\n".join(wrong) or "all bars met")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
