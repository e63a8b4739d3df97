"""`llm-jax demo`: the main job on real text, offline, in minutes on two cores.

    1 train a tokenizer          2 prepare token shards        3 pretrain a few million parameters
    4 measure held-out text      5 continue prompts in English and Chinese

and with its own text, the short form of carrying a model to Chinese:

    6 put Chinese pieces behind the vocabulary      7 prepare the same text in it
    8 go on: new rows alone, then everything, while a guard watches English
    9 measure the same held-out text, and compare

and of tuning it on instructions, with 84 small dialogues about programming in both languages:

    10 dialogues to token shards     11 tune on their answers, and ask it something

It runs the commands a user would type, and prints each before it runs: there is no other path
through the code than theirs, and its folder can be resumed, measured and looked into like any other.
"""

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from llm_jax import config as config_files
from llm_jax.checkpoint.run_folder import steps_in
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, SourceWeight
from llm_jax.data.sources import SAMPLES
from llm_jax.errors import ConfigError
from llm_jax.eval.windows import EvalConfig
from llm_jax.model import ModelConfig
from llm_jax.run import cli
from llm_jax.run import data as data_command
from llm_jax.run import eval as eval_command
from llm_jax.run import generate as generate_command
from llm_jax.run import instruct as instruct_command
from llm_jax.run import pretrain as pretrain_command
from llm_jax.run import tokenizer as tokenizer_command
from llm_jax.run.hooks import say
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import BEST_METRIC, SampleConfig
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import ForgettingConfig, OptimizerConfig, StageConfig, StepConfig, TrainConfig

# 8 MB of documentation in three packages of the core; all installed packages would take minutes to read
ENGLISH = "en=package-docs:jax,numpy,scipy"
CHINESE = "zh=sample:zh"
# the Chinese sample is 60 times smaller: seen about five times, at this share of the tokens
SHARES = (SourceWeight(name="en", weight=0.8), SourceWeight(name="zh", weight=0.2))
PROMPTS = ("The function returns", "这是")
# carried to Chinese: pieces of several characters, and text that is mostly Chinese
NEW_PIECES, CARRY_STEPS = 500, 80
CARRIED_SHARES = (SourceWeight(name="en", weight=0.4), SourceWeight(name="zh", weight=0.6))
HOLDOUT = ("--holdout-fraction", "0.03")
TUNE_STEPS = 100  # some thirty times every dialogue
QUESTIONS = ("What is an array?", "函数没有 return 语句时返回什么？")  # of those it is tuned on
COMMANDS = {
    "tokenizer": tokenizer_command.main,
    "data": data_command.main,
    "pretrain": pretrain_command.main,
    "eval": eval_command.main,
    "generate": generate_command.main,
    "instruct": instruct_command.main,
}


def demo_config(
    prepared: str, run: str, shares: tuple[SourceWeight, ...] = SHARES
) -> PretrainConfig:
    """4.7 million parameters, multi-query attention, trained on 0.6 million tokens."""
    return PretrainConfig(
        run=run,
        model=ModelConfig(
            vocab_size=4096,
            embed_dim=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=1,
            head_dim=64,
            mlp_dim=640,
            max_seq_len=256,
        ),
        data=DataConfig(prepared=prepared, sources=shares, seq_len=256),
        optimizer=OptimizerConfig(peak_lr=3e-3, final_lr_fraction=0.03, warmup_steps=40),
        step=StepConfig(batch_size=4),
        train=TrainConfig(steps=600, log_every_steps=20, sample_every_steps=250),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=200, best_metric=BEST_METRIC),
        eval=EvalConfig(max_tokens=20_000),
        samples=SampleConfig(prompts=PROMPTS),
    )


def carry_config(base: PretrainConfig, prepared: str, run: str, steps: int) -> PretrainConfig:
    """What `configs/continue_zh.py` does, to the model that `base` trains, in `steps` updates."""
    return PretrainConfig(
        run=run,
        init_from=base.run,
        data=replace(base.data, prepared=prepared, sources=CARRIED_SHARES),
        stages=StageConfig(
            new_rows_steps=3 * steps // 8, new_rows_lr=3e-3, new_rows_warmup_steps=5
        ),
        optimizer=OptimizerConfig(peak_lr=5e-4, final_lr_fraction=0.03, warmup_steps=10),
        forgetting=ForgettingConfig(sources=("en",), max_increase=0.05),
        step=base.step,
        train=TrainConfig(steps=steps, log_every_steps=20, eval_every_steps=steps // 2),
        mesh=base.mesh,
        checkpoint=base.checkpoint,
        # five starts are measured before the first step
        eval=replace(base.eval, max_tokens=4_000),
    )


def tune_config(base: PretrainConfig, prepared: str, run: str, steps: int) -> InstructConfig:
    """What `configs/instruct_demo.py` does, to the model that `base` trains, in `steps` updates."""
    return InstructConfig(
        run=run,
        init_from=base.run,
        data=DataConfig(prepared=prepared, seq_len=base.data.seq_len, packing="whole"),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=10, weight_decay=0.0),
        step=base.step,
        train=TrainConfig(steps=steps, log_every_steps=20, sample_every_steps=steps),
        mesh=base.mesh,
        checkpoint=base.checkpoint,
        samples=SampleConfig(prompts=QUESTIONS, temperature=0.0),
    )


