"""Ids to text, piece by piece: what is yielded is never taken back and never splits a character.

A Chinese character is often two or three tokens (bytes). Until its last byte has come the decoded
text ends in U+FFFD, so a trailing run of them is held back. Only the last few ids are decoded at a
time, which keeps the cost per id constant; some ids before them stay as context, because
SentencePiece drops the space of the first piece it is given.
"""

from collections.abc import Sequence

from llm_jax.tokenizer.base import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# a character is at most 4 bytes, hence 4 ids; a longer undecodable run is not going to resolve
MAX_HELD_IDS = 16
CONTEXT_IDS = 8


class TextStream:
    """The text of one growing sequence of ids.

    The pieces add up to `tokenizer.decode` of all ids, as far as these spell valid UTF-8.

    Args:
      context: ids that stand before the first one and are not to be repeated, such as the prompt's.
      stop: the stream ends before the first occurrence of any of these strings.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False  # a stop string was met; nothing more will come
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tail = _clean_tail(tokenizer, context)  # the ids that are still decoded
        self._read = len(self._tail)  # of the tail, ids whose text is complete
        self._told = len(tokenizer.decode(self._tail))  # characters of the tail's text already out
        self._held = ""  # complete text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Adds one id; returns the text that became certain, often empty."""
        if self.stopped:
            return ""
        self._tail.append(token)
        text = self._tokenizer.decode(self._tail)
        complete = not text.endswith(REPLACEMENT)
        stuck = len(self._tail) - self._read >= MAX_HELD_IDS
        certain = text if complete or stuck else text.rstrip(REPLACEMENT)
        piece, self._told = certain[self._told :], max(self._told, len(certain))
        if (complete and piece) or stuck:
            # the ids before the last complete point are not needed as context any more
            self._tail = self._tail[self._read if complete else -CONTEXT_IDS :]
            self._read = len(self._tail)
            self._told = len(self._tokenizer.decode(self._tail))
        return self._release(piece)

    def flush(self) -> str:
        """Ends the stream; returns what was held back."""
        if self.stopped:
            return ""
        piece = self._release(self._tokenizer.decode(self._tail)[self._told :])
        held, self._held = self._held, ""
        self._tail, self._read, self._told = [], 0, 0
        return piece + held

    def _release(self, piece: str) -> str:
        """Passes text on, up to a stop string or to what may still become one."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = min(len(text), max(map(len, self._stop)) - 1)
        held = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _clean_tail(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last few ids, beginning at a character boundary where there is one near."""
    for count in range(CONTEXT_IDS, CONTEXT_IDS + 4):
        tail = list(ids[-count:])
        if count >= len(ids) or not tokenizer.decode(tail).startswith(REPLACEMENT):
            return tail
    return list(ids[-CONTEXT_IDS:])
