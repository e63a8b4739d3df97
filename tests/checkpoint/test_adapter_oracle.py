"""Adapters against `peft`, live: ours load there and theirs load here, with equal logits, for every layout of names."""

import dataclasses

import numpy as np
import pytest

from llm_jax.checkpoint.adapter import write_adapter
from llm_jax.model import Lora, adapters_of, join
from tests.checkpoint.test_adapter import adapted, logits_of
from tests.model.family_cases import DOCUMENTS
from tests.model.test_family_goldens import model_of
from tests.tiny import drawn_params
from tools.make_adapter_goldens import their_logits, with_adapter
from tools.make_family_goldens import their_model

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

CASES = (
    "llama", "qwen2", "gemma2", "gpt2", "gptj", "gpt_neox", "gpt_bigcode", "gpt_bigcode-multi-head", "bloom",
    "falcon-7b", "falcon-40b", "mpt", "phi", "starcoder2", "stablelm", "cohere", "olmo2",
)  # fmt: skip
CONV = ("gpt2",)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_peft_with_equal_logits(case, stabilised, tmp_path):
    import peft

    family, config, params = model_of(case)
    lora = Lora(rank=3, alpha=4.0, rank_stabilised=stabilised)
    full = dataclasses.replace(config, lora=lora)
    adapters = adapters_of(drawn_params(full, seed=3))
    write_adapter(tmp_path, adapters["layers"], family, full)
    base = their_model(case)
    before = their_logits(base, DOCUMENTS[0])
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    after = their_logits(model, DOCUMENTS[0])
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max(), "the adapter does something"
    assert_close(logits_of(full, join(params, adapters), DOCUMENTS[0]), after)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_loads_here_with_equal_logits(case, tmp_path):
    model = with_adapter(
        case,
        {"r": 3, "lora_alpha": 4, "target_modules": "all-linear", "fan_in_fan_out": case in CONV},
    )
    model.save_pretrained(tmp_path)
    assert_close(
        logits_of(*adapted(case, tmp_path), DOCUMENTS[0]), their_logits(model, DOCUMENTS[0])
    )