class Stage(NamedTuple):
    """One command of the demo, as a user would type it."""

    title: str
    verb: str
    words: list[str]
    makes: str = (
        ""  # a folder that appears when the command is done; the demo then need not repeat it
    )
    trains: PretrainConfig | InstructConfig | None = None  # the run that is to be finished


def settle(root: Path, settings: dict[str, Any]) -> None:
    """Makes the demo's folder, or checks that what is there is a demo of the same settings, to go on with.

    Raises:
      ConfigError: the folder holds something else.
    """
    note = root / "demo.json"
    try:
        begun = (root / "tokenizer").exists()  # before that, nothing was made that settings decide
        if begun and not (note.exists() and json.loads(note.read_bytes()) == settings):
            raise ConfigError(
                f"--run {root}: holds a demo with other settings; choose another folder, or remove it"
            )
        if root.exists() and not note.exists() and any(root.iterdir()):
            raise ConfigError(f"--run {root}: holds something else; choose another folder")
        root.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--run {root}: cannot be used: {error.strerror}; choose another folder"
        ) from None


def stages(root: Path, sources: list[str], config: PretrainConfig) -> list[Stage]:
    """The five commands, from raw text to generated text, all inside the folder `root`."""
    tokenizer, prepared, run = str(root / "tokenizer"), config.data.prepared, config.run
    specs = [word for source in sources for word in ("--source", source)]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    train = ["train", "--input", *sources, "--output", tokenizer]
    # coverage: the Chinese sample is a small part of all text, and its rarer characters would be bytes
    train += ["--vocab-size", str(config.model.vocab_size), "--character-coverage", "0.9999"]
    prepare = ["prepare", *specs, "--tokenizer", tokenizer, "--output", prepared, *HOLDOUT]
    generate = [run, *prompts, "--max-new-tokens", "60", "--temperature", "0.7"]
    return [
        Stage("1  train a tokenizer", "tokenizer", train, f"{tokenizer}/tokenizer.model"),
        Stage("2  prepare token shards", "data", prepare, prepared),
        Stage("3  pretrain", "pretrain", [str(root / "pretrain.json")], trains=config),
        Stage("4  measure held-out text", "eval", [run, "--data", prepared, "--baselines"]),
        Stage("5  generate", "generate", generate),
    ]


def carry_stages(
    root: Path, sources: list[str], carried: PretrainConfig, new_pieces: int
) -> list[Stage]:
    """The four commands that carry the model in the folder `root` to Chinese.

    Args:
      root: of a demo whose five commands are done.
      sources: as for `stages`: en=... and zh=...
      carried: the continued run.
      new_pieces: behind the vocabulary.
    """
    tokenizer, prepared, run = str(root / "tokenizer-zh"), carried.data.prepared, carried.run
    english, chinese = sources
    specs = [word for source in sources for word in ("--source", source)]
    extend = ["extend", str(root / "tokenizer"), "--input", chinese, "--keep", english]
    extend += ["--add-pieces", str(new_pieces), "--output", tokenizer]
    prepare = ["prepare", *specs, "--tokenizer", tokenizer, "--output", prepared, *HOLDOUT]
    go_on = [str(root / "carry.json"), "--init-from", carried.init_from]
    return [
        Stage("6  extend the vocabulary", "tokenizer", extend, tokenizer),
        Stage("7  prepare the same text in it", "data", prepare, prepared),
        Stage("8  go on, in Chinese", "pretrain", go_on, trains=carried),
        Stage("9  measure the same held-out text", "eval", [run, "--data", prepared]),
    ]


def tune_stages(root: Path, tuned: InstructConfig) -> list[Stage]:
    """The two commands that tune the carried model in the folder `root` on dialogues."""
    prepare = ["conversations", "--tokenizer", str(Path(tuned.init_from) / "tokenizer")]
    prepare += ["--source", f"talk={SAMPLES / 'talks.jsonl'}", "--holdout-fraction", "0.1"]
    prepare += ["--seq-len", str(tuned.data.seq_len), "--output", tuned.data.prepared]
    tune = [str(root / "tune.json"), "--init-from", tuned.init_from]
    return [
        Stage("10  dialogues to token shards", "data", prepare, tuned.data.prepared),
        Stage("11  tune on their answers", "instruct", tune, trains=tuned),
    ]


