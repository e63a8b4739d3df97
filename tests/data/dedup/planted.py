"""Near-duplicates planted by hand: 8 % of the sentences dropped, a repost header put before."""

import gzip
import json
import random
import re
from pathlib import Path

CORPUS = Path(__file__).parents[3].parent / "shared" / "corpus"
HEADERS = {
    "zh": "【转载】本文转自网络，版权归原作者所有，如有侵权请联系删除。\n",
    "en": "Reposted from another site. All rights belong to the original author.\n",
}
SENTENCE = re.compile(r"(?<=[。！？])|(?<=[.!?]) |\n")
DROPPED = 0.08


def sentences(text: str) -> list[str]:
    """Pieces that end like sentences, or lines."""
    return [piece for piece in SENTENCE.split(text) if piece and piece.strip()]


def repost(text: str, language: str, rng: random.Random) -> str:
    """The text without about 8 % of its sentences (at least one), under a header."""
    pieces = sentences(text)
    drop = set(rng.sample(range(len(pieces)), max(1, round(DROPPED * len(pieces)))))
    joint = "" if language == "zh" else " "
    return HEADERS[language] + joint.join(p for i, p in enumerate(pieces) if i not in drop)


def corpus_documents(language: str, count: int, characters: int) -> list[str]:
    """Pieces of prose of about so many characters from different documents of the corpus."""
    names = {"zh": ("zh-python-docs", "zh-oi-wiki", "zh-d2l"), "en": ("en-python-docs",)}[language]
    texts = []
    for name in names:
        with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    found = []
    for text in texts:
        middle = text[len(text) // 3 :][:characters]
        if len(middle) == characters and len(sentences(middle)) >= 12:
            found.append(middle)
    return found[:count]
