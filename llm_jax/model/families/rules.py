"""How single fields of a Hugging Face `config.json` and of `ModelConfig` answer to each other.

A family (`table`) is a list of rules. Each names the fields it answers for, reads
them and writes them back; a field that no rule names is not known, and `api.read` refuses it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from llm_jax.errors import ConfigError
from llm_jax.model.config import Local, ModelConfig

Fields = dict[str, Any]  # of ModelConfig, by name
Json = Mapping[str, Any]

REQUIRED = object()
MOST_LAYERS = 1024  # a broken file is not to make lists of 10^12


# Fields that no forward pass of a text decoder in inference reads: names, ids, dropout, initialisers,
# how to generate, other heads than the language model's.
NO_MATHS = frozenset(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "name_or_path",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "emb_pdrop",
        "attention_dropout",
        "hidden_dropout",
        "residual_dropout",
        "embedding_dropout",
        "classifier_dropout",
        "dropout",
        "initializer_range",
        "use_cache",
        "gradient_checkpointing",
        "task_specific_params",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "use_return_dict",
        "tokenizer_class",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "is_encoder_decoder",
        "is_decoder",
        "chunk_size_feed_forward",
        "cache_implementation",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attention_implementation",
        "use_flash_attention_2",
        "_commit_hash",
        "initializer_factor",
    ]
)


class Rule(Protocol):
    """Some fields of config.json, both ways."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of config.json it answers for."""
        ...

    def read(self, hf: Json, fields: Fields) -> Fields:
        """What they say, given the fields that the rules before it have read."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The same, said in config.json."""
        ...


def refuse(name: str, value: Any, why: str) -> ConfigError:
    """The one-line error for a field of config.json."""
    told = repr(value)
    return ConfigError(
        f"config.json: {name}={told if len(told) < 80 else told[:76] + ' ...'} {why}"
    )


def given(hf: Json, names: tuple[str, ...], default: Any) -> Any:
    """The value under any of the names; null counts as absent, and aliases must agree.

    Raises:
      ConfigError: two names disagree, or nothing is there and `default` is REQUIRED.
    """
    found = {name: hf[name] for name in names if hf.get(name) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise ConfigError(f"config.json: {found} are names of one thing and must agree")
    if not values and default is REQUIRED:
        raise ConfigError(f"config.json: {names[0]} is missing; the model's size is not known")
    return values[0] if values else default


def number(name: str, value: Any, kind: type) -> Any:
    """The value as an int or a float. Raises ConfigError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(name, value, "must be a number")
    if not math.isfinite(value) or (kind is int and value != int(value)):
        raise refuse(name, value, "must be a whole number" if kind is int else "must be finite")
    return kind(value)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number that means the same on both sides."""

    name: str
    field: str
    default: Any = REQUIRED  # a number, or a function of the fields read before
    kind: type = int
    aliases: tuple[str, ...] = ()
    most: float = math.inf

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def read(self, hf: Json, fields: Fields) -> Fields:
        default = self.default(fields) if callable(self.default) else self.default
        value = number(self.name, given(hf, self.names, default), self.kind)
        if value > self.most:
            raise refuse(self.name, value, f"must be at most {self.most}")
        return {self.field: value}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.name: vars(config)[self.field]}


