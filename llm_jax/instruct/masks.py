"""Conversation -> token ids, and which of them the model is to learn.

The mask belongs to the token as a target, not as an input: masking what follows an input loses the
first token of every answer or its end. One byte per token: 0, `ANSWER`, or `MARK` for targets that are
no text of an answer (end of turn, header), which count in the loss but not in bits per character.

A stretch between two special tokens is encoded as one text, as transformers does it, with one
exception. Where the model begins to write, the text is cut if a token would span the cut: generation
starts behind the prompt's own tokens, so a token that spans it could be trained but never drawn.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from llm_jax.config import nearest
from llm_jax.data.shards import ANSWER, MARK
from llm_jax.errors import ConfigError
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.rendering import BREAK, Renderer, Span, TemplateError
from llm_jax.instruct.templates import ChatTemplate, find_template, own_template
from llm_jax.tokenizer.base import Tokenizer
from llm_jax.tokenizer.chat import for_chat

Loss = Literal["all", "last", "everything"]
# texts to stand before one that is encoded on its own, so that no dummy space is put there
ANCHORS = ("\n", ":", "|", "a")
PROBE = (Turn("user", "Question"), Turn("assistant", "Answer"))


class Masked(NamedTuple):
    """A conversation as the model reads it."""

    tokens: np.ndarray  # int32 [n]
    mask: np.ndarray  # uint8 [n]: 0, ANSWER or MARK
    num_bytes: int  # UTF-8 bytes of the text behind ANSWER
    num_characters: int


class ChatEncoder:
    """Writes conversations in a template and a tokenizer that has its special tokens.

    Args:
      tokenizer: as `chat_tokenizer` makes it.
      template: which.
      loss: the assistant turns that are targets: all, the last, or every token of the conversation.
      header: whether the tokens that open an assistant turn are targets too.

    Raises:
      TemplateError: the template is broken, or it cannot be told what the assistant writes.
      ConfigError: no such loss.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        loss: Loss = "all",
        header: bool = False,
    ) -> None:
        if loss not in get_args(Loss):
            raise ConfigError(f"loss={loss!r}; {nearest(loss, get_args(Loss))}")
        self.tokenizer, self.template = tokenizer, template
        self._loss, self._header = loss, header
        pieces = [tokenizer.piece_of(id) for id in sorted(tokenizer.special_ids)]
        bos = tokenizer.piece_of(tokenizer.bos_id) if tokenizer.bos_id >= 0 else ""
        eos = tokenizer.piece_of(tokenizer.eos_id)
        self._renderer = Renderer(template, bos=bos, eos=eos, specials=pieces)
        self.encode(PROBE)  # raises now what every conversation would raise

    def encode(self, turns: Sequence[Turn]) -> Masked:
        """Ids and mask of a whole conversation.

        Raises:
          TemplateError: the template fails on it, or leaves it open what the assistant writes.
        """
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        wanted = answers[-1:] if self._loss == "last" else answers
        text, spans = self._renderer.render(turns, wanted, self._header)
        parts = self._renderer.split(text)
        spans = [self._until_end_of_turn(span, parts, text) for span in spans]
        ids, mask = self._ids(text, parts, spans)
        if self._loss == "everything":
            mask = [value or MARK for value in mask]
        stretches = [
            text[max(start, span.start) : end].replace(BREAK, "")
            for span in spans
            for start, end, special in parts
            if not special and span.start < end <= span.end
        ]
        said = "".join(stretches)
        tokens = np.array(ids, np.int32)
        return Masked(tokens, np.array(mask, np.uint8), len(said.encode()), len(said))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids that ask for an answer to `turns`, as they stand before it in training."""
        text = self._renderer.prompt(turns)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        told, spans = self._renderer.render(turns, answers, False) if answers else ("", ())
        # where a template writes history otherwise when it asks, there is nothing to be equal to
        spans = spans if text.startswith(told) else ()
        return self._ids(text, self._renderer.split(text), spans)[0]

    def _ids(
        self, text: str, parts: Sequence[tuple[int, int, bool]], spans: Sequence[Span]
    ) -> tuple[list[int], list[int]]:
        """Ids and mask of a rendered text."""
        ids: list[int] = []
        mask: list[int] = []
        for start, end, special in parts:
            span = next((s for s in spans if start < s.end and s.header < end), None)
            if special:
                ids.append(self.tokenizer.id_of(text[start:end]))
                mask.append(MARK if span is not None and span.header <= start else 0)
                continue
            head, answer = self._cut(text, start, end, span)
            ids += [*head, *answer]
            opening = 0  # tokens of the header
            if span is not None and span.header < span.start:
                before = self._encode(text[start : max(start, min(span.header, end))])
                opening = len(head) - _common(before, head)
            mask += [0] * (len(head) - opening) + [MARK] * opening + [ANSWER] * len(answer)
        return ids, mask

    def _until_end_of_turn(
        self, span: Span, parts: Sequence[tuple[int, int, bool]], text: str
    ) -> Span:
        """The span up to the special token that ends the turn, which is a target.

        Raises:
          TemplateError: there is none, so a model would never learn to stop.
        """
        inside = [end for start, end, special in parts if special and span.start < end <= span.end]
        behind = [end for start, end, special in parts if special and start == span.end]
        if inside:
            # in front of the end of a marked span there is nothing but what the model writes
            return span._replace(end=inside[-1])
        if behind:
            return span._replace(end=behind[0])
        raise TemplateError(
            f"chat template {self.template.name!r} ends an answer with {text[span.end - 8 : span.end]!r} and no "
            "special token, so a model would never learn to stop; choose another template"
        )

    def _cut(
        self, text: str, start: int, end: int, span: Span | None
    ) -> tuple[list[int], list[int]]:
        """Ids of a stretch of text in front of the answer, and of the answer."""
        if span is None or span.start >= end:
            return self._encode(text[start:end]), []
        if span.start <= start:
            return [], self._encode(text[start:end])
        head = self._encode(text[start : span.start])
        whole = self._encode(text[start:end])
        if whole[: len(head)] == head:
            return head, whole[len(head) :]
        return head, self._encode_behind(text[span.start : end])

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text.replace(BREAK, "")))

    def _encode_behind(self, text: str) -> list[int]:
        """Ids of a text that stands behind another, which some tokenizers spell without a space."""
        for anchor in ANCHORS:
            first, both = self._encode(anchor), self._encode(anchor + text)
            if both[: len(first)] == first:
                return both[len(first) :]
        return self._encode(text)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def chat_tokenizer(tokenizer: Tokenizer, template: ChatTemplate) -> Tokenizer:
    """The tokenizer with the template's special tokens, its text, and EOS where a turn ends.

    A tokenizer that was made so stays as it is.

    Raises:
      DataError: a special token is ordinary text there.
      TemplateError: the template cannot be used.
    """
    end = template.end_of_turn or _end_of_turn(tokenizer, template)
    eos = tokenizer.piece_of(tokenizer.eos_id)
    same = own_template(tokenizer.files, "") == template.text and end == eos
    if same and all(tokenizer.id_of(s) in tokenizer.special_ids for s in template.specials):
        return tokenizer
    return for_chat(tokenizer, template.specials, "" if end == eos else end, template.text)


def _end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> str:
    """The special token that a template writes behind an answer."""
    encoder = ChatEncoder(tokenizer, template)
    tokens, mask, *_ = encoder.encode(PROBE)
    return tokenizer.piece_of(int(tokens[np.flatnonzero(mask)[-1]]))


def load_encoder(
    tokenizer: Tokenizer, where: str, loss: Loss = "all", header: bool = False
) -> ChatEncoder:
    """The encoder of a tokenizer that carries its template. Raises DataError if it carries none."""
    return ChatEncoder(tokenizer, find_template("base", tokenizer.files, where), loss, header)
