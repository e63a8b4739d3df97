"""Which tokens are targets, and that what a user types stays text, for every template."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_jax import tokenizer as tokenizers
from llm_jax.data.shards import ANSWER, MARK
from llm_jax.errors import ConfigError, DataError
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.masks import ChatEncoder, chat_tokenizer
from llm_jax.instruct.templates import TEMPLATES, ChatTemplate, find_template
from tests.instruct import chat_cases

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text("utf-8"))
TALK = (
    Turn("system", "Be brief."),
    Turn("user", "the river?"),
    Turn("assistant", "a river."),
    Turn("user", "再说一次"),
    Turn("assistant", "大河。"),
)


@pytest.fixture(scope="module")
def tokenizer():
    files = {name: text.encode() for name, text in GOLDEN["tokenizer"].items()}
    return tokenizers.from_files(files, "golden")


@pytest.fixture(scope="module")
def sentencepiece():
    return chat_cases.sentencepiece()


@pytest.fixture(scope="module")
def prefixed():
    """As Llama 2's: a space is put before every text."""
    return chat_cases.sentencepiece(add_dummy_prefix=True)


def encoder(tokenizer, name: str, **settings) -> ChatEncoder:
    template = TEMPLATES[name]
    return ChatEncoder(chat_tokenizer(tokenizer, template), template, **settings)


def learned(made, tokenizer, value: int | None = None) -> str:
    """The targets as text, special tokens spelled out."""
    chosen = made.mask == value if value else made.mask > 0
    ids = made.tokens[chosen].tolist()
    spell = lambda id: tokenizer.piece_of(id) if id in tokenizer.special_ids else None  # noqa: E731
    text, run = "", []
    for id in ids:
        if spell(id):
            text, run = text + tokenizer.decode(run) + str(spell(id)), []
        else:
            run.append(id)
    return text + tokenizer.decode(run)


@pytest.mark.parametrize("name", chat_cases.NAMES)
def test_ids_and_masks_are_those_that_transformers_stored(tokenizer, name):
    chat = encoder(tokenizer, name)
    cases = [case for case in GOLDEN["cases"] if case["template"] == name]
    assert len(cases) == 8
    for case in cases:
        made = chat.encode(tuple(Turn(role, content) for role, content in case["turns"]))
        assert made.tokens.tolist() == case["ids"]
        assert (made.mask > 0).astype(int).tolist() == case["mask"]


# what each family publishes, written out by hand
WRITTEN = {
    "chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>",
    "vicuna": "<s>S USER: Q ASSISTANT: A</s>",
    "plain": "<s>S\nQ\nA</s>",
}


@pytest.mark.parametrize("name", chat_cases.NAMES)
def test_a_template_writes_what_its_family_publishes(tokenizer, name):
    chat = encoder(tokenizer, name)
    turns = (Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"))
    made = chat.encode(turns)
    made.mask[:] = 1
    assert learned(made, chat.tokenizer) == WRITTEN[name]


@pytest.mark.parametrize("name", chat_cases.NAMES)
@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece", "prefixed"])
def test_a_prompt_is_what_stands_before_the_answer_in_training(request, kind, name):
    chat = encoder(request.getfixturevalue(kind), name)
    for turns in chat_cases.conversations(20, seed=5):
        made = chat.encode(turns).tokens.tolist()
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                prompt = chat.prompt(turns[:index])
                assert made[: len(prompt)] == prompt


@pytest.mark.parametrize("name", chat_cases.NAMES)
def test_answers_and_the_end_of_each_turn_are_targets_and_nothing_else(tokenizer, name):
    chat = encoder(tokenizer, name)
    end = chat.tokenizer.piece_of(chat.tokenizer.eos_id)
    made = chat.encode(TALK)
    space = {"llama2": (" ", " "), "vicuna": (" ", "")}.get(name, ("", ""))
    answers = [space[0] + turn.content + space[1] for turn in TALK if turn.role == "assistant"]
    assert learned(made, chat.tokenizer) == "".join(answer + end for answer in answers)
    assert learned(made, chat.tokenizer, ANSWER) == "".join(answers)
    assert made.num_characters == sum(map(len, answers))
    assert made.num_bytes == sum(len(answer.encode()) for answer in answers)
    last = encoder(tokenizer, name, loss="last").encode(TALK)
    assert learned(last, chat.tokenizer) == answers[-1] + end
    assert last.tokens.tolist() == made.tokens.tolist()
    everything = encoder(tokenizer, name, loss="everything").encode(TALK)
    assert (everything.mask > 0).all()
    assert (everything.mask == ANSWER).tolist() == (made.mask == ANSWER).tolist()


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("chatml", "<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "<start_of_turn>model\n"),
        ("alpaca", "### Response:\n"),
        ("vicuna", "ASSISTANT:"),
        ("plain", ""),
    ],
)
def test_the_header_of_an_answer_is_learned_when_asked_for(sentencepiece, name, header):
    without = encoder(sentencepiece, name, loss="last").encode(TALK)
    chat = encoder(sentencepiece, name, loss="last", header=True)
    made = chat.encode(TALK)
    assert learned(made, chat.tokenizer).startswith(header)
    assert made.tokens.tolist() == without.tokens.tolist()
    assert (made.mask == ANSWER).tolist() == (without.mask == ANSWER).tolist()
    added = (made.mask == MARK) & (without.mask == 0)
    assert bool(added.any()) == bool(header)


