"""The rules by name, and a document's way through them.

A rule is a pure function of a `Page`: a new text, a `Rejection`, or None when it has nothing to say.
`cleaner(config)` makes the ordered list once; `clean(text)` is all a worker or a cluster needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from llm_jax.config import nearest
from llm_jax.data.clean import mojibake, word_lists
from llm_jax.data.clean.markup import BoilerplateConfig, MarkupConfig, boilerplate, markup
from llm_jax.data.clean.normalise import NormaliseConfig, normalise
from llm_jax.data.clean.page import Page, Rejection
from llm_jax.data.clean.personal import PersonalConfig, personal
from llm_jax.data.clean.quality import QualityConfig, quality
from llm_jax.data.clean.repetition import RepetitionConfig, repetition
from llm_jax.errors import ConfigError

Rule = Callable[[Page], "str | Rejection | None"]

DEFAULT_RULES = (
    "mojibake",
    "markup",
    "normalise",
    "boilerplate",
    "quality",
    "repetition",
    "personal",
)


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Which rules, in which order, with which settings."""

    rules: tuple[str, ...] = DEFAULT_RULES
    normalise: NormaliseConfig = NormaliseConfig()
    markup: MarkupConfig = MarkupConfig()
    boilerplate: BoilerplateConfig = BoilerplateConfig()
    quality: QualityConfig = QualityConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    personal: PersonalConfig = PersonalConfig()
    terms: str = ""  # file of the term table, for the rule "terms"
    block_list: str = ""  # file of the block list, for the rule "block_list"

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError(f"rules is empty; choose from {', '.join(RULES)}")
        for name in self.rules:
            if name not in RULES:
                raise ConfigError(f"rules holds {name!r}; {nearest(name, list(RULES))}")
            if self.rules.count(name) > 1:
                raise ConfigError(f"rules holds {name!r} twice; each rule runs once")
        for name, path in (("terms", self.terms), ("block_list", self.block_list)):
            if bool(path) != (name in self.rules):
                raise ConfigError(
                    f"{name}={path!r}: the rule {name!r} and its file go together; give both or none"
                )


def _simplify(_: CleanConfig) -> Rule:
    from opencc import OpenCC  # 0.1 s to load; only who asks for it pays

    convert = OpenCC("t2s").convert

    def simplify(page: Page) -> str | None:
        text = convert(page.text) if page.han else page.text
        return None if text == page.text else text

    return simplify


RULES: dict[str, Callable[[CleanConfig], Rule]] = {
    "mojibake": lambda config: mojibake.repair,
    "markup": lambda config: partial(markup, config=config.markup),
    "normalise": lambda config: partial(normalise, config=config.normalise),
    "simplify": _simplify,
    "terms": lambda config: word_lists.term_rule(config.terms),
    "boilerplate": lambda config: partial(boilerplate, config=config.boilerplate),
    "block_list": lambda config: word_lists.block_rule(config.block_list),
    "quality": lambda config: partial(quality, config=config.quality),
    "repetition": lambda config: partial(repetition, config=config.repetition),
    "personal": lambda config: partial(personal, config=config.personal),
}


class Outcome(NamedTuple):
    """What became of one document."""

    text: str  # as it is now; of a rejected document, as it was when it was rejected
    changed: tuple[str, ...]  # rules that changed it, in order
    rejected_by: str  # the rule, or "" for a document that is kept
    rejection: Rejection | None


def cleaner(config: CleanConfig) -> Callable[[str], Outcome]:
    """Builds the rules once and returns the function that applies them to one text."""
    rules = [(name, RULES[name](config)) for name in config.rules]

    def clean(text: str) -> Outcome:
        page, changed = Page(text), []
        for name, rule in rules:
            result = rule(page)
            if isinstance(result, str):
                changed.append(name)
                if not result or result.isspace():
                    return Outcome(page.text, tuple(changed), name, Rejection("nothing left", ""))
                page = Page(result)
            elif result is not None:
                return Outcome(page.text, tuple(changed), name, result)
        return Outcome(page.text, tuple(changed), "", None)

    return clean
