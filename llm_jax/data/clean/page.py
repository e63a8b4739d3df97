"""A text on its way through the rules, with what several rules want to know about it."""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from llm_jax.data import characters, language
from llm_jax.data.characters import Kind


class Rejection(NamedTuple):
    """A rule's verdict that a document has to go."""

    reason: str  # a fixed phrase; the report counts by it
    detail: str  # the number and the limit, for a person


class Page:
    """An immutable text. A rule that changes the text makes a new page, so nothing goes stale."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def codes(self) -> np.ndarray:
        """Code points, uint32 [N]."""
        return characters.codes(self.text)

    @cached_property
    def kinds(self) -> np.ndarray:
        """`Kind` of each character, uint8 [N]."""
        return characters.kinds(self.codes)

    @cached_property
    def counts(self) -> list[int]:
        """Characters of each kind."""
        return np.bincount(self.kinds, minlength=len(Kind)).tolist()

    @cached_property
    def han(self) -> int:
        """Number of Han characters."""
        return self.counts[Kind.HAN] + self.counts[Kind.HAN_FUNCTION] + self.counts[Kind.HAN_RARE]

    @cached_property
    def visible(self) -> int:
        """Number of characters that are not white space."""
        return len(self.text) - self.counts[Kind.SPACE] - self.counts[Kind.NEWLINE]

    @cached_property
    def language(self) -> str:
        """As `language.identify` has it."""
        return language.identify(self.text, np.array(self.counts)).language

    @cached_property
    def english_share(self) -> float:
        """As `language.english_share` has it."""
        return language.english_share(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def prose(self) -> list[str]:
        """`lines` without those inside Markdown code fences: code is judged by no rule of prose."""
        kept, fenced = [], False
        for line in self.lines:
            if line.startswith(("```", "~~~")):
                fenced = not fenced
            elif not fenced:
                kept.append(line)
        return kept if not fenced else self.lines  # a fence that never closes fences nothing
