"""The front of every command: verbs, one-line errors, exit statuses.

0: done. 1: a bug, with a traceback. 2: something the user can fix, told in one line on stderr.
69: the same, but waiting may help: a host that is late. 75: training hung and its watchdog ended it.
130: stopped by Ctrl-C. `LLM_JAX_DEBUG=1` shows the traceback of user errors too.
"""

import argparse
import errno
import glob
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from llm_jax.config import nearest
from llm_jax.errors import ConfigError, UnavailableError, UserError

STOPPED = 130
YEAR = (
    31_536_000  # in seconds; libraries abort on times that do not fit into 64 bits of nanoseconds
)
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h

# verb -> (module in llm_jax.run, what it does); modules load only when called, so `--help` is instant
VERBS = {
    "demo": "raw text to a trained, measured, generating model in minutes, offline",
    "tokenizer": "train, extend, audit or compare tokenizers",
    "data": "raw text to token shards: clean, language, dedup, decontaminate, prepare, verify",
    "plan": "whether a run fits hardware that is not here, how long it takes, what it moves",
    "pretrain": "train a model from a config",
    "instruct": "tune a model on conversations from a config",
    "self-instruct": "instructions and answers, bootstrapped from seed tasks with a model or an endpoint",
    "eval": "perplexity, bits per byte and bits per character of a model",
    "generate": "continue prompts with a model",
    "chat": "talk with an instruction-tuned model",
    "import": "turn a Hugging Face model into ours, checked",
    "export": "write a model for transformers, checked",
    "replay": "do a step of a run again and compare it bit for bit",
    "report": "where a run's time went, and its curves, scores and samples as a page",
    "verify": "check that a model's files are what was saved",
    "supervise": "start a command again when it crashes, hangs or is preempted",
    "doctor": "check hosts, devices, versions, data and disk before a run",
}

# causes of an OSError that are the user's to mend
MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is a ConfigError: one line, with the nearest option."""

    def __init__(self, **settings: Any) -> None:
        # no abbreviations: `--model` must not pass for `--model.num-layers`
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError; argparse would print the usage and exit."""
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings]
            message += f"; {nearest(unknown[1].partition('=')[0], options)}"
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def seconds(text: str) -> float:
    """The type of a flag that is a time, 0 included; argparse adds the flag's name to what is wrong."""
    value = float(text)
    if not 0 <= value <= YEAR:  # nan is not, either
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to {YEAR:,} seconds (a year)")
    return value


def some_seconds(text: str) -> float:
    """The same without 0, in which nothing can happen."""
    value = seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 seconds")
    return value


def leave_out_absent_tpu() -> None:
    """Tells jax of no TPU where libtpu is installed without one, as it is for compiling ahead of time.

    Asked to start there, libtpu prints a page. With a plugin for GPUs jax must find out by itself.
    """
    found = any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
    if (
        importlib.util.find_spec("libtpu")
        and not found
        and not any(map(importlib.util.find_spec, plugins))
    ):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs a command's `main` on `argv` and returns the exit status."""
    # libraries speak up from WARNING on (jax and orbax log every look-up and save at INFO), we from INFO
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        # not `force`: orbax sets logging up when imported, but a test may listen as well
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("llm_jax").setLevel(logging.INFO)
    leave_out_absent_tpu()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get("LLM_JAX_DEBUG") == "1":
            raise
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        return UNAVAILABLE if isinstance(error, UnavailableError) else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # `llm-jax generate ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        # the machine, not the program: a disk that is full, a file one may not read
        if error.errno not in MACHINE or os.environ.get("LLM_JAX_DEBUG") == "1":
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # jax's JaxRuntimeError by its words: this file must not load jax
        if "RESOURCE_EXHAUSTED" not in str(error) or os.environ.get("LLM_JAX_DEBUG") == "1":
            raise
        first = str(error).splitlines()[0]
        print(
            f"error: not enough memory on the device: {first}; raise --step.micro-batches, lower "
            "--step.batch-size or --data.seq-len, set --model.remat full, or use more devices",
            file=sys.stderr,
        )
        return 2
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process with this status.

    After Ctrl-C without the interpreter's farewell: threads of libraries that were interrupted half-way
    hang or crash in it (seen with jax 0.10: one hang and one crash in ten runs).
    """
    if status != STOPPED:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def dispatch(argv: list[str]) -> None:
    """`llm-jax VERB ...`: hands the rest of the arguments to the verb's module."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
        print(
            "usage: llm-jax VERB ...\n\n" + "\n".join(lines) + "\n\nllm-jax VERB --help says more."
        )
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("llm-jax"))
        return
    if argv[0] not in VERBS:
        raise ConfigError(f"unknown command {argv[0]!r}; {nearest(argv[0], list(VERBS))}")
    module = argv[0].replace("-", "_")
    importlib.import_module(f"llm_jax.run.{module}").main(argv[1:])


def entry() -> None:
    """The console script `llm-jax`."""
    status = run(dispatch)
    if status == 130:
        # threads of jax may still compute; tearing the interpreter down under them ends in a segfault
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
