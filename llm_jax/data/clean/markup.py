"""HTML out, text in; and lines of a page that are not its text.

Only tags that HTML has are taken for tags, so `#include <vector>` and `List<int>` stay; nothing inside
a Markdown code fence or inline code is touched.
"""

import html
import re
from dataclasses import dataclass

from llm_jax.data.clean.frame import frame_score, template_phrase
from llm_jax.data.clean.page import Page, Rejection

BLOCK_TAGS = (
    "address article aside blockquote body br button caption center dd div dl dt fieldset figcaption "
    "figure footer form h1 h2 h3 h4 h5 h6 head header hr html iframe input label legend li link main "
    "meta nav noscript ol optgroup option p pre section select table tbody td textarea tfoot th thead "
    "title tr ul"
)
INLINE_TAGS = (
    "a abbr b bdi bdo big cite code del dfn em font i img ins kbd mark nobr q rp rt ruby s samp small "
    "span strike strong sub sup tt u var wbr"
)
CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(
    r"<!--.*?-->|<!doctype[^>]*>|<(script|style|svg|noscript|template)\b[^>]*>.*?</\1\s*>",
    re.IGNORECASE | re.DOTALL,
)
BLOCK = re.compile(rf"</?(?:{BLOCK_TAGS.replace(' ', '|')})(?:\s[^<>]*)?/?>", re.IGNORECASE)
INLINE = re.compile(rf"</?(?:{INLINE_TAGS.replace(' ', '|')})(?:\s[^<>]*)?/?>", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")
DATA_URI = re.compile(
    r"!?\[[^\]\n]*\]\(data:[^)\s]*\)|data:[a-z]+/[a-z0-9.+-]+;base64,[A-Za-z0-9+/=]+"
)
FRONT_MATTER = re.compile(r"\A---\n(?:[A-Za-z_][\w-]*:.*\n|[ \t#-].*\n|\n)+---\n+")


@dataclass(frozen=True, kw_only=True)
class MarkupConfig:
    """What `markup` takes out."""

    tags: bool = True  # HTML tags, comments, scripts and styles; blocks leave a line end
    entities: bool = True  # &amp; and &#20013; become what they stand for
    data_uris: bool = True  # pictures written into the text as base64
    front_matter: bool = True  # a YAML block before a Markdown text


def markup(page: Page, config: MarkupConfig) -> str | None:
    """The text without markup, or None when it has none."""
    text = page.text
    if config.front_matter and text.startswith("---\n"):
        text = FRONT_MATTER.sub("", text, count=1)
    has_tags, has_entities = config.tags and "<" in text, config.entities and "&" in text
    if config.data_uris and "base64," in text:
        text = DATA_URI.sub("", text)
    if has_tags or has_entities:
        parts = CODE.split(text) if "`" in text or "~~~" in text else [text]
        parts[::2] = [_strip(part, has_tags, has_entities) for part in parts[::2]]
        text = "".join(parts)
    return None if text == page.text else text


def _strip(text: str, tags: bool, entities: bool) -> str:
    if tags and "<" in text:
        text = HIDDEN.sub("", text)
        text = BLOCK.sub("\n", text)
        text = INLINE.sub("", text)
    return ENTITY.sub(lambda match: html.unescape(match[0]), text) if entities else text


# lines that pages put around their text; each must match a whole line
BOILERPLATE = (
    r"(?:首页|主页|您?当前位置|你的位置)\s*[:：>»/|].*",
    r"(?:上一?篇|下一?篇|上一页|下一页|相关阅读|相关文章|相关推荐|推荐阅读|延伸阅读|热门文章|猜你喜欢)(?:\s*[:：].*)?",
    r"(?:责任编辑|责编|编辑|原标题|文章来源|本文来源|稿源|来源|关键词|标签|分享到|打印本页|字号)\s*[:：].{0,60}",
    r".{0,30}(?:版权所有|版权声明|All [Rr]ights [Rr]eserved|ICP[备证]|公网安备).{0,80}",
    r"(?:©|\(c\)|Copyright)\s.{0,80}",
    r".{0,12}(?:扫一扫|扫描二维码|长按识别|关注(?:我们的)?(?:微信)?公众号|点击(?:此处|这里)?(?:查看|阅读)(?:更多|全文|原文)).{0,24}",
    r"(?:点赞|收藏|分享|转发|评论|举报|返回顶部|加载更多|展开全文|阅读全文|登录|注册)(?:\s*[|/·(（ ].{0,30})?",
    r"(?i:home|you are here|breadcrumbs?)\s*[:>»/|].*",
    r"(?i:skip to (?:main )?content|back to top|read more|load more|show more|click here(?: to .{0,40})?)[.!…»]*",
    r"(?i:share (?:this|on)|tweet this|follow us|like us on|posted (?:by|on|in)|filed under|tags?)\b.{0,60}",
    r"(?i:related (?:posts|articles|stories)|you may also like|popular posts|leave a (?:reply|comment)).{0,30}",
    r"(?i:(?:previous|next)(?: (?:post|article|page|entry))?)\s*[:>»←→]?",
    r"(?i:sign in|log in|register|subscribe)(?: (?:to|for|now|with) .{0,40})?",
    r"(?i:(?:this (?:site|website) uses|we use) cookies).{0,200}",
    r"(?i:(?:privacy policy|terms of (?:use|service)|contact us|about us|site ?map)(?:\s*[|·/•-].*)?)",
)
LINE = re.compile("|".join(f"(?:{pattern})" for pattern in BOILERPLATE))
LONGEST = 220


@dataclass(frozen=True, kw_only=True)
class BoilerplateConfig:
    """What `boilerplate` does with lines such as 上一篇：… or "Share this"."""

    max_share: float = 0.3  # of a document's lines; a page with more is no text but its frame
    max_frame_score: float = 6.0  # see `frame.frame_score`


def boilerplate(page: Page, config: BoilerplateConfig) -> str | Rejection | None:
    """The text without such lines, a rejection when they are most of it, None when there are none."""
    if (score := frame_score(page)) > config.max_frame_score:
        return Rejection("page frame", f"{score:.1f} > {config.max_frame_score:g}")
    if phrase := template_phrase(page):
        return Rejection("template without text", phrase)
    found = [line for line in set(page.lines) if len(line) <= LONGEST and LINE.fullmatch(line)]
    if not found:
        return None
    drop, total = set(found), len(page.lines)
    dropped = sum(line in drop for line in page.lines)
    if dropped > config.max_share * total:
        return Rejection("boilerplate", f"{dropped} of {total} lines > {config.max_share:g}")
    lines = page.text.split("\n")
    return "\n".join(line for line in lines if line.strip() not in drop).strip("\n")
