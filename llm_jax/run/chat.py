"""`llm-jax chat MODEL`: a conversation in the terminal, in the template that the model was tuned with.

One line of input is one turn; the answer streams as it is written and stays in the history. `/reset`
forgets the history, `/exit` or the end of input leaves. Piped input works the same, without prompts:

    printf '你好\\nAnd in English?\\n' | llm-jax chat runs/tuned
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_jax.errors import ConfigError
from llm_jax.run import cli

if TYPE_CHECKING:
    from llm_jax.api import Model
    from llm_jax.generate import SamplingConfig
    from llm_jax.instruct.masks import ChatEncoder

COMMANDS = ("/reset", "/exit")


def main(argv: list[str]) -> None:
    """Runs the command."""
    arguments = make_parser().parse_args(argv)

    from llm_jax import load
    from llm_jax.generate import SamplingConfig
    from llm_jax.run.eval_tasks import chat_of

    sampling = SamplingConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    model = load(arguments.model, arguments.step)
    talk = Talk(model, chat_of(model), sampling, arguments.system)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"template {talk.chat.template.name}; {' and '.join(COMMANDS)} are commands")
    for line in read_lines(at_terminal):
        if line == "/reset":
            talk.reset()
            continue
        for text in talk.answer(line):
            print(text, end="", flush=True)
        print(flush=True)


def read_lines(at_terminal: bool) -> Iterator[str]:
    """Turns of the user until `/exit` or the end of input; blank lines are no turns.

    Raises:
      ConfigError: an unknown command.
    """
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line.startswith("/") and line not in COMMANDS and line[1:].isalpha():
            told = f"{line}: no such command; known: {', '.join(COMMANDS)}"
            if not at_terminal:
                raise ConfigError(told)
            print(told)
        elif line:
            yield line


class Talk:
    """A conversation that goes on."""

    def __init__(
        self, model: "Model", chat: "ChatEncoder", sampling: "SamplingConfig", system: str = ""
    ) -> None:
        from llm_jax.instruct.conversations import Turn

        self.chat = chat
        self._model, self._sampling = model, sampling
        self._system = [Turn("system", system)] if system else []
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Forgets everything but the system turn."""
        self.turns = []

    def answer(self, text: str) -> Iterator[str]:
        """Streams the answer to one more turn; both join the history.

        Raises:
          ConfigError: the turn alone is longer than the model can read.
        """
        from llm_jax.generate import stream
        from llm_jax.instruct.conversations import Turn

        self.turns.append(Turn("user", text))
        model, said = self._model, []
        parts = (model.params, model.config, model.tokenizer, [self.prompt()], self._sampling)
        for piece in stream(*parts):
            said.append(piece.text)
            yield piece.text
        self.turns.append(Turn("assistant", "".join(said).strip()))

    def prompt(self) -> list[int]:
        """The ids to answer; the oldest exchanges are left out when they do not fit.

        Raises:
          ConfigError: the last turn alone does not fit.
        """
        limit = self._model.config.max_seq_len - self._sampling.max_new_tokens
        while True:
            ids = self.chat.prompt((*self._system, *self.turns))
            if len(ids) <= limit:
                return ids
            if len(self.turns) == 1:
                raise ConfigError(
                    f"a turn of {len(ids)} tokens and --max-new-tokens {self._sampling.max_new_tokens} are more "
                    f"than the {self._model.config.max_seq_len} that the model was trained for; lower either"
                )
            del self.turns[:2]


def make_parser() -> cli.Parser:
    """The options."""
    parser = cli.Parser(prog="llm-jax chat", description="talk with an instruction-tuned model")
    add = parser.add_argument
    add("model", help="a run folder, one of its checkpoints, or an imported model folder")
    add("--step", type=int, default=-1, help="checkpoint of a run folder (default: the newest)")
    add("--system", default="", metavar="TEXT", help="a system turn to begin with")
    add("--max-new-tokens", type=int, default=128, help="most tokens of an answer (128)")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest (0.7)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest only; 0: all (default)")
    add("--top-p", type=float, default=0.95, help="draw from this share of probability (0.95)")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    return parser


if __name__ == "__main__":
    cli.leave(cli.run(main))
