"""Renders a Jinja chat template as transformers does, and finds in the text what the assistant wrote.

1. Sandboxed: a template is data that came with a model. It reads nothing but what it is given, and
   stops with an error after `SECONDS` of looping (transformers' has no limit).
2. Special tokens spelled inside a message are broken apart by a private character before rendering, so
   that those found in the result are the template's own; see `Rendered.split`.
3. What the assistant wrote is told by `{% generation %}` where the template has it, and otherwise by
   rendering turn by turn: the prompt of an answer, then the same with the answer. Where these are not
   beginnings of the whole, no mask can be right, and the template is refused.
"""

import json
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_jax.errors import DataError
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.templates import ChatTemplate

SECONDS = 2.0  # for one conversation; a usual one takes a fraction of a millisecond
MAX_PRODUCT = 1 << 20  # longest text or list that `*` may make, largest width of a `%` format
# of the Unicode private use area; text that holds one of them is refused
BREAK, OPEN, CLOSE = "\ue0f0", "\ue0f1", "\ue0f2"


class TemplateError(DataError):
    """A template that cannot be used, or not for this conversation."""


class Span(NamedTuple):
    """Where in the rendered text one answer stands."""

    header: int  # where the assistant's turn begins: its header goes from here to `start`
    start: int  # where the model begins to write
    end: int


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str  # special tokens in messages still broken by BREAK
    answers: tuple[Span, ...]  # of the assistant turns that were asked for


class _Ticks(Extension):
    """Calls `_tick` in every turn of every loop: the one way to bound the time of any thread."""

    def filter_stream(self, stream: Any) -> Any:
        opened = False
        previous = ""
        for token in stream:
            opened = opened or (previous == "block_begin" and token.test("name:for"))
            previous = token.type
            yield token
            if token.type == "block_end" and opened:
                opened = False
                for kind, value in (
                    ("variable_begin", "{{"),
                    ("name", "_tick"),
                    ("lparen", "("),
                    ("rparen", ")"),
                    ("variable_end", "}}"),
                ):
                    yield Token(token.lineno, kind, value)


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant writes, by OPEN and CLOSE around it."""

    tags = {"generation"}  # noqa: RUF012 (jinja's)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of jinja2, without products and formats that fill the memory."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses results of more than MAX_PRODUCT items or digits."""
        if operator == "%" and isinstance(left, str):
            widest = max((int(digits) for digits in re.findall(r"\d+", left)), default=0)
            if widest > MAX_PRODUCT or "*" in left:
                raise jinja2.exceptions.SecurityError("a format wider than is sensible")
        if operator == "**" and abs(right) > 64:
            raise jinja2.exceptions.SecurityError("a power larger than is sensible")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and len(one) * int(other) > MAX_PRODUCT:
                    raise jinja2.exceptions.SecurityError("a product larger than is sensible")
        return super().call_binop(context, operator, left, right)