@dataclasses.dataclass(frozen=True)
class Maybe:
    """A number that is null on their side where ours is 0: off."""

    name: str
    field: str
    default: float | None = None  # what transformers takes when it is absent

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, hf: Json, fields: Fields) -> Fields:
        value = hf.get(self.name, self.default)
        return {self.field: 0.0 if value is None else number(self.name, value, float)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.name: vars(config)[self.field] or None}


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag or a name that stands for settings of ours; any other value is refused."""

    name: str
    default: Any
    options: tuple[tuple[Any, Fields], ...]  # their value -> ours; the first that fits is written
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def read(self, hf: Json, fields: Fields) -> Fields:
        value = given(hf, self.names, self.default)
        for theirs, ours in self.options:
            if type(theirs) is type(value) and theirs == value:
                return dict(ours)
        allowed = " or ".join(dict.fromkeys(repr(theirs) for theirs, _ in self.options))
        raise refuse(self.name, value, f"is not supported; it must be {allowed}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        for theirs, ours in self.options:
            if all(vars(config)[field] == value for field, value in ours.items()):
                return {self.name: theirs}
        return {}


@dataclasses.dataclass(frozen=True)
class Custom:
    """A rule of its own kind, as two functions."""

    names: tuple[str, ...]
    reader: Callable[[Json, Fields], Fields]
    writer: Callable[[ModelConfig], dict[str, Any]]

    def read(self, hf: Json, fields: Fields) -> Fields:
        return self.reader(hf, fields)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return self.writer(config)


def flag(name: str, default: bool, on: Fields, off: Fields) -> Option:
    """A boolean."""
    return Option(name, default, ((True, on), (False, off)))


def only(name: str, value: Any) -> Option:
    """A field with one value that is supported, the one transformers takes when it is absent."""
    return Option(name, value, ((value, {}),))


ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same polynomial written out; and GPT-NeoX-20B's gelu_fast
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}


def activation(name: str, default: str, *aliases: str) -> Option:
    """The activation of the MLP; the family's usual name is the one written."""
    order = sorted(ACTIVATION_NAMES, key=lambda theirs: theirs != default)
    options = tuple((theirs, {"activation": ACTIVATION_NAMES[theirs]}) for theirs in order)
    return Option(name, default, options, aliases)


def heads(fields: Fields) -> int:
    """Key-value heads where none are named: as many as query heads."""
    return fields["num_heads"]


def split_width(fields: Fields) -> int:
    """The size of a head where it is not named: D / N, rounded down as transformers does."""
    return fields["embed_dim"] // max(fields["num_heads"], 1)


def derived_head_dim() -> Custom:
    """For families whose heads split the width exactly; config.json does not say their size."""

    def reader(hf: Json, fields: Fields) -> Fields:
        D, N = fields["embed_dim"], fields["num_heads"]
        if N < 1 or D % N:
            raise ConfigError(f"config.json: a width of {D} must be a multiple of {N} heads")
        return {"head_dim": D // N}

    return Custom((), reader, lambda config: {})


def one_kv_head_each() -> Custom:
    """Multi-head attention: config.json does not speak of key-value heads."""
    return Custom((), lambda hf, fields: {"num_kv_heads": fields["num_heads"]}, lambda config: {})


def fraction_of(part: int, whole: int) -> float:
    """The share for which int(whole * share) is `part` again."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)


class Pattern(NamedTuple):
    """The two numbers of `Local` that say which layers are local."""

    first: int
    full_every: int


def find_pattern(is_local: list[bool]) -> Pattern | None:
    """The simplest pattern that gives these layers; None if they follow none."""
    L = len(is_local)
    for first in (0, is_local.index(True) if any(is_local) else L):
        for full_every in (0, *range(2, L + 1)):
            pattern = Local(window=1, first=first, full_every=full_every)
            if all(pattern.has(layer) == local for layer, local in enumerate(is_local)):
                return Pattern(first, full_every)
    return None


def layer_kinds(hf: Json, L: int, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer is local, from `layer_types` or the family's rule for its absence."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return [default(i) for i in range(L)]
    names = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != L or any(kind not in names for kind in kinds):
        raise refuse("layer_types", kinds, f"must be a list of {L} of {names[0]} or {names[1]}")
    return [kind == names[1] for kind in kinds]


def local_layers(hf: Json, fields: Fields, window: Any, default: Callable[[int], bool]) -> Local:
    """What a window (or null) and the kinds of layers amount to.

    Raises:
      ConfigError: local layers have no window, or follow no pattern that `Local` knows.
    """
    is_local = layer_kinds(hf, fields["num_layers"], default)
    if not any(is_local):
        return Local()
    if window is None:
        raise refuse("sliding_window", window, "must be a number: layer_types names local layers")
    pattern = find_pattern(is_local)
    if pattern is None:
        raise refuse("layer_types", hf.get("layer_types"), "follow no pattern that is supported")
    window = number("sliding_window", window, int)
    if window < 1:
        raise refuse("sliding_window", window, "must be at least 1")
    return Local(window=window, first=pattern.first, full_every=pattern.full_every)


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` as transformers writes it."""
    return ["sliding_attention" if local else "full_attention" for local in config.local_layers]
