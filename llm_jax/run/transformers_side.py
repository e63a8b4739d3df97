"""The other side of the parity gate: transformers on the same folder, in float32 on the CPU.

Loaded only when asked for and installed; local files only, no code from the folder, no pickle. Its
warnings are its own business.
"""

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# eager attention of transformers 5.24 adds Falcon's ALiBi twice; the default of others cannot soft-cap
ATTENTION = {"falcon": "sdpa"}
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def missing(*packages: str) -> str:
    """Why the comparison cannot be made: the package that is not installed; "" if all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed" if absent else ""


class TheirError(Exception):
    """Whatever transformers or torch raised, in one line: `transformers cannot load it: Type: message`."""


@contextlib.contextmanager
def _quiet(doing: str = "run") -> Iterator[Any]:
    """transformers, with nothing but errors on the terminal. Raises TheirError for whatever it raises."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            import transformers

            transformers.utils.logging.disable_progress_bar()
            yield transformers
        except Exception as error:
            text = f"transformers cannot {doing} it: {type(error).__name__}: {error}"
            raise TheirError(" ".join(text.split())[:300]) from error
        finally:
            logging.disable(level)


class TheirTokenizer:
    """AutoTokenizer of a folder."""

    def __init__(self, folder: Path):
        """Loads it. Raises TheirError."""
        with _quiet("load") as transformers:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS or EOS."""
        with _quiet():
            return list(self._tokenizer.encode(text, add_special_tokens=False))

    def specials(self) -> dict[str, int | None]:
        """Ids of BOS, EOS and PAD."""
        t = self._tokenizer
        return {"bos": t.bos_token_id, "eos": t.eos_token_id, "pad": t.pad_token_id}

    def chat_template(self) -> str | None:
        """The template text, if there is one."""
        return self._tokenizer.chat_template


class TheirModel:
    """AutoModelForCausalLM of a folder, in float32."""

    def __init__(self, folder: Path, round_to: str = ""):
        """Loads it. Raises TheirError, as its methods do.

        `round_to`: a dtype that every parameter is rounded to first, as ours were.
        """
        import torch

        family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        with _quiet("load") as transformers:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=ATTENTION.get(family, "eager"),
                use_safetensors=True,
                output_loading_info=True,
                **LOCAL,
            )
        # a tensor that is missing is made at random, with no more than a warning
        self.missing = sorted(info["missing_keys"])
        self._model = model.eval()
        if round_to:
            kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[round_to]
            with torch.no_grad():
                for value in self._model.parameters():
                    value.copy_(value.to(kind).float())

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V] of one row."""
        import torch

        with _quiet(), torch.no_grad():
            return self._model(torch.tensor([list(ids)])).logits[0].float().numpy()

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` likeliest ids, with its KV cache as in generation."""
        import torch

        with _quiet() as transformers, torch.no_grad():
            # the folder's own may punish repetitions, or stop
            self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)
            row = torch.tensor([list(ids)])
            made = self._model.generate(
                row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=count
            )
        return made[0, len(ids) :].tolist()