def perform(todo: list[Stage], console: Console, begin: float) -> bool:
    """Prints and runs the commands in order; False if training was stopped, which said so itself."""
    for stage in todo:
        console.rule(f"[bold]{stage.title}[/]  ({time.monotonic() - begin:.0f} s)")
        typed = f"$ llm-jax {stage.verb} {shlex.join(stage.words)}"
        console.print(typed, style="dim", highlight=False, markup=False, soft_wrap=True)
        if stage.makes and Path(stage.makes).exists():
            console.print("done before")
            continue
        COMMANDS[stage.verb](stage.words)
        trained = stage.trains
        if trained and max(steps_in(Path(trained.run) / "checkpoints")) < trained.train.steps:
            return False
    return True


def comparison(before: Path, after: Path) -> Table:
    """Two runs' `eval.json` of the same held-out text, side by side."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("source", "bits/char before", "after", "chars/token before", "after"):
        table.add_column(column, justify="left" if column == "source" else "right")
    old, new = (json.loads((run / "eval.json").read_bytes())["results"] for run in (before, after))
    for source in ("en", "zh"):
        pair = old[source], new[source]
        bits = [f"{score['bits_per_character']:.3f}" for score in pair]
        rates = [score["characters"] / score["tokens"] for score in pair]
        table.add_row(source, *bits, *(f"{rate:.3f}" for rate in rates))
    return table


def main(argv: list[str]) -> None:
    """The command."""
    parser = cli.Parser(
        prog="llm-jax demo", description="Raw text to a trained, measured, generating model."
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="PATH",
        help="your own text instead, in the first five steps alone (repeatable)",
    )
    parser.add_argument(
        "--run", default="runs/demo", help="folder for everything (default: runs/demo)"
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")
    options = parser.parse_args(argv)
    root = Path(options.run)
    config = demo_config(str(root / "data"), str(root / "run"), () if options.text else SHARES)
    config = config_files.override(config, ["--train.steps", str(options.steps)])
    sources = options.text or [ENGLISH, CHINESE]
    if options.text:
        play(root, sources, config)
        return
    carried = carry_config(config, str(root / "data-zh"), str(root / "run-zh"), CARRY_STEPS)
    tuned = tune_config(carried, str(root / "data-talk"), str(root / "run-talk"), TUNE_STEPS)
    play(root, sources, config, carried, tuned)


def play(
    root: Path,
    sources: list[str],
    config: PretrainConfig,
    carried: PretrainConfig | None = None,
    tuned: InstructConfig | None = None,
    new_pieces: int = NEW_PIECES,
) -> None:
    """The demo in the folder `root`: its first five commands, and those of `carried` and `tuned`."""
    runs: dict[str, PretrainConfig | InstructConfig] = {"pretrain": config}
    runs |= {"carry": carried} if carried else {}
    runs |= {"tune": tuned} if tuned else {}
    settle(root, {"sources": sources} | {n: config_files.to_dict(run) for n, run in runs.items()})
    for name, run in runs.items():
        (root / f"{name}.json").write_text(config_files.dumps(run), encoding="utf-8")

    console, begin = Console(), time.monotonic()
    if not perform(stages(root, sources, config), console, begin):
        return
    if carried:
        if not perform(carry_stages(root, sources, carried, new_pieces), console, begin):
            return
        console.print(comparison(Path(config.run), Path(carried.run)))
    if tuned:
        if not perform(tune_stages(root, tuned), console, begin):
            return
        say(console, latest_sample(Path(tuned.run)))
    console.rule(f"[bold]done[/] in {time.monotonic() - begin:.0f} s")
    last = list(runs.values())[-1].run
    folders = "   ".join(run.run for run in runs.values())
    say(
        console,
        f"run folder  {folders}   (config.json, metrics.jsonl, samples/, checkpoints/, tokenizer/)",
    )
    say(console, f"numbers     {(carried or config).run}/eval.json")
    verb = f"chat {last}" if tuned else f"generate {last} --prompt '从前'"
    say(console, f"go on with  llm-jax {verb}")


def latest_sample(run: Path) -> str:
    """What the model last wrote after each of its prompts."""
    return sorted((run / "samples").glob("*.txt"))[-1].read_text(encoding="utf-8")


if __name__ == "__main__":
    cli.leave(cli.run(main))
