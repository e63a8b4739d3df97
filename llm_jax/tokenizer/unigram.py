"""Scores for pieces that are put behind a SentencePiece unigram model.

A score is the logarithm of a probability, and the segmentation with the largest sum wins. A new piece
gets the logarithm of its share of the tokens of the text, in a few rounds of counting (expectation by
the best path: Kudo 2018, https://arxiv.org/abs/1804.10959), within two bounds:
- above the best split of its own text, or it could never be produced;
- not below the lowest old score: unknown characters cost 10 more than that one, for English too.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import sentencepiece

from llm_jax.tokenizer.sentencepiece import SPACE_MARK, ModelProto

ROUNDS = 2  # of counting before the choice, and as many after it
MARGIN = 0.01  # over the best split: the library adds float32 scores, good to 1e-5 at -100
UNKNOWN_PENALTY = 10.0  # kUnkPenalty of the library

_NORMAL = ModelProto.SentencePiece.Type.NORMAL


def append(proto: Any, scores: Mapping[bytes, float]) -> None:
    """Puts pieces behind those of a model, in the order given."""
    for text, score in scores.items():
        proto.pieces.add(piece=text.decode().replace(" ", SPACE_MARK), score=score, type=_NORMAL)


def choose(
    proto: Any,
    texts: Sequence[bytes],
    counts: Mapping[bytes, int] = {},
    lines: Sequence[str] = (),
    wanted: int = 0,
    kept: Set[bytes] = frozenset(),
) -> dict[bytes, float]:
    """Scores of new pieces, in their order; the `wanted` most useful ones, with all of `kept`.

    Args:
      proto: the base.
      texts: candidates.
      counts: how often each is thought to occur, to begin with.
      lines: the text to count in; without it the scores are just large enough.
      wanted: how many to keep; 0 keeps all.
      kept: pieces that stay whatever their use.
    """
    scores = _fit(proto, {text: counts.get(text, 0) for text in texts}, sum(counts.values()))
    for _ in range(ROUNDS if lines else 0):
        used, total = _count(proto, scores, lines)
        scores = _fit(proto, used, total)
    if not wanted or wanted >= len(texts):
        return scores
    used, total = _count(proto, scores, lines)
    splitter = _Splitter(proto, scores)
    # what the text would lose in log-probability without the piece
    loss = {text: used[text] * (scores[text] - splitter.split(text)) for text in texts}
    ranked = sorted(texts, key=lambda text: (text not in kept, -loss[text], text))
    chosen = set(ranked[:wanted])
    scores = {text: score for text, score in scores.items() if text in chosen}
    for _ in range(ROUNDS):
        used, total = _count(proto, scores, lines)
        scores = _fit(proto, used, total)
    return scores


def _count(
    proto: Any, scores: Mapping[bytes, float], lines: Sequence[str]
) -> tuple[dict[bytes, int], int]:
    """How often each new piece is on the best path of the lines, and the number of all tokens."""
    extended = ModelProto.FromString(proto.SerializeToString())
    append(extended, scores)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(extended.SerializeToString())
    first, size = len(proto.pieces), len(extended.pieces)
    rows = processor.EncodeAsNumpy(list(lines), num_threads=-1)
    totals = np.bincount(np.concatenate(rows), minlength=size)
    return dict(zip(scores, totals[first:].tolist(), strict=True)), int(totals.sum())


def _fit(proto: Any, counts: Mapping[bytes, int], total: int) -> dict[bytes, float]:
    """Scores by share, within the bounds; shorter pieces first, as longer ones split into them."""
    splitter = _Splitter(proto, {})
    for text in sorted(counts, key=len):
        share = math.log(max(counts[text], 0.5) / max(total, 1)) if total else -math.inf
        score = min(max(share, splitter.lowest), splitter.highest)
        splitter.scores[text] = max(score, splitter.split(text) + MARGIN)
    return {text: splitter.scores[text] for text in counts}


class _Splitter:
    """The best path through a text that does not use the text as one piece."""

    def __init__(self, proto: Any, scores: Mapping[bytes, float]):
        normal = [piece for piece in proto.pieces if piece.type == _NORMAL]
        self.lowest = min((piece.score for piece in normal), default=-10.0)
        self.highest = max((piece.score for piece in normal), default=0.0)
        self.scores = {p.piece.replace(SPACE_MARK, " ").encode(): p.score for p in normal}
        self.scores |= scores

    def split(self, text: bytes) -> float:
        """Its score; a single character can only be unknown."""
        characters = [character.encode() for character in text.decode()]
        unknown = self.lowest - UNKNOWN_PENALTY
        if len(characters) == 1:
            return unknown
        best = [0.0] + [-math.inf] * len(characters)
        for end in range(1, len(best)):
            for start in range(end):
                if end - start == len(characters):
                    continue
                part = b"".join(characters[start:end])
                score = self.scores.get(part, unknown if end - start == 1 else -math.inf)
                best[end] = max(best[end], best[start] + score)
        return best[-1]
