"""`llm-jax demo`: the main job on real text, offline, in minutes on two cores.

    1 train a tokenizer          2 prepare token shards        3 pretrain a few million parameters
    4 measure held-out text      5 continue prompts in English and Chinese

It runs the commands a user would type, and prints each before it runs: there is no other path
through the code than theirs, and its folder can be resumed, measured and looked into like any other.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from llm_jax import config as config_files
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, SourceWeight
from llm_jax.errors import ConfigError
from llm_jax.eval.windows import EvalConfig
from llm_jax.model import ModelConfig
from llm_jax.run import cli
from llm_jax.run import data as data_command
from llm_jax.run import eval as eval_command
from llm_jax.run import generate as generate_command
from llm_jax.run import pretrain as pretrain_command
from llm_jax.run import tokenizer as tokenizer_command
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.run.session import BEST_METRIC, SampleConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig

# 8 MB of documentation in three packages of the core; all installed packages would take minutes to read
ENGLISH = "en=package-docs:jax,numpy,scipy"
CHINESE = "zh=sample:zh"
# the Chinese sample is 60 times smaller: seen about five times, at this share of the tokens
SHARES = (SourceWeight(name="en", weight=0.8), SourceWeight(name="zh", weight=0.2))
PROMPTS = ("The function returns", "这是")


def demo_config(
    prepared: str, run: str, shares: tuple[SourceWeight, ...] = SHARES
) -> PretrainConfig:
    """3.7 million parameters, multi-query attention, seen through about 0.8 million tokens."""
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
            tied_embeddings=True,
        ),
        data=DataConfig(prepared=prepared, sources=shares, seq_len=256),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=30, weight_decay=0.1),
        step=StepConfig(batch_size=8),
        train=TrainConfig(steps=400, log_every_steps=10, sample_every_steps=200),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=100, best_metric=BEST_METRIC),
        eval=EvalConfig(max_tokens=40_000),
        samples=SampleConfig(prompts=PROMPTS),
    )


def main(argv: list[str]) -> None:
    """The command."""
    parser = cli.Parser(
        prog="llm-jax demo", description=__doc__.partition("\n")[0] if __doc__ else ""
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="PATH", help="your own text instead"
    )
    parser.add_argument(
        "--run", default="runs/demo", help="folder for everything (default: runs/demo)"
    )
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: 400)")
    options = parser.parse_args(argv)
    console = Console()
    root = Path(options.run)
    if (root / "tokenizer").exists():
        raise ConfigError(
            f"--run {options.run} holds a demo already; choose another folder, or remove it"
        )
    sources = options.text or [ENGLISH, CHINESE]
    config = demo_config(str(root / "data"), str(root / "run"), () if options.text else SHARES)
    if options.steps:
        config = config_files.override(config, ["--train.steps", str(options.steps)])
    begin = time.monotonic()

    def stage(title: str, command: Callable[[list[str]], None], *words: str) -> None:
        name = command.__module__.rpartition(".")[2]
        console.rule(f"{title}  ({time.monotonic() - begin:.0f} s)")
        console.print(
            f"$ llm-jax {name} {shlex.join(words)}",
            style="dim",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        command(list(words))

    specs = [word for spec in sources for word in ("--input", spec)]
    vocabulary = str(config.model.vocab_size)
    stage("1  tokenizer", tokenizer_command.main, "train", *specs, "--output", str(root / "tokenizer"),
          "--vocab-size", vocabulary, "--character-coverage", "0.9999")  # fmt: skip
    specs = [word for spec in sources for word in ("--source", spec)]
    stage("2  token shards", data_command.main, "prepare", *specs, "--tokenizer", str(root / "tokenizer"),
          "--output", str(root / "data"), "--holdout-fraction", "0.03")  # fmt: skip
    page = root / "pretrain.json"
    page.write_text(config_files.dumps(config), encoding="utf-8")
    stage("3  pretraining", pretrain_command.main, str(page))
    run = str(root / "run")
    stage("4  held-out text", eval_command.main, run, "--data", str(root / "data"), "--baselines")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    stage(
        "5  generation",
        generate_command.main,
        run,
        *prompts,
        "--max-new-tokens",
        "60",
        "--temperature",
        "0.7",
    )
    console.rule(f"done in {time.monotonic() - begin:.0f} s")
    console.print(
        f"run folder   {run}  (metrics.jsonl, samples/, checkpoints/)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"numbers      {run}/eval.json", highlight=False, soft_wrap=True)
    console.print(
        f"go on        llm-jax generate {run} --prompt '从前'", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
