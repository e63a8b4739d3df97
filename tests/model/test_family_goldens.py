"""Every family against what transformers computed, stored by tools/make_family_goldens.py; no torch."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import names
from llm_jax.model import families, forward, init_cache
from tests.model.family_cases import (
    CASES,
    COMPARED,
    DOCUMENTS,
    as_params,
    random_weight,
    tensor_digest,
)

# of the largest logit; 1e-4 would hardly tell the two forms of GELU apart (1.5e-4 to 6e-4)
TOLERANCE = 2e-5
GOLDEN = Path(__file__).parent.parent / "golden"
ENTRIES = json.loads((GOLDEN / "families.json").read_text(encoding="utf-8"))
jitted_forward = jax.jit(forward, static_argnames="config")

# computed in the default run: of each family the model with most switches on, and what no other has
SOON = {
    "llama", "llama-dynamic-long", "llama-longrope-long", "llama-yarn-fields", "mistral", "qwen2-window",
    "qwen3", "gpt2", "gpt_neox", "gemma", "gemma2", "gemma3_text-scaled-capped", "bloom", "falcon-7b",
    "falcon-40b", "falcon-rw", "mpt-clipped-scaled", "gptj", "gpt_bigcode", "olmo2", "phi-qk-norm",
    "stablelm-parallel-qk-norm", "starcoder2", "cohere-qk-norm", "granite",
}  # fmt: skip
computed = pytest.mark.parametrize(
    "case", [c if c in SOON else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)


def model_of(case):
    """(family, config, params) from the stored config.json and the names of its tensors."""
    family, config = families.read(ENTRIES[case]["config"])
    weights = {t.name: random_weight(t.name, t.shape) for t in names.tensors(family, config)}
    params, left = as_params(family, config, weights)
    assert not left
    if not config.local.window:  # dense scores compile fastest; windows go through the tiles
        config = dataclasses.replace(config, attention="reference")
    return family, config, params


def packed():
    """Tokens, positions and segments of the documents: one in a row, and two in another."""
    rows = ([DOCUMENTS[0]], DOCUMENTS[1:])
    tokens = np.stack([np.concatenate(row) for row in rows])
    positions = np.stack([np.concatenate([np.arange(len(d)) for d in row]) for row in rows])
    segments = np.stack(
        [np.concatenate([np.full(len(d), n) for n, d in enumerate(row, 1)]) for row in rows]
    )
    return tokens, positions.astype(np.int32), segments.astype(np.int32)


def test_the_goldens_are_of_the_cases():
    assert list(ENTRIES) == list(CASES)
    assert set(families.FAMILIES) == {CASES[case][0] for case in SOON}


@computed
def test_packed_documents_have_the_logits_that_transformers_gives_each_alone(case):
    _, config, params = model_of(case)
    logits = np.asarray(jitted_forward(params, config, *packed())[0])
    with np.load(GOLDEN / "families.npz") as stored:
        wanted = stored[case]
    ends = [(0, 19), (1, 8), (1, 19)]
    for (row, end), theirs in zip(ends, wanted, strict=True):
        ours = logits[row, end - COMPARED : end]
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < TOLERANCE


@pytest.mark.parametrize("case", ["gemma3_text-scaled-capped", "falcon-40b", "llama-dynamic-long"])
def test_cached_greedy_decoding_gives_the_tokens_of_transformers(case):
    _, config, params = model_of(case)
    cache, drawn = init_cache(config, 1, 24), []
    prompt, wanted = DOCUMENTS[1].tolist(), ENTRIES[case]["greedy"]
    if config.rope_scaling.kind == "dynamic":  # keys of a prompt share its length
        step, prompt = np.array([prompt]), []
    else:  # id by id from the start: one program to compile
        step, prompt = np.array([prompt[:1]]), prompt[1:]
    place = 0
    while len(drawn) < len(wanted):
        positions = place + np.arange(step.shape[1])[None].astype(np.int32)
        place += step.shape[1]
        ones = np.ones_like(positions)
        logits, cache = jitted_forward(
            params, config, step.astype(np.int32), positions, ones, cache
        )
        if prompt:
            step = np.array([[prompt.pop(0)]])
        else:
            drawn.append(int(logits[0, -1].argmax()))
            step = np.array([[drawn[-1]]])
    assert drawn == wanted


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_transformers_saves_and_survive_split_and_join(case):
    family, config = families.read(ENTRIES[case]["config"])
    tensors = names.tensors(family, config)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    assert len(shapes) == len(tensors)
    assert tensor_digest(shapes) == ENTRIES[case]["tensors"]
    for tensor in tensors:
        array = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
        parts = tensor.split(array)
        assert np.array_equal(np.sort(np.concatenate([p.ravel() for p in parts])), array.ravel())
        assert np.array_equal(tensor.join(*parts), array)


@pytest.mark.parametrize("case", CASES)
def test_a_config_json_survives_reading_and_writing(case):
    family, config = families.read(ENTRIES[case]["config"])
    assert families.read(families.write(family, config))[0] == family
    again = families.read(families.write(family, config))[1]
    assert families.canonical(again) == families.canonical(config)