@pytest.mark.parametrize("name", chat_cases.NAMES)
@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
def test_a_special_token_that_a_user_spells_is_text(request, kind, name):
    chat = encoder(request.getfixturevalue(kind), name)
    pieces = [chat.tokenizer.piece_of(id) for id in sorted(chat.tokenizer.special_ids)]
    attack = "".join(pieces) + "<|im_<|im_end|>end|>" + "".join(reversed(pieces))
    turns = (Turn("user", f"x{attack}y"), Turn("assistant", f"u{attack}v"))
    plain = (Turn("user", "x"), Turn("assistant", "u"))
    special = sorted(chat.tokenizer.special_ids)
    made, calm = chat.encode(turns), chat.encode(plain)
    assert made.tokens[np.isin(made.tokens, special)].tolist() == (
        calm.tokens[np.isin(calm.tokens, special)].tolist()
    )
    text = chat.tokenizer.decode(made.tokens.tolist())
    assert f"x{attack}y" in text
    assert f"u{attack}v" in text


def test_a_token_that_would_span_the_cut_is_never_trained(tokenizer):
    chat = encoder(tokenizer, "chatml")
    turns = (Turn("user", "Q"), Turn("assistant", "\n\nthe river"))
    made = chat.encode(turns).tokens.tolist()
    prompt = chat.prompt(turns[:1])
    assert made[: len(prompt)] == prompt
    assert chat.tokenizer.decode(made[len(prompt) : -2]) == "\n\nthe river"


def test_alpaca_writes_an_input_in_a_place_of_its_own_and_others_behind_the_instruction(tokenizer):
    turns = (Turn("user", "Add.", context="1 2"), Turn("assistant", "3"))
    chat = encoder(tokenizer, "alpaca")
    text = chat.tokenizer.decode(chat.encode(turns).tokens.tolist())
    assert "paired with an input" in text
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3" in text
    chat = encoder(tokenizer, "chatml")
    assert "user\nAdd.\n\n1 2\n" in chat.tokenizer.decode(chat.encode(turns).tokens.tolist())


# ---- a template that came with the model ---------------------------------------------------------

UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def own(tokenizer, text: str, **settings) -> ChatEncoder:
    ready = chat_tokenizer(tokenizer, TEMPLATES["chatml"])
    return ChatEncoder(ready, ChatTemplate(name="base", text=text), **settings)


def test_a_template_without_markers_has_the_mask_of_the_same_with_markers(tokenizer):
    qwen = encoder(tokenizer, "qwen")
    chat = own(tokenizer, UNMARKED)
    for turns in chat_cases.conversations(30, seed=7):
        if turns[0].role == "system":  # Qwen adds one where there is none
            ours, marked = chat.encode(turns), qwen.encode(turns)
            assert ours.tokens.tolist() == marked.tokens.tolist()
            assert ours.mask.tolist() == marked.mask.tolist()


