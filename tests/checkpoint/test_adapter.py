"""Adapters of PEFT against what PEFT computed, stored by tools/make_adapter_goldens.py; and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, read_adapter, to_peft, write_adapter
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.model import PROJECTIONS, Lora, forward, join, merge
from tests.model.family_cases import COMPARED, DOCUMENTS
from tests.model.test_family_goldens import TOLERANCE, model_of
from tests.tiny import drawn_params

GOLDEN = Path(__file__).parent.parent / "golden" / "adapters"
jitted_forward = jax.jit(forward, static_argnames="config")


def adapted(case, folder):
    """(config, params) of a case with the adapter of a folder on it."""
    family, config, params = model_of(case)
    lora, layers = read_adapter(folder, family, config)
    return dataclasses.replace(config, lora=lora), join(params, {"layers": layers})


def logits_of(config, params, ids):
    tokens = ids[None]
    positions = np.arange(len(ids), dtype=np.int32)[None]
    return np.asarray(jitted_forward(params, config, tokens, positions, np.ones_like(tokens))[0][0])


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_that_peft_saved_computes_what_peft_computed(case):
    config, params = adapted(case, GOLDEN / case)
    wanted = np.load(GOLDEN / case / "logits.npy")
    largest = np.abs(wanted).max()
    got = logits_of(config, params, DOCUMENTS[0])[-COMPARED:]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * largest)
    plain = logits_of(*model_of(case)[1:], DOCUMENTS[0])[-COMPARED:]
    assert np.abs(plain - wanted).max() > 0.1 * largest, "the adapter does something"
    merged, bare = merge(params, config)
    np.testing.assert_allclose(logits_of(bare, merged, DOCUMENTS[0])[-COMPARED:], got, atol=2e-5)


def test_what_peft_saved_of_separate_projections_comes_back_bit_for_bit(tmp_path):
    family, config, _ = model_of("llama")
    lora, layers = read_adapter(GOLDEN / "llama", family, config)
    assert (lora.rank, lora.alpha, lora.rank_stabilised) == (2, 6.0, False)
    assert lora.targets == PROJECTIONS
    write_adapter(tmp_path, layers, family, dataclasses.replace(config, lora=lora))
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(GOLDEN / "llama" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def products(lora, layers):
    """scale A B of every projection."""
    found = {}
    for group, part in layers.items():
        for name in part:
            target, _, letter = name.rpartition("_lora_")
            if letter == "a":
                a, b = part[name], part[f"{target}_lora_b"]
                flat = a.reshape(len(a), -1, a.shape[-1]) @ b.reshape(len(b), b.shape[1], -1)
                found[group, target] = lora.scale * flat
    return found


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("targets", [("query", "value"), ("key", "out", "up"), PROJECTIONS])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "falcon-40b"])
def test_ours_written_and_read_again_has_the_same_products(case, targets, stabilised, tmp_path):
    """Fused layouts get a pair of three times the rank, or twice where q and v alone have one."""
    family, config, _ = model_of(case)
    lora = Lora(rank=3, alpha=5.0, rank_stabilised=stabilised, targets=targets)
    full = dataclasses.replace(config, lora=lora)
    layers = {
        group: {name: x for name, x in part.items() if "_lora_" in name}
        for group, part in drawn_params(full)["layers"].items()
        if group in ("attention", "mlp")
    }
    write_adapter(tmp_path, layers, family, full)
    ours, again = products(lora, layers), products(*read_adapter(tmp_path, family, config))
    for key, product in ours.items():
        np.testing.assert_allclose(again.pop(key), product, rtol=1e-5, atol=1e-7)
    assert not any(product.any() for product in again.values()), "parts without an adapter have 0"
    fused = {name: rank for name, rank in to_peft(layers, family, full)[0]["rank_pattern"].items()}
    parts = len({"query", "key", "value"} & set(targets))
    assert all(rank == 3 * parts for rank in fused.values())
    assert bool(fused) == (case != "llama" and parts > 1)


@pytest.fixture
def folder(tmp_path):
    """A copy of PEFT's Llama adapter to spoil, and how to read it."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' must be 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported; merge the adapter in PEFT"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"new_idea": 3}, "new_idea=3 is not supported"),
        ({"bias": "all"}, "bias='all' must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the weights below"),
        ({"lora_alpha": -1}, "lora_alpha and alpha_pattern must be numbers above 0"),
        ({"alpha_pattern": {"^q.*": 3}}, "must map names of modules to numbers"),
    ],
)
def test_a_setting_that_ours_cannot_follow_is_refused_by_name(folder, change, message):
    said = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps({**said, **change}))
    family, config, _ = model_of("llama")
    with pytest.raises(ConfigError, match=message):
        read_adapter(folder, family, config)


Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(Q0), "layers.0.self_attn.q_proj needs lora_A and lora_B"),
        (lambda t: t.pop(Q0) is t.pop(Q0.replace("A.", "B.")), "q_proj has no adapter, though other layers"),
        (lambda t: t.update({Q0: t[Q0][:, :5].copy()}), r"lora_A \[2, 5\] and lora_B \[32, 2\] of .* do not fit"),
        (lambda t: t.update({Q0: t[Q0].astype(np.int32)}), "is int32; it must be floating"),
        (
            lambda t: t.update({Q0.replace("q_proj", "c_attn"): t[Q0]}),
            "c_attn.lora_A.weight is no adapter of a projection of this llama model",
        ),
        (lambda t: t.clear(), "holds no adapter"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_model_are_refused_by_name(folder, spoil, message):
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / WEIGHTS)
    family, config, _ = model_of("llama")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, family, config)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    family, config, _ = model_of("llama")
    with pytest.raises(CheckpointError, match="has no adapter_config"):
        read_adapter(tmp_path, family, config)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="pickle files are never read"):
        read_adapter(tmp_path, family, config)
