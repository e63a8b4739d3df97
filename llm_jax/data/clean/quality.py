"""Is it running text? Thresholds per language, each a number that the report names.

Where they come from. C4's and Gopher's rules keep 0 % of clean Chinese prose: they split at spaces, know
no 。 and count English words. FineWeb-2's for Mandarin are the start (line-final punctuation >= 0.106,
stop words, non-alphabetic share <= 0.735); Gopher's for English (symbols, stop words, bullets). What
differs is measured on ../shared/corpus: `python tools/bench_clean.py --kept` shows what each rule costs.
Where they count by words these count by characters, so no word splitter is needed.
"""

import re
from dataclasses import dataclass

from llm_jax.data.characters import Kind
from llm_jax.data.clean.frame import log_share
from llm_jax.data.clean.page import Page, Rejection

FINAL = frozenset('.!?。！？…;；:："”’』」）)》】')
ELLIPSIS = ("...", "…")
BULLETS = ("- ", "* ", "• ", "· ", "● ", "– ", "▪", "►", "◆", "■", "★", "☆", "✓", "✔")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits for one language. Shares are of visible characters unless something else is said."""

    language: str
    min_characters: int  # visible ones
    min_function_share: float  # zh: of the Han characters; en: of the words
    min_letter_share: float  # letters of any script
    max_digit_share: float
    max_symbol_share: float  # symbols and punctuation, sentence ends left out
    max_sentence: float  # visible characters per sentence end; lists of words have none
    min_final_share: float  # lines that end in punctuation, of the lines of prose
    max_line_share: (
        float  # the same lines may be missing if lines are this long on average, in characters
    )
    max_bullet_share: float  # of the lines; 1 turns it off
    max_ellipsis_share: float = 0.3  # of the lines, cut off as in lists of search results; Gopher
    max_broken_share: float = 0.002  # U+FFFD, private use and unassigned
    max_rare_share: float = 0.08  # of the Han characters; see characters.py
    max_log_share: float = 0.6  # of the lines that start like those of a log
    max_advert_score: float = 2.5  # see `advert_score`


# Verse and classical prose end a sentence this often and need a third of the grammar: poems of the Tang
# have 0.06 to 0.14 function characters where modern prose has 0.2 to 0.4
VERSE_CLAUSE = 28  # visible characters

CHINESE = Thresholds(
    language="zh",
    min_characters=40,
    min_function_share=0.12,
    min_letter_share=0.5,
    max_digit_share=0.2,
    max_symbol_share=0.4,
    max_sentence=250,
    min_final_share=0.106,  # FineWeb-2, cmn_Hani
    max_line_share=80,
    max_bullet_share=0.9,  # Gopher
)
ENGLISH = Thresholds(
    language="en",
    min_characters=120,
    min_function_share=0.12,
    min_letter_share=0.6,
    max_digit_share=0.2,
    max_symbol_share=0.3,
    max_sentence=500,
    min_final_share=0.12,  # FineWeb
    max_line_share=200,
    max_bullet_share=0.9,  # Gopher
)


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Thresholds by language, and what to do with a text in another one."""

    languages: tuple[Thresholds, ...] = (CHINESE, ENGLISH)
    keep_other_languages: bool = False  # they pass unjudged if kept; texts without letters never do


def quality(page: Page, config: QualityConfig) -> Rejection | None:
    """A rejection naming the first limit that the text breaks, or None."""
    limits = next((t for t in config.languages if t.language == page.language), None)
    if limits is None:
        if config.keep_other_languages and page.language != "und":
            return None
        known = ", ".join(t.language for t in config.languages)
        return Rejection("language", f"{page.language}; there are thresholds for {known}")
    if page.visible < limits.min_characters:
        return Rejection("too short", f"{page.visible} characters < {limits.min_characters}")
    return _characters(page, limits) or _lines(page, limits) or _adverts(page, limits)


