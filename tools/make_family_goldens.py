"""Stores what transformers computes for the tiny models of tests/model/family_cases.py.

    python tools/make_family_goldens.py          needs torch and transformers; about a minute

Writes tests/golden/families.json (config.json as saved, a digest of the tensors' names and shapes,
greedy tokens) and families.npz (logits of the last positions of each document). Weights are not
stored: they come from their names. Run it again when a case is added, and see that only that differs.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.model.family_cases import (  # noqa: E402
    CASES,
    COMPARED,
    DOCUMENTS,
    random_weight,
    tensor_digest,
)

# Eager attention of transformers 5.24 adds Falcon's ALiBi twice; the others' default cannot soft-cap.
IMPLEMENTATION = {"falcon": "sdpa"}
NEW_TOKENS = 12


def their_model(case: str) -> Any:
    """transformers' model of a case, its weights made from their names."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    family, settings = CASES[case]
    config = transformers.AutoConfig.for_model(family, **settings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)  # generation is not to stop
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=IMPLEMENTATION.get(family, "eager")
    )
    model = model.eval().float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(random_weight(saved_name(family, name), value.shape)))
    return model


def saved_name(family: str, name: str) -> str:
    """A parameter's name as transformers writes it to a file."""
    return name.replace("lm_head", "embed_out") if family == "gpt_neox" else name


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and the tensors that `save_pretrained` writes."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "model.safetensors")


def greedy(model: Any, prompt: np.ndarray, new: int) -> list[int]:
    """What `generate` appends to the prompt."""
    import torch

    ids = torch.from_numpy(prompt[None].astype(np.int64))
    out = model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def golden(case: str) -> tuple[dict[str, Any], np.ndarray]:
    """What is stored of a case: an entry of the JSON file, and logits [documents, COMPARED, V]."""
    import torch

    model = their_model(case)
    with tempfile.TemporaryDirectory() as folder:
        config, weights = saved(model, Path(folder))
    logits = []
    with torch.no_grad():
        for ids in sorted(DOCUMENTS, key=len):  # rising: dynamic RoPE of transformers remembers
            out = model(torch.from_numpy(ids[None].astype(np.int64))).logits
            logits.append((len(ids), out[0, -COMPARED:].numpy()))
    by_length = dict(logits)
    digest = tensor_digest({name: array.shape for name, array in weights.items()})
    tokens = greedy(their_model(case), DOCUMENTS[1], NEW_TOKENS)
    entry = {"config": config, "tensors": digest, "greedy": tokens}
    return entry, np.stack([by_length[len(ids)] for ids in DOCUMENTS])


def main() -> None:
    """Writes both files."""
    folder = ROOT / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    entries, logits = {}, {}
    for case in CASES:
        entries[case], logits[case] = golden(case)
        print(case, f"logits of {logits[case].std():.2f}")
    lines = [f" {json.dumps(case)}: {json.dumps(entry)}" for case, entry in entries.items()]
    (folder / "families.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    np.savez_compressed(folder / "families.npz", **logits)


if __name__ == "__main__":
    main()
