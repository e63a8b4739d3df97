"""`llm-jax generate MODEL --prompt TEXT`: continues text with a model.

One prompt streams to the terminal as it is written; several come as labelled blocks when all are
done. MODEL is a run folder, one of its checkpoints, or an imported model folder.
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from llm_jax.errors import ConfigError, DataError
from llm_jax.run import cli

ENDINGS = {
    "eos": "end of document",
    "stop": "stop string",
    "length": "length limit; --max-new-tokens raises it",
}


def main(argv: list[str]) -> None:
    """Runs the command."""
    arguments = make_parser().parse_args(argv)
    prompts = list(arguments.prompt)
    for file in arguments.prompt_file:
        prompts.append(read_prompt(file))
    prompts = prompts or [""]

    from llm_jax import load
    from llm_jax.generate import SamplingConfig, generate, stream

    sampling = SamplingConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    model = load(arguments.model, arguments.step)
    parts = (model.params, model.config, model.tokenizer, prompts, sampling)
    console = Console(highlight=False, soft_wrap=True)
    if len(prompts) > 1:
        for number, (prompt, made) in enumerate(zip(prompts, generate(*parts), strict=True)):
            console.rule(f"prompt {number}: {ENDINGS[made.finished]}", align="left")
            console.print(Text.assemble((prompt, "bold"), made.text))
        return
    finished = "length"
    console.print(Text(prompts[0], "bold"), end="")
    for piece in stream(*parts):
        console.print(Text(piece.text), end="")
        console.file.flush()
        finished = piece.finished or finished
    console.print()
    if console.is_terminal:
        console.print(f"[{ENDINGS[finished]}]", style="dim", markup=False)


def make_parser() -> cli.Parser:
    """The options, with the defaults of `SamplingConfig`."""
    parser = cli.Parser(
        prog="llm-jax generate",
        description="continue text with a model; without a prompt, begin one",
    )
    add = parser.add_argument
    add("model", help="a run folder, one of its checkpoints, or an imported model folder")
    add("--step", type=int, default=-1, help="checkpoint of a run folder (default: the newest)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="one prompt, UTF-8")
    add("--max-new-tokens", type=int, default=128, help="most tokens added (default: 128)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest only; 0: all (default)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="draw from this share of probability (default: 0.95)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    return parser


def read_prompt(file: str) -> str:
    """The text of a prompt file. Raises ConfigError if it is missing, DataError if it is not UTF-8."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--prompt-file {file}: {error.strerror}; give a readable file") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompt-file {file}: not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from None


if __name__ == "__main__":
    cli.leave(cli.run(main))
