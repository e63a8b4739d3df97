"""Chat templates by name, as Jinja text that transformers reads too.

Each is what its model family publishes, with `{% generation %}` around what the assistant writes, the
end of its turn included: that is what a mask needs and what most published templates lack. `base` is
not here: it is the template that came with the model.

What a template is given: `messages` (`role`, `content`, and Alpaca's `input`), `add_generation_prompt`,
`bos_token`, `eos_token`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llm_jax.config import nearest
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer import files as tokenizer_files

BASE = "base"  # the model's own


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation is written down."""

    name: str
    text: str  # Jinja
    specials: tuple[str, ...] = ()  # pieces that must be special tokens; added where they are not
    end_of_turn: str = ""  # the piece that ends an answer; "": the tokenizer's end of text

    @property
    def keeps_input_apart(self) -> bool:
        """Whether Alpaca's `input` is written in a place of its own."""
        return "message.input" in self.text


_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Qwen2 and 2.5 put a system turn where there is none; the words are Qwen2's
_QWEN = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML
)

# a base model that saw BOS before every document is used to it
_BOS = "{{ bos_token or '' }}"

_LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content.strip() + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' %}"
    "{{ (bos_token or '') + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)

_LLAMA3 = (
    _BOS + "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content.strip() + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message.content.strip() + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# Gemma has no system turn: what it says stands before the first user turn, as Gemma 3 has it
_GEMMA = (
    _BOS + "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' %}"
    "{{ '<start_of_turn>user\\n' + (system if loop.first else '') + message.content.strip() + '<end_of_turn>\\n' }}"
    "{% else %}{{ '<start_of_turn>model\\n' }}"
    "{% generation %}{{ message.content.strip() + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

# Stanford Alpaca's two prompts; a system turn takes the place of the sentence in front
_ALPACA = (
    _BOS
    + "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}"
    "{{ 'Below is an instruction that describes a task' }}"
    "{% if turns[0].input %}{{ ', paired with an input that provides further context' }}{% endif %}"
    "{{ '. Write a response that appropriately completes the request.\\n\\n' }}{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' %}"
    "{{ ('' if loop.first else '\\n\\n') + '### Instruction:\\n' + message.content + '\\n\\n' }}"
    "{% if message.input %}{{ '### Input:\\n' + message.input + '\\n\\n' }}{% endif %}"
    "{% else %}{{ '### Response:\\n' }}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

_VICUNA = (
    _BOS
    + "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}"
    '{{ "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_PLAIN = (
    _BOS + "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\\n' }}{% endif %}"
    "{% endfor %}"
)

_IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate(name="chatml", text=_BOS + _CHATML, specials=_IM, end_of_turn="<|im_end|>"),
        ChatTemplate(name="qwen", text=_QWEN, specials=_IM, end_of_turn="<|im_end|>"),
        ChatTemplate(name="llama2", text=_LLAMA2),
        ChatTemplate(
            name="llama3",
            text=_LLAMA3,
            specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            end_of_turn="<|eot_id|>",
        ),
        ChatTemplate(
            name="gemma",
            text=_GEMMA,
            specials=("<start_of_turn>", "<end_of_turn>"),
            end_of_turn="<end_of_turn>",
        ),
        ChatTemplate(name="alpaca", text=_ALPACA),
        ChatTemplate(name="vicuna", text=_VICUNA),
        ChatTemplate(name="plain", text=_PLAIN),
    )
}
NAMES = (*TEMPLATES, BASE)


def find_template(name: str, files: Mapping[str, bytes], where: str) -> ChatTemplate:
    """The template of this name; `base` is the one among the tokenizer's files.

    Raises:
      ConfigError: no such name.
      DataError: `base`, and the tokenizer came without a template.
    """
    if name == BASE:
        text = own_template(files, where)
        if not text:
            raise DataError(
                f"{where}: came without a chat template, so template 'base' has nothing to take; choose one of "
                f"{', '.join(TEMPLATES)}"
            )
        return ChatTemplate(name=BASE, text=text)
    if name not in TEMPLATES:
        raise ConfigError(f"template={name!r}; {nearest(name, NAMES)}")
    return TEMPLATES[name]


def own_template(files: Mapping[str, bytes], where: str) -> str:
    """The chat template among a tokenizer's files; "" if there is none.

    Raises:
      DataError: it is not text.
    """
    if tokenizer_files.CHAT_TEMPLATE in files:
        try:
            return files[tokenizer_files.CHAT_TEMPLATE].decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{where}: {tokenizer_files.CHAT_TEMPLATE} is not UTF-8") from None
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    found = settings.get("chat_template") or ""
    if isinstance(found, list):  # several by name, as Command-R has them
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default") or ""
    if not isinstance(found, str):
        raise DataError(f"{where}: tokenizer_config.json: chat_template must be a string")
    return found
