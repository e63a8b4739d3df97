"""Random tiny models of every family against transformers: logits, generation, names, config."""

import json
import re

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import names
from llm_jax.model import families, forward, init_cache
from tests.model.family_cases import CASES, as_params

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
jitted_forward = jax.jit(forward, static_argnames="config")
LENGTH = 19  # beyond the windows, and beyond the unscaled lengths of those that look at it


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model, its config.json, its saved tensors)."""
    from tools.make_family_goldens import saved, their_model

    model = their_model(request.param)
    hf, weights = saved(model, tmp_path_factory.mktemp("saved"))
    return model, hf, weights


def our_logits(params, config, ids):
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    return np.asarray(jitted_forward(params, config, ids, positions, np.ones_like(ids))[0])


def random_ids(rows):
    return np.random.default_rng(0).integers(0, 61, (rows, LENGTH), dtype=np.int32)


def test_logits_are_those_of_transformers(pair):
    import torch

    model, hf, weights = pair
    family, config = families.read(hf)
    params, left = as_params(family, config, weights)
    assert not left, "every tensor is used"
    ids = random_ids(2)
    ours = our_logits(params, config, ids)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    assert theirs.std() > 0.1, "weights too small to tell"
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_tensors_survive_split_and_join_bit_for_bit_and_config_a_round_trip(pair):
    _, hf, weights = pair
    family, config = families.read(hf)
    assert {t.name for t in names.tensors(family, config)} == set(weights)
    for tensor in names.tensors(family, config):
        array = weights[tensor.name]
        back = tensor.join(*tensor.split(array))
        assert back.dtype == array.dtype
        assert np.array_equal(back, array)
        assert back.flags.c_contiguous
    written = families.write(family, config)
    assert families.read(written) == (family, families.read(written)[1])
    assert families.canonical(families.read(written)[1]) == families.canonical(config)


def test_transformers_makes_the_same_model_of_the_config_we_write(pair):
    import torch
    import transformers

    model, hf, _ = pair
    from tools.make_family_goldens import IMPLEMENTATION

    written = families.write(*families.read(hf))
    their_config = transformers.AutoConfig.for_model(**json.loads(json.dumps(written)))
    again = transformers.AutoModelForCausalLM.from_config(
        their_config, attn_implementation=IMPLEMENTATION.get(hf["model_type"], "eager")
    )
    again.load_state_dict(model.state_dict())
    ids = torch.from_numpy(random_ids(1).astype(np.int64))
    with torch.no_grad():
        assert torch.equal(again.eval().float()(ids).logits, model(ids).logits)


def test_cached_greedy_generation_is_that_of_transformers(pair):
    import torch

    model, hf, weights = pair
    family, config = families.read(hf)
    params, _ = as_params(family, config, weights)
    prompt, new = random_ids(1)[:, :7], 14
    theirs = model.generate(
        torch.from_numpy(prompt.astype(np.int64)), max_new_tokens=new, do_sample=False,
        attention_mask=torch.ones(prompt.shape, dtype=torch.int64), pad_token_id=0,
    )[0, 7:].tolist()  # fmt: skip
    cache, ids, ours = init_cache(config, 1, 32), prompt, []
    for _ in range(new):
        first = 7 + len(ours) - ids.shape[1]
        positions = np.arange(first, first + ids.shape[1], dtype=np.int32)[None]
        logits, cache = jitted_forward(params, config, ids, positions, np.ones_like(ids), cache)
        ours.append(int(logits[0, -1].argmax()))
        ids = np.array([[ours[-1]]], np.int32)
    assert ours == theirs


def test_names_of_buffers_in_older_saves_are_ignored_and_no_tensor_is(pair):
    _, hf, _ = pair
    family, config = families.read(hf)
    patterns = names.ignored(family)
    needed = {t.name for t in names.tensors(family, config)} - {
        "lm_head.weight",
        "embed_out.weight",
    }
    assert not [n for n in needed if any(re.fullmatch(p, n) for p in patterns)]