def _characters(page: Page, limits: Thresholds) -> Rejection | None:
    """Limits that follow from the counts of kinds alone."""
    counts, visible = page.counts, page.visible
    broken = (counts[Kind.REPLACEMENT] + counts[Kind.PRIVATE] + counts[Kind.CONTROL]) / visible
    letters = page.han + sum(
        counts[k] for k in (Kind.LATIN, Kind.KANA, Kind.HANGUL, Kind.CYRILLIC, Kind.LETTER)
    )
    symbols = (counts[Kind.SYMBOL] + counts[Kind.PUNCTUATION]) / visible
    rare = counts[Kind.HAN_RARE] / max(1, page.han)
    least = limits.min_function_share
    if limits.language == "zh":
        function = counts[Kind.HAN_FUNCTION] / max(1, page.han)
        if counts[Kind.STOP] * VERSE_CLAUSE >= visible:
            least /= 3
    else:
        function = page.english_share
    for reason, value, low, high in (
        ("broken characters", broken, 0.0, limits.max_broken_share),
        ("rare Han characters", rare, 0.0, limits.max_rare_share if page.han > 8 else 1.0),
        ("few letters", letters / visible, limits.min_letter_share, 1.0),
        ("digits", counts[Kind.DIGIT] / visible, 0.0, limits.max_digit_share),
        ("symbols", symbols, 0.0, limits.max_symbol_share),
        ("few function words", function, least, 1.0),
    ):
        if value < low:
            return Rejection(reason, f"{value:.3f} < {low:g}")
        if value > high:
            return Rejection(reason, f"{value:.3f} > {high:g}")
    return None


def _lines(page: Page, limits: Thresholds) -> Rejection | None:
    """Limits that need lines: sentences, what lines end in, bullets."""
    lines = page.prose or page.lines
    size = sum(map(len, lines))
    stops = page.counts[Kind.STOP]
    if page.visible > limits.max_sentence * stops:
        return Rejection("no sentences", f"{page.visible} characters, {stops} sentence ends")
    final = sum(line[-1] in FINAL for line in lines) / len(lines)
    if final < limits.min_final_share and size < limits.max_line_share * len(lines):
        return Rejection("lines without an end", f"{final:.3f} < {limits.min_final_share:g}")
    logged = log_share(lines)
    if logged > limits.max_log_share:
        return Rejection("log lines", f"{logged:.3f} > {limits.max_log_share:g}")
    if len(lines) > 3:
        cut = sum(line.endswith(ELLIPSIS) for line in lines) / len(lines)
        if cut > limits.max_ellipsis_share:
            return Rejection("lines cut off", f"{cut:.3f} > {limits.max_ellipsis_share:g}")
        bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
        if bullets > limits.max_bullet_share:
            return Rejection("bullets", f"{bullets:.3f} > {limits.max_bullet_share:g}")
    return None


