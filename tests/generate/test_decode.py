"""Decoding with the cache against the full forward pass, alone and in batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.generate import SamplingConfig, decode, generate, stream
from llm_jax.generate.decode import check_lengths, encode_prompt, round_up
from llm_jax.model import ModelConfig, Params, abstract_params, forward
from llm_jax.tokenizer import Tokenizer
from tests.tiny import BLOOM, GPT2, LLAMA
from tests.tiny_text import byte_level, sentencepiece_bytes

# 330 ids in the tokenizer, 336 rows in the model: the last 6 must never be drawn
SIZES = {"vocab_size": 336, "max_seq_len": 100}
CONFIGS = {
    "rope": dataclasses.replace(LLAMA, **SIZES),
    "alibi": dataclasses.replace(
        BLOOM, tied_embeddings=False, **SIZES
    ),  # tied ones repeat themselves
    "learned": dataclasses.replace(GPT2, **SIZES),
}
PROMPTS = ["", "The model reads", "Every morning the old fisherman walked down to", "座山"]


@functools.cache
def lively_params(position):
    """Larger weights than at initialisation: logits differ clearly and depend on the context."""
    shapes, tree = jax.tree.flatten(abstract_params(CONFIGS[position]))
    rng = np.random.default_rng(1)
    leaves = [rng.normal(0, 0.4, x.shape).astype(np.float32) for x in shapes]
    # committed to a device, as a restored checkpoint is
    return jax.device_put(jax.tree.unflatten(tree, leaves), jax.devices()[0])


@jax.jit(static_argnums=1)
def full_forward(params, config, tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    return forward(params, config, tokens_BT, positions, jnp.ones_like(tokens_BT))[0]


@pytest.mark.parametrize("position", CONFIGS)
def test_greedy_with_the_cache_equals_the_full_forward_token_for_token(position):
    config, tokenizer, params = CONFIGS[position], sentencepiece_bytes(), lively_params(position)
    greedy = SamplingConfig(max_new_tokens=24, temperature=0)
    made = generate(params, config, tokenizer, PROMPTS, greedy)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    assert len({len(ids) for ids in prompts}) == len(PROMPTS), "rows of different lengths"
    tokens_BT = np.zeros((len(PROMPTS), 96), np.int32)
    for row, generation in enumerate(made):
        whole = [*prompts[row], *generation.ids]
        tokens_BT[row, : len(whole)] = whole
    logits_BTV = np.asarray(full_forward(params, config, tokens_BT))[..., : tokenizer.vocab_size]
    likeliest_BT = logits_BTV.argmax(axis=-1)
    for row, generation in enumerate(made):
        first = len(prompts[row]) - 1
        expected = likeliest_BT[row, first : first + 24].tolist()
        got = [*generation.ids, *([tokenizer.eos_id] if generation.finished == "eos" else [])]
        assert got == expected[: len(got)]
    assert sum(len(generation.ids) for generation in made) >= 48
    assert len({generation.ids for generation in made}) == len(PROMPTS)


Rope = tuple[Params, ModelConfig, Tokenizer]


@pytest.fixture(scope="module")
def rope() -> Rope:
    return lively_params("rope"), CONFIGS["rope"], sentencepiece_bytes()


SAMPLED = SamplingConfig(max_new_tokens=20, temperature=1.0, top_k=50, top_p=0.95, seed=11)


def test_a_prompt_continues_the_same_beside_other_prompts(rope: Rope):
    together = generate(*rope, PROMPTS, SAMPLED)
    others = generate(*rope, ["We", PROMPTS[1], "x" * 40, ""], SAMPLED)
    assert others[1] == together[1]
    in_parts = generate(*rope, PROMPTS, dataclasses.replace(SAMPLED, batch_size=2))
    assert in_parts == together


def test_equal_prompts_at_different_places_continue_differently(rope: Rope):
    first, second = generate(*rope, ["The model", "The model"], SAMPLED)
    assert first.ids != second.ids


def test_the_same_seed_gives_the_same_text_and_another_seed_another(rope: Rope):
    again = generate(*rope, PROMPTS, SAMPLED)
    assert again == generate(*rope, PROMPTS, SAMPLED)
    assert again != generate(*rope, PROMPTS, dataclasses.replace(SAMPLED, seed=12))


def test_streamed_pieces_add_up_to_the_generated_text(rope: Rope):
    texts = [""] * len(PROMPTS)
    endings = [""] * len(PROMPTS)
    for row, text, _, finished in stream(*rope, PROMPTS, SAMPLED):
        texts[row] += text
        endings[row] = finished
    made = generate(*rope, PROMPTS, SAMPLED)
    assert texts == [generation.text for generation in made]
    assert endings == [generation.finished for generation in made]


def test_the_text_is_what_the_ids_spell_and_no_padding_id_is_drawn(rope: Rope):
    hot = dataclasses.replace(SAMPLED, temperature=5.0, top_k=0, top_p=1.0, max_new_tokens=60)
    made = generate(*rope, ["The"] * 4, hot)
    tokenizer = rope[2]
    assert all(0 <= i < tokenizer.vocab_size for generation in made for i in generation.ids)
    prompt = tokenizer.encode("The")
    for generation in made:
        whole = tokenizer.decode([*prompt, *generation.ids])
        if "\ufffd" not in whole:
            assert "The" + generation.text == whole


def always(config, token):
    """Parameters that always prefer one id: the untied head reads a constant direction."""
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config))
    params["embedding"][:, 0] = 1.0
    params["final_norm"]["scale"][:] = 1.0
    params["head"][0, token] = 1.0
    return jax.device_put(params, jax.devices()[0])


def test_the_end_of_the_document_ends_the_text(rope: Rope):
    _, config, tokenizer = rope
    params = always(config, tokenizer.eos_id)
    greedy = SamplingConfig(max_new_tokens=20, temperature=0)
    made = generate(params, config, tokenizer, ["The", "We"], greedy)
    assert [(g.text, g.ids, g.finished) for g in made] == [("", (), "eos")] * 2


def test_a_stop_string_ends_the_text_before_it(rope: Rope):
    _, config, tokenizer = rope
    params = always(config, tokenizer.encode("x")[-1])
    limits = SamplingConfig(max_new_tokens=20, temperature=0, stop=("xxx",))
    for made in generate(params, config, tokenizer, ["a", "b"], limits):
        assert (made.text, made.finished, len(made.ids)) == ("", "stop", 3)
    limits = dataclasses.replace(limits, stop=())
    for made in generate(params, config, tokenizer, ["a", "b"], limits):
        assert (made.text, made.finished) == ("x" * 20, "length")


def test_a_document_can_begin_without_a_prompt_and_without_a_bos():
    tokenizer = byte_level()
    assert tokenizer.bos_id < 0 or tokenizer.bos_id == tokenizer.eos_id
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_id]


def test_learned_positions_refuse_what_they_cannot_hold_and_allow_the_last_place():
    config, tokenizer, params = CONFIGS["learned"], sentencepiece_bytes(), lively_params("learned")
    prompts = ["x" * 80] * 4
    count = len(encode_prompt(tokenizer, prompts[0]))
    with pytest.raises(ConfigError, match=r"max_new_tokens.*100 is all that learned positions"):
        generate(params, config, tokenizer, prompts, SamplingConfig(max_new_tokens=101 - count))
    limits = SamplingConfig(max_new_tokens=100 - count)
    assert round_up(count - 1) > config.max_seq_len, "the padded prompt must be cut to the table"
    assert all(made.ids for made in generate(params, config, tokenizer, prompts, limits))


def test_rope_past_its_trained_length_warns_and_alibi_does_not(caplog):
    eight = SamplingConfig(max_new_tokens=8)
    check_lengths(dataclasses.replace(BLOOM, max_seq_len=8), [[1, 2]], eight)
    assert not caplog.text
    check_lengths(dataclasses.replace(LLAMA, max_seq_len=8), [[1, 2]], eight)
    assert "prompt 0 has 2 tokens" in caplog.text
    assert "8 is what the model was trained for" in caplog.text


def compiled_programs() -> list[int]:
    programs: list[Any] = [decode._prefill, decode._step]
    return [program._cache_size() for program in programs]


def test_lengths_and_settings_share_compiled_programs(rope: Rope):
    generate(*rope, PROMPTS, SAMPLED)
    before = compiled_programs()
    for prompts, change in [
        (["The", "We", "a", "x" * 60], {"temperature": 0.0}),
        (["We measured"] * 3, {"top_k": 3, "seed": 5}),
        (["x" * 20] * 4, {"top_p": 0.5, "max_new_tokens": 40}),
    ]:
        generate(*rope, prompts, dataclasses.replace(SAMPLED, **change))
    assert compiled_programs() == before


def test_rounded_lengths_are_few_and_waste_at_most_a_quarter():
    assert [round_up(n) for n in (1, 64, 65, 256, 257, 512, 513, 1025)] == [
        64, 64, 128, 256, 320, 512, 640, 1280,
    ]  # fmt: skip
    assert len({round_up(n) for n in range(1, 8193)}) == 4 + 4 * 5
    assert all(n <= round_up(n) <= max(1.25 * n, n + 63) for n in range(1, 8193))
