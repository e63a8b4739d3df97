"""Scores and generated text do not depend on the mesh. One process of its own, with eight devices."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.virtual_devices import with_devices

SCRIPT = """
import dataclasses
import jax
import numpy as np
from llm_jax.eval.perplexity import Evaluator, _token_nats
from llm_jax.eval.windows import EvalConfig, corpus_from_texts
from llm_jax.generate import SamplingConfig, decode, generate
from llm_jax.model import abstract_params, init_params, logical_axes
from llm_jax.sharding import MeshConfig, make_mesh, tree_shardings
from tests.tiny import LLAMA
from tests.tiny_text import CHINESE, ENGLISH, sentencepiece_bytes

config = dataclasses.replace(LLAMA, vocab_size=336)
tokenizer = sentencepiece_bytes()
params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
corpora = {"all": corpus_from_texts(ENGLISH + CHINESE, tokenizer, EvalConfig())}
settings = EvalConfig(seq_len=15, batch_size=6)  # both are rounded up to what a mesh can share
sampling = SamplingConfig(max_new_tokens=12, seed=3)
prompts = ["The sky", "", "We measured"]

alone = Evaluator(config, corpora, settings).document_nats(params)
text = generate(params, config, tokenizer, prompts, sampling)
for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "context": 4}):
    mesh = make_mesh(MeshConfig(**sizes))
    placed = jax.device_put(params, tree_shardings(mesh, abstract_params(config), logical_axes(config)))
    evaluator = Evaluator(config, corpora, settings, mesh)
    before = _token_nats._cache_size()
    for _ in range(2):
        np.testing.assert_allclose(evaluator.document_nats(placed), alone, rtol=1e-5)
    assert _token_nats._cache_size() == before + 1, "one program"
    before = decode._step._cache_size()
    with jax.set_mesh(mesh):
        assert generate(placed, config, tokenizer, prompts, sampling) == text
    print("same on", sizes, "step programs", decode._step._cache_size() - before)
"""


@pytest.mark.multidevice
def test_scores_and_text_on_eight_devices_equal_those_on_one():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], env=with_devices(8), cwd=root, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same on") == 3, done.stdout
    assert done.stdout.count("step programs 1") == 3, done.stdout
