"""Stores adapters that PEFT made and saved, and what PEFT computes with them.

    python tools/make_adapter_goldens.py          needs torch, transformers and peft

Writes tests/golden/adapters/CASE/: adapter_config.json and adapter_model.safetensors as PEFT saves them,
and logits.npy of the last positions of a document. The models below are cases of
tests/model/family_cases.py, whose weights come from their names.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.model.family_cases import COMPARED, DOCUMENTS  # noqa: E402
from tools.make_family_goldens import their_model  # noqa: E402

# separate projections; fused ones in Conv1D with a rank of their own; fused by head, rank-stabilised
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "gpt2": {
        "r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True,
        "rank_pattern": {"c_attn": 3}, "alpha_pattern": {"mlp.c_proj": 5},
    },
    "gpt_neox": {
        "r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query_key_value", "dense"],
    },
}  # fmt: skip


def with_adapter(case: str, settings: dict[str, Any]) -> Any:
    """PEFT's model of a case, with an adapter whose A and B are both random."""
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return peft.get_peft_model(their_model(case), config).eval()


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of one document, [T, V]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()


def main() -> None:
    """Writes the folders."""
    for case, settings in SETTINGS.items():
        folder = ROOT / "tests" / "golden" / "adapters" / case
        model = with_adapter(case, settings)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        logits = their_logits(model, DOCUMENTS[0])[-COMPARED:]
        np.save(folder / "logits.npy", logits)
        print(case, f"logits of {logits.std():.2f}")


if __name__ == "__main__":
    main()