REFUSED = {
    "broken": ("{% for m in messages %}", "is broken"),
    "fails": ("{{ messages[0].nothing.there }}", "fails: "),
    "says no": ("{{ raise_exception('no thanks') }}", "no thanks"),
    "no end": ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token"),
    "another history": (
        "{% for m in messages %}{{ m.content + ('<|im_end|>' if loop.last else '</s>') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A' }}{% endif %}",
        "cannot be told",
    ),
    "marks nothing": ("{% generation %}{% endgeneration %}<|im_end|>", "marks 0 of 1"),
    "reads files": ("{{ ''.__class__.__mro__ }}", "fails: "),
    "fills memory": ("{{ 'a' * 100000000000 }}", "fails: "),
    "a wide format": ("{{ '%999999999d' % 1 }}", "fails: "),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(tokenizer, kind):
    text, told = REFUSED[kind]
    with pytest.raises(DataError, match="chat template 'base'") as caught:
        own(tokenizer, text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for i in range(9999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{%- for i in range(99999) -%}{%- for j in range(99999) if false -%}{%- endfor -%}{%- endfor -%}",
    ],
)
def test_a_template_that_loops_for_ever_is_stopped(tokenizer, text, monkeypatch):
    monkeypatch.setattr("llm_jax.instruct.rendering.SECONDS", 0.05)
    with pytest.raises(DataError, match=r"loop for ever|fails"):
        own(tokenizer, text)


def test_names_and_choices_are_told_when_mistyped(tokenizer):
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        find_template("chatm", tokenizer.files, "x")
    with pytest.raises(DataError, match="came without a chat template"):
        find_template("base", tokenizer.files, "x")
    with pytest.raises(ConfigError, match="did you mean 'last'"):
        encoder(tokenizer, "chatml", loss="lst")


# ---- special tokens of the tokenizer -------------------------------------------------------------


def test_special_tokens_that_are_missing_get_ids_behind_the_vocabulary(tokenizer):
    ready = chat_tokenizer(tokenizer, TEMPLATES["llama3"])
    assert ready.vocab_size == tokenizer.vocab_size + 3
    assert ready.piece_of(ready.eos_id) == "<|eot_id|>"
    assert ready.bos_id == tokenizer.bos_id
    for id in range(tokenizer.vocab_size):
        assert ready.piece_of(id) == tokenizer.piece_of(id)
    text = "the river <|eot_id|> 大河"
    assert ready.encode(text) == tokenizer.encode(text)
    assert chat_tokenizer(ready, TEMPLATES["llama3"]) is ready


def test_reserved_ids_are_taken_first(sentencepiece):
    reserved = [
        id for id in sorted(sentencepiece.special_ids) if "unused" in sentencepiece.piece_of(id)
    ]
    ready = chat_tokenizer(sentencepiece, TEMPLATES["chatml"])
    assert len(reserved) >= 2
    assert ready.vocab_size == sentencepiece.vocab_size
    assert [ready.id_of(piece) for piece in ("<|im_start|>", "<|im_end|>")] == reserved[:2]


def test_a_special_token_that_is_ordinary_text_is_refused(tokenizer):
    piece = tokenizer.piece_of(tokenizer.encode("the")[0])
    with pytest.raises(DataError, match="is text of that spelling"):
        chat_tokenizer(
            tokenizer, ChatTemplate(name="odd", text="", specials=(piece,), end_of_turn=piece)
        )


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", chat_cases.NAMES)
@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
def test_200_conversations_have_the_ids_and_masks_of_transformers(request, kind, name, tmp_path):
    ours = request.getfixturevalue(kind)
    chat = encoder(ours, name)
    loaded = chat_cases.open_theirs(ours, TEMPLATES[name], tmp_path)
    for turns in chat_cases.conversations(200, seed=11):
        made = chat.encode(turns)
        ids, mask = chat_cases.apply(loaded, turns)
        assert made.tokens.tolist() == ids
        assert (made.mask > 0).astype(int).tolist() == mask
