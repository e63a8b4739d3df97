"""Scores against values derived by hand and against one document at a time."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import ConfigError, DataError
from llm_jax.eval import perplexity
from llm_jax.eval.perplexity import Evaluator, Score, bootstrap_sums
from llm_jax.eval.windows import EvalConfig, corpus_from_texts
from llm_jax.model import abstract_params, forward
from llm_jax.sharding import MeshConfig, make_mesh
from tests.tiny import BLOOM, LLAMA
from tests.tiny_text import CHINESE, ENGLISH, sentencepiece_bytes

TOKENIZER = sentencepiece_bytes()
SIZES: dict[str, Any] = {"vocab_size": 336, "max_seq_len": 32}
CONFIGS = {
    "rope": dataclasses.replace(LLAMA, **SIZES),
    "alibi": dataclasses.replace(BLOOM, **SIZES),
}
ROPE = CONFIGS["rope"]
TEXTS = ["a", "The sky.", "语言", "x = 1", ENGLISH[0], "We", CHINESE[1]]


def random_params(config, seed=2):
    shapes, tree = jax.tree.flatten(abstract_params(config))
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype) for x in shapes]
    return jax.tree.unflatten(tree, leaves)


def unigram_params(config, logits):
    """Parameters whose logits are `logits` whatever the context."""
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config))
    params["embedding"][:, 0] = 1.0
    params["final_norm"]["scale"][:] = 1.0
    # the mean square of (1, 0, ..., 0) is 1 / D
    params["head"][0] = np.asarray(logits) * math.sqrt(1 / config.embed_dim + config.norm_eps)
    return params


def corpora(**texts):
    return {name: corpus_from_texts(t, TOKENIZER, EvalConfig()) for name, t in texts.items()}


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(
        ROPE, corpora(en=ENGLISH, zh=CHINESE), EvalConfig(seq_len=16, stride=8, batch_size=4)
    )


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(evaluator):
    result = evaluator.evaluate(unigram_params(ROPE, np.zeros(336)))
    for score in (*result.sources.values(), result.total):
        assert score.perplexity == pytest.approx(336, rel=1e-5)
        assert score.nats == pytest.approx(score.tokens * math.log(336), rel=1e-6)


def test_bits_per_byte_and_per_character_of_chinese_by_hand(evaluator):
    # two characters of three bytes, each byte a token of its own
    text = "水水"
    ids = TOKENIZER.encode(text)
    first, second, third = ids[:3]
    assert ids == [first, second, third] * 2
    logits = np.full(336, -1e9)
    logits[[first, second, third]] = np.log([1 / 2, 1 / 4, 1 / 4])
    score = (
        Evaluator(ROPE, corpora(zh=[text]), evaluator.config)
        .evaluate(unigram_params(ROPE, logits))
        .sources["zh"]
    )
    # 1 + 2 + 2 bits for each character
    assert (score.documents, score.tokens, score.bytes, score.characters) == (1, 6, 6, 2)
    assert score.bits_per_character == pytest.approx(5, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(5 / 3, rel=1e-5)
    assert score.nats_per_token == pytest.approx(5 / 3 * math.log(2), rel=1e-5)
    assert score.perplexity == pytest.approx(2 ** (5 / 3), rel=1e-5)


jitted_forward = jax.jit(forward, static_argnums=1)


def nats_one_by_one(params, config, text, seq_len, stride):
    """The definition: every window alone in a call, log-softmax in float64."""
    ids, nats, scored = [TOKENIZER.bos_id, *TOKENIZER.encode(text)], 0.0, 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + seq_len]
        tokens = np.zeros((1, seq_len), np.int32)
        tokens[0, : len(window)] = window
        positions = np.arange(seq_len, dtype=np.int32)[None]
        segments = (positions < len(window)).astype(np.int32)
        logits = np.asarray(
            jitted_forward(params, config, tokens, positions, segments)[0][0], np.float64
        )
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for at in range(len(window)):
            target = begin + at + 1
            if scored < target < len(ids):
                nats -= logits[at, ids[target]]
                scored = target
        if scored == len(ids) - 1:
            break
    return nats


@pytest.mark.parametrize("position", CONFIGS)
def test_packed_strided_scores_equal_every_window_alone(position):
    config = CONFIGS[position]
    params = random_params(config)
    settings = EvalConfig(seq_len=16, stride=6, batch_size=4)
    evaluator = Evaluator(config, corpora(all=TEXTS), settings)
    expected = [nats_one_by_one(params, config, text, 16, 6) for text in TEXTS]
    np.testing.assert_allclose(evaluator.document_nats(params), expected, rtol=1e-5)


def test_strides_do_not_matter_to_documents_shorter_than_the_window():
    params, texts = random_params(ROPE), ["The sky.", "语言", "We"]
    found = [
        Evaluator(ROPE, corpora(all=texts), EvalConfig(seq_len=16, stride=stride)).document_nats(
            params
        )
        for stride in (1, 5, 16)
    ]
    assert max(map(len, map(TOKENIZER.encode, texts))) <= 16
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_every_evaluation_runs_the_same_program(evaluator):
    program: Any = perplexity._token_nats
    first = evaluator.evaluate(random_params(ROPE))
    before = program._cache_size()
    second = evaluator.evaluate(random_params(ROPE, seed=9))
    assert program._cache_size() == before
    assert first == evaluator.evaluate(random_params(ROPE))
    assert first.total.nats != second.total.nats


def test_the_total_is_the_sum_of_the_sources_and_metrics_are_flat(evaluator):
    result = evaluator.evaluate(random_params(ROPE))
    english, chinese = result.sources["en"], result.sources["zh"]
    for field in ("documents", "tokens", "bytes", "characters"):
        assert getattr(result.total, field) == getattr(english, field) + getattr(chinese, field)
    assert result.total.nats == pytest.approx(english.nats + chinese.nats)
    metrics = result.metrics
    assert metrics["zh/bits_per_character"] == chinese.bits_per_character
    assert metrics["bits_per_byte"] == result.total.bits_per_byte
    assert set(metrics) == {
        prefix + ratio
        for prefix in ("", "en/", "zh/")
        for ratio in ("nats_per_token", "perplexity", "bits_per_byte", "bits_per_character")
    }
    low, high = english.bits_per_character_interval
    assert low < english.bits_per_character < high


def test_the_interval_is_as_wide_as_the_spread_of_documents_says():
    # ratio of sums over n documents of 100 characters each: standard error = sd of nats / 100 / sqrt(n)
    rng = np.random.default_rng(0)
    nats = rng.normal(200, 40, 400)
    columns = np.stack([nats, np.full(400, 300.0), np.full(400, 100.0)], axis=1)
    sums = bootstrap_sums(columns, 2000, (0,))
    low, high = np.quantile(sums[:, 0] / sums[:, 2], (0.025, 0.975))
    assert (high - low) / 2 == pytest.approx(1.96 * nats.std() / 100 / 20, rel=0.1)


def test_one_document_has_no_interval():
    found = Evaluator(ROPE, corpora(all=["We"]), EvalConfig()).evaluate(random_params(ROPE)).total
    assert all(map(math.isnan, found.bits_per_byte_interval))


def test_a_hopeless_score_does_not_overflow():
    assert Score(documents=1, tokens=1, bytes=1, characters=1, nats=1e6).perplexity == math.inf


def test_a_mesh_gives_the_same_scores(evaluator):
    params = random_params(ROPE)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    placed = Evaluator(ROPE, corpora(en=ENGLISH, zh=CHINESE), evaluator.config, mesh)
    np.testing.assert_allclose(
        placed.document_nats(params), evaluator.document_nats(params), rtol=1e-6
    )


def test_what_cannot_be_scored_is_refused_by_name():
    with pytest.raises(DataError, match="source 'empty' has no held-out text"):
        Evaluator(ROPE, corpora(empty=[]), EvalConfig())
    with pytest.raises(DataError, match=r"source 'zh' holds id \d+, but model.vocab_size=64"):
        Evaluator(LLAMA, corpora(zh=CHINESE), EvalConfig())
    with pytest.raises(ConfigError, match="'total' is taken"):
        Evaluator(ROPE, corpora(total=ENGLISH), EvalConfig())