class Renderer:
    """One template, compiled.

    Args:
      template: which.
      bos, eos: pieces of the tokenizer; "" for none.
      specials: all its special pieces.

    Raises:
      TemplateError: it is not Jinja.
    """

    def __init__(
        self, template: ChatTemplate, *, bos: str, eos: str, specials: Sequence[str]
    ) -> None:
        self.template = template
        self._given = {"bos_token": bos, "eos_token": eos}
        # a single character cannot be broken apart, nor is it special in any text (see `tokenizer`)
        longest_first = sorted((s for s in specials if len(s) > 1), key=len, reverse=True)
        # a pattern that matches nothing where there are none
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._deadline = 0.0
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, _Ticks, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        # no `strftime_now`: with today's date in it, the same conversation would have other ids tomorrow;
        # the templates that know it have a date of their own where it is not defined
        environment.globals["_tick"] = self._tick
        try:
            self._compiled = environment.from_string(template.text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(
                f"chat template {template.name!r} is broken: {_one_line(error)}"
            ) from None
        self.marks_answers = re.search(r"\{%-?\+?\s*generation\b", template.text) is not None

    def _tick(self) -> str:
        if time.monotonic() > self._deadline:
            raise TimeoutError
        return ""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text that asks for an answer to `turns`."""
        self._deadline = time.monotonic() + SECONDS
        return _unmarked(self._render(turns, asking=True))

    def render(self, turns: Sequence[Turn], wanted: Sequence[int], headers: bool) -> Rendered:
        """The whole conversation, and the answers that the turns `wanted` are.

        Args:
          turns: all.
          wanted: indices of assistant turns, in order.
          headers: whether `Span.header` is asked for; where not, it is `start`.

        Raises:
          TemplateError: the template fails, takes too long, or leaves it open what the model writes.
        """
        self._deadline = time.monotonic() + SECONDS
        marked = self._render(turns)
        text = _unmarked(marked)
        if self.marks_answers:
            spans = _marked_spans(marked)
            answered = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
            if len(spans) != len(answered):
                raise self._unfit(
                    f"marks {len(spans)} of {len(answered)} answers by {{% generation %}}"
                )
            found = [spans[answered.index(index)] for index in wanted]
        else:
            found = [self._answer(text, turns, index) for index in wanted]
        if headers:
            found = [
                (self._header(text, turns, index, start), start, end)
                for index, (start, end) in zip(wanted, found, strict=True)
            ]
        else:
            found = [(start, start, end) for start, end in found]
        return Rendered(text, tuple(Span(*span) for span in found))

    def split(self, text: str) -> list[tuple[int, int, bool]]:
        """(start, end, is special) of every stretch of a rendered text; none is empty."""
        parts, at = [], 0
        for match in self._special.finditer(text):
            if match.start() > at:
                parts.append((at, match.start(), False))
            parts.append((match.start(), match.end(), True))
            at = match.end()
        if at < len(text):
            parts.append((at, len(text), False))
        return parts

    def _answer(self, text: str, turns: Sequence[Turn], index: int) -> tuple[int, int]:
        """(start, end) of one answer, by rendering up to it and with it."""
        before = self._render(turns[:index], asking=True)
        after = self._render(turns[: index + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise self._unfit(
                "writes a turn otherwise when others follow or when it asks for an answer, so that what the "
                "model writes cannot be told"
            )
        return len(before), len(after)

    def _header(self, text: str, turns: Sequence[Turn], index: int, start: int) -> int:
        """Where the turn of an answer begins."""
        before = _unmarked(self._render(turns[:index]))
        if not text.startswith(before) or len(before) > start:
            raise self._unfit("leaves it open where the assistant's header begins")
        return len(before)

    def _unfit(self, why: str) -> TemplateError:
        return TemplateError(
            f"chat template {self.template.name!r} {why}; choose another template, train on the last answer "
            "alone, or put {% generation %} around what the assistant writes"
        )

    def _render(self, turns: Sequence[Turn], asking: bool = False) -> str:
        try:
            return self._compiled.render(
                messages=[self._message(turn) for turn in turns],
                add_generation_prompt=asking,
                tools=None,
                documents=None,
                **self._given,
            )
        except TimeoutError:
            # no TemplateError: it is no matter of this conversation, the stage must not wait for each
            raise DataError(
                f"chat template {self.template.name!r} takes longer than {SECONDS:g} s for a conversation of "
                f"{len(turns)} turns; it must not loop for ever"
            ) from None
        except (jinja2.TemplateError, RecursionError, OverflowError, MemoryError) as error:
            raise TemplateError(
                f"chat template {self.template.name!r} fails: {_one_line(error)}"
            ) from None
        except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
            # raised by what the template does with its values
            raise TemplateError(
                f"chat template {self.template.name!r} fails: {type(error).__name__}: {_one_line(error)}"
            ) from None

    def _message(self, turn: Turn) -> dict[str, str]:
        apart = self.template.keeps_input_apart
        message = {"role": turn.role, "content": self._broken(turn.content if apart else turn.text)}
        if apart and turn.context:
            message["input"] = self._broken(turn.context)
        return message

    def _broken(self, text: str) -> str:
        """The text with every special token in it broken behind its first character."""
        if BREAK in text or OPEN in text or CLOSE in text:
            raise TemplateError(
                f"a message holds U+{ord(BREAK):04X} to U+{ord(CLOSE):04X}, private characters that are needed "
                "to tell messages from the template; remove them"
            )
        while match := self._special.search(text):
            cut = match.start() + 1
            text = text[:cut] + BREAK + text[cut:]
        return text


def _unmarked(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def _marked_spans(marked: str) -> list[tuple[int, int]]:
    """(start, end) of the marked parts, in the text without marks."""
    spans, start = [], 0
    for marks, match in enumerate(re.finditer(f"[{OPEN}{CLOSE}]", marked)):
        at = match.start() - marks
        if match[0] == OPEN:
            start = at
        elif at > start:
            spans.append((start, at))
    return spans


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """As transformers' filter of this name: Chinese stays readable, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
