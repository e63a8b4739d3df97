"""Texts that tell two tokenizers apart: what has gone wrong between libraries before, and the pieces themselves."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llm_jax.tokenizer.base import Tokenizer

ENGLISH = (
    "The old lighthouse keeper climbed the stairs every evening and lit the lamp before the ships "
    "came home. It isn't far, he'd say; we've all the time in the world."
)
CHINESE = "从前有一座山，山上有一座庙，庙里有一个老和尚。今天天气很好，我们去公园散步吧！他说：“你吃饭了吗？”"

FIXED = (
    ENGLISH,
    CHINESE,
    "GPT-4 的 tokenizer 在 2024 年有 100,277 个 token，平均每个汉字 1.3 个。",
    "价格是￥1,234.56（约 US$170），打８折，ＡＢＣ全角，ﾊﾝｶｸ",
    "a", " ", "  ", "\n", "\t", " a", "a ", "  a  b   c    d", "\n\n\n", " \n \n", "\r\n", "a\n",
    "\nabc", "\n abc", "\t\tdef f(x):\n\t\treturn x  # 12345\n\n", "    if x:\n        y = 1\n",
    "1234567890 3.14159 1e-5 0x1F 2024-01-02T03:04:05Z",
    "ABC Abc aBC don't DON'T I'll we're 'tis",
    "https://example.com/a/b?c=d&e=%20f#g user@example.org",
    "!!!???...---___***(((]]]}}}<<<>>>///\\\\\\||| @#$%^&*+=~`",
    "😀😃🎉 👩‍👩‍👧‍👦 🇨🇳🏳️‍🌈 ✈️ é e\u0301 ñ ﬁ ½ ™ Å Å",
    "龘靐齉爨癵鱻𠀀𠮷𡃁𪚥𫝀㐀㐂 〇〆ヶ々",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b\x7f\x80\x85\xa0\u00ad\u200b\u200d\u2028\u2029\ufeff\ufffd",
    "Привет, мир! Ελληνικά العربية עברית हिन्दी ไทย 한국어 조선말 にほんご Tiếng Việt",
    "\u3000全角空格\u3000　和 不换行\u00a0空格",
    "<0x41><0xE4> <unk <s / s> [ INST ]",
    "the the the THE  the,the.The\tthe",
    "ab" * 40, "哈" * 33, "=" * 61, "-" * 17 + " " * 17 + "|" * 9,
)  # fmt: skip


class Difference(NamedTuple):
    """A text that two tokenizers treat differently."""

    text: str
    what: str  # ids or text
    first: object
    second: object


def texts(tokenizer: Tokenizer, salads: int = 1500) -> list[str]:
    """The fixed probes and random concatenations of the tokenizer's own pieces, always the same ones.

    Pieces side by side in orders that no real text has are what finds merges in another order and ties.
    U+2581 is left out: SentencePiece's own library reads it as a space, ours as itself.
    """
    draw = random.Random(0)
    spelled = [tokenizer.decode([id]) for id in _ordinary(tokenizer)]
    usable = [piece for piece in spelled if piece and not set(piece) & {"\ufffd", "\u2581"}]
    made = []
    for _ in range(salads if usable else 0):
        words = draw.choices(usable, k=draw.randint(2, 8))
        made.append(draw.choice(("", " ")).join(words))
    markers = [piece for id in tokenizer.special_ids if (piece := _spelled(tokenizer, id))]
    return [text for text in (*FIXED, *made) if not any(marker in text for marker in markers)]


def _ordinary(tokenizer: Tokenizer) -> Iterator[int]:
    return (id for id in range(tokenizer.vocab_size) if id not in tokenizer.special_ids)


def _spelled(tokenizer: Tokenizer, id: int) -> str:
    """How a text would spell a special token: there the libraries differ on purpose."""
    piece = tokenizer.piece_of(id)
    return piece if len(piece) > 1 else ""


def differences(first: Tokenizer, second: Tokenizer, probes: Sequence[str]) -> list[Difference]:
    """The texts that do not get the same ids, or whose ids do not give back the same text."""
    found = []
    for text in probes:
        ids, others = first.encode(text), second.encode(text)
        if ids != others:
            found.append(Difference(text, "ids", ids, others))
        elif first.decode(ids) != second.decode(ids):
            found.append(Difference(text, "text", first.decode(ids), second.decode(ids)))
    return found
