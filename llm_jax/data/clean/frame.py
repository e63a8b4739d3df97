"""Texts that are no text of an author but what a program puts around one: banners, login walls, footers, logs.

A manual says "log in" and "privacy policy" inside sentences; a banner or a menu has them as items that stand
alone. So a phrase counts where it stands in a short piece without a sentence, and only what nobody writes in
running text (ICP numbers, consent to cookies by going on) counts anywhere. As for advertising it takes several
different ones close together. What stands in a template where text will be (lorem ipsum, as in C4's rules) counts
by itself.
"""

import re
from collections import Counter

from llm_jax.data.clean.page import Page

ANYWHERE = re.compile(
    "[京沪粤浙苏鲁川闽津渝]?ICP[备证]|公网安备|经营许可证|版权所有|保留所有权利|(?:继续|点击)[^。\n]{0,24}(?:即表示|表示您?|视为)[^。\n]{0,10}同意|使用(?: ?[Cc]ookies?)|改善您的|我已阅读并同意|网站标识码|"
    r"(?i:powered by|all rights reserved|copyright|all times are|the time now is|you agree to (?:our|the)|we (?:and our .{0,20})?use cookies|site uses cookies|value your privacy|our (?:\d+ )?partners|"
    r"(?:on|to) your device|enable javascript|javascript is (?:required|disabled)|processed in [\d.]+ second)"
)
# what stands between a visitor and the page
GATE = re.compile(
    "安全验证|异常流量|访问(?:过于|太)频繁|(?:拖动|按住)[^。\n]{0,4}滑块|看不清[?？]|换一张|完成[^。\n]{0,6}验证后|(?:请求|事件)(?:编号|ID)|人机(?:验证|识别)|您的IP|防护系统|"
    r"(?i:(?:verify|confirm)(?:ing)? (?:that )?you(?:'re| are) (?:a )?(?:human|not a robot)|checking (?:if the site|your browser)|\bray id\b|unusual (?:traffic|activity)|security of your connection|"
    r"needs to review|before proceeding|why am i seeing this|complet(?:e|ing) the (?:action|captcha|security check)|select all (?:images|squares)|malicious bots|enable cookies|incident id|ddos protection)"
)
# plain strings: a pattern of them, blind to case, costs a sixth of all cleaning
TEMPLATE_ZH = (
    *(
        "您的内容打在这里",
        "选择只保留文字",
        "单击此处编辑",
        "单击此处添加",
        "点击此处添加",
        "此处添加文字",
    ),
    *(
        "此处添加标题",
        "此处添加内容",
        "此处输入文字",
        "此处输入标题",
        "在此输入文字",
        "在此添加文字",
    ),
    *("Lorem ipsum", "lorem ipsum"),
)
TEMPLATE_EN = (
    *(
        "lorem ipsum",
        "dolor sit amet",
        "click here to add your own text",
        "click to add t",
        "edit this text",
    ),
    *("your text here", "your text goes here", "your content here", "i'm a paragraph"),
    *("welcome to wordpress. this is your first post", "this is an example page"),
)
LONGEST_TEMPLATE = 5000  # characters looked at
TEMPLATE_PER = 200  # characters that one such phrase may have to itself
ITEM = re.compile(
    "登录|注册|忘记密码|验证码|手机号|记住我|用户协议|服务协议|服务条款|隐私|接受|拒绝|同意|了解更多|偏好|(?i:cookies?)|友情链接|网站地图|首页|收藏|关于我们|联系我们|招聘信息|返回|快速回复|只看该作者|"
    "倒序浏览|道具|举报|上一[页篇章]|下一[页篇章]|手机版|小黑屋|客户端|下载|打开|扫|分享|点赞|回复|评论|加载|请稍候|浏览器版本|注册时间|最后登录|积分|精华|设置|更多|立即|无障碍|"
    r"(?i:(?:sign|log) ?(?:in|out|up)\b|register\b|password|remember me|create an? |account|accept|reject|allow|decline|got it|consent|preferences|settings|options|show details|learn more|privacy|"
    r"terms|accessibility|ad ?choices|site ?map|contact|about us|careers|feedback|advertise|back to top|skip to|quick |previous|next|archive|join date|posts:|reply|thanked|rep power|senior member|"
    r"report|facebook|twitter|instagram|youtube|linkedin|google|apple|follow us|share|app store|subscribe|newsletter|please wait|loading|redirect|download|archiver|rss|help\b)"
)
PIECES = re.compile(r"[\n|·•»]+| {2,}|(?<=[\u4e00-\u9fff]) (?=[\u4e00-\u9fff])| - ")
SENTENCE = re.compile(r"[。！？；，,;]|[.!?](?:\s|$)")
SHORT = {"zh": 14, "en": 32}  # characters of an item that stands alone
PER = {"zh": 100, "en": 250}  # visible characters that one phrase may have to itself
LEAST = 3  # different phrases
LONGEST = 1000  # visible characters; a longer text is more than its frame

# a stamp of time, a name in brackets, or what chat servers say, at the start of a line
LOG = re.compile(
    r"\[?\d{1,4}[-/.:年]\d{1,2}[-/.:月]\d{1,2}|\[\d{1,2}:\d\d|[A-Z][a-z]{2} +\d{1,2} \d\d:\d\d:\d\d|<[@+~%&]?[\w^|`\[\]{}\\-]{1,20}> |"
    r"[*-]{1,3} \S+ (?:\(\S+@\S+\) )?(?:has (?:joined|left|quit)|is now known as|sets mode)|\S{1,24}[ :：]+\d{4}[-/.]\d{1,2}[-/.]\d{1,2}"
)
LOG_LINES = 6
LOOKED_AT = 100  # lines; a log is one from the start
SPOKEN = 24  # characters, the time included
DIGITS = re.compile(r"\d+")


def frame_score(page: Page) -> float:
    """Different phrases of a page's frame, squared, per 100 Chinese or 250 English characters.

    0 for long texts and below three different ones.
    """
    if page.visible > LONGEST:
        return 0.0
    language = "zh" if page.language == "zh" else "en"
    found = {match.lower() for match in (*ANYWHERE.findall(page.text), *GATE.findall(page.text))}
    for piece in PIECES.split(page.text):
        if len(piece) <= SHORT[language] and not SENTENCE.search(piece):
            found.update(match.lower() for match in ITEM.findall(piece))
    if len(found) < LEAST:
        return 0.0
    return len(found) ** 2 / max(1.0, page.visible / PER[language])


def template_phrase(page: Page) -> str:
    """A phrase of a template, where they are as close together as in one; else ""."""
    text, phrases = page.text[:LONGEST_TEMPLATE], TEMPLATE_ZH
    if page.language != "zh":
        text, phrases = text.lower(), TEMPLATE_EN
    found = [phrase for phrase in phrases if phrase in text]
    size = min(page.visible, LONGEST_TEMPLATE)
    return found[0] if found and sum(map(text.count, found)) * TEMPLATE_PER >= size else ""


def log_share(lines: list[str]) -> float:
    """Share of the lines that start like those of a log; 0 for a few lines.

    What somebody said stands behind a time in a transcript, too: a whole sentence that is there once.
    """
    if len(lines) < LOG_LINES:
        return 0.0
    lines = lines[:LOOKED_AT]
    logged = [line for line in lines if LOG.match(line)]
    shapes = Counter(DIGITS.sub("", line) for line in logged)
    spoken = sum(
        len(line) >= SPOKEN and line[-1] in ".!?。！？…" and shapes[DIGITS.sub("", line)] == 1
        for line in logged
    )
    return (len(logged) - spoken) / len(lines)