# what sellers say; single words occur in any text, so it takes several different ones close together
CHINESE_ADVERTS = re.compile(
    # each alternative starts with a character of its own: so `re` skips to where one can begin, ten times as fast
    "|".join(
        (
            *(f"{digit}折" for digit in "0123456789一二三四五六七八九"),
            *(f"{app}(?:号|群)?[:：]" for app in ("微信", "QQ", "扣扣", "薇信")),
            *(f"{giving}(?:礼|好礼|大礼)" for giving in "送赠"),
        )
    )
    + "|"
    "立即(?:购买|抢购|咨询|拨打|下载|注册|申请|办理|预约|领取|联系)|点击(?:购买|领取|咨询|下载|链接)|限时|优惠|特价|促销|包邮|秒杀|折扣|满减|全国(?:统一)?热线|咨询热线|咨询电话|服务热线|订购|热线|"
    "加(?:我)?(?:微信|[Vv薇威]|QQ|[Qq]群)|客服|免费(?:领取|试用|咨询|送|注册|体验|上门)|代(?:开|办|写|孕|刷)|发票|厂家(?:直销|批发)|批发|价格(?:优惠|实惠|低廉)|货到付款|诚信(?:经营|第一)|"
    "质量(?:保证|第一)|欢迎(?:来电|咨询|选购|光临|加盟|新老)|招商|加盟|日赚|月入|兼职|躺赚|赚钱|彩票|娱乐城|百家乐|博彩|开户(?:送)?|注册(?:就)?送|首充|返利|提现|贷款|无抵押|办证|刻章|专治|根治|疗效|祖传|减肥|瘦身|"
    "丰胸|壮阳|无效退款|假一赔十|正品(?:保证|保障)?|原价|现价|仅需|只要\\d+元|抢购|爆款|热销|火爆|名额有限|先到先得|最后\\d+天|老客户|新客户|红包|私聊|私信|！！"
)
ENGLISH_ADVERTS = re.compile(
    r"\b(?:(?:buy|shop|order|call|act|apply|book|download|sign up|join|subscribe|enroll|register) (?:now|today)|free (?:shipping|trial|quote|gift|bonus|delivery|consultation|estimate|spins|returns)|"
    r"limited[- ](?:time|offer|stock)|best (?:price|deal|offer)s?|lowest price|click (?:here|below|the link)|\d+ ?% off|discount|coupon|promo code|special offer|money[- ]back|guarantee[ds]?\b|"
    r"satisfaction|no obligation|risk[- ]free|while supplies last|don't miss|hurry|exclusive (?:offer|deal)|earn (?:up to )?\$|make money|work from home|casino|jackpot|poker|betting|payday|"
    r"loan approval|cheap|for sale|wholesale|in stock|add to cart|checkout|lose weight|weight loss|miracle|viagra|cialis|pharmacy|replica|whatsapp|telegram|dm us|text us|toll[- ]free|"
    r"1-8\d\d-|follow us|subscribe|newsletter|sponsored|affiliate|unbeatable|top[- ]rated|premium quality|100% (?:natural|genuine|authentic|satisfaction)|instant approval|bad credit|limited spots|"
    r"from home|no (?:skills?|experience) (?:needed|required)|(?:spots?|seats?|places) (?:left|remaining)|start earning|link in (?:my|the) (?:bio|profile)|visit (?:the|my) link|"
    r"gift card|claim (?:your|a|the)|(?:your|a|free|cash) (?:prize|reward)|you (?:have|are|'ve) (?:been )?(?:selected|chosen|won)|congratulations|offer (?:ends|expires)|no purchase|click the (?:button|link)|"
    r"(?:respond|reply|enter) (?:now|today)|hiring (?:now|immediately)|no (?:experience|interview|degree)\b|(?:weekly|daily|same[- ]day) pay|(?:positions?|spots?) left|must be (?:18|21))"
)
PER = {"zh": 100, "en": 250}  # visible characters that one advertising phrase may have to itself
CALM = 5  # different phrases that a text in plain sentences may not have
FULL_STOP = re.compile(r"。|\.(?:\s|$)")
MAX_ADVERT = 5000  # characters; leaflets are short, and the search is the dearest of all rules


def advert_score(page: Page) -> float:
    """Different advertising phrases, per 100 Chinese or 250 English characters, times their number.

    Below three different ones it is 0, and below five in a text that is told in sentences without raising its
    voice: a report on fraud says 客服 and 点击链接 too.
    """
    text = page.text[:MAX_ADVERT]
    if page.language == "zh":
        found = CHINESE_ADVERTS.findall(text)
    else:
        found = ENGLISH_ADVERTS.findall(text.lower())
    different = len(set(found)) + ("!!" in text) + ("$$" in text)
    if different < (3 if _shouts(text) else CALM):
        return 0.0
    return (
        different
        * different
        / max(1.0, min(page.visible, MAX_ADVERT) / PER.get(page.language, 250))
    )


def _shouts(text: str) -> bool:
    """Whether a text has exclamation marks, or hardly a full stop."""
    stops = len(FULL_STOP.findall(text))
    return "!" in text or "！" in text or stops * 120 < len(text)


def _adverts(page: Page, limits: Thresholds) -> Rejection | None:
    score = advert_score(page)
    if score > limits.max_advert_score:
        return Rejection("advertising", f"{score:.1f} > {limits.max_advert_score:g}")
    return None
