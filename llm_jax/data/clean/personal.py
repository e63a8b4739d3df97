"""Personal data: found by shape and checked by check digits, then replaced by a name in brackets.

E-mail addresses, public IPv4 addresses, mainland mobile numbers, resident identity numbers (GB 11643,
ISO 7064 MOD 11-2) and bank cards (Luhn). A number that fails its check stays.
"""

import ipaddress
import re
from dataclasses import dataclass

from llm_jax.data.clean.page import Page

# from the @ on: a pattern that starts with the local part is tried at every character of a text
HOST = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w-])", re.ASCII)
LOCAL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}\Z", re.ASCII)
LONGEST_LOCAL = 65
EXAMPLES = re.compile(r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost)(?:\.(?:com|org|net))?$")
# no look-behind here: a pattern that starts with a digit is searched for ten times as fast
IP = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9]|\.[0-9])")
MOBILE = re.compile(r"(?<![\d.])(?:(?:\+|00)?86[ -]?)?1[3-9]\d([ -]?)\d{4}\1\d{4}(?![\d.]\d|\d)")
RESIDENT = re.compile(
    r"(?<!\d)[1-8]\d{5}(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)"
)
CARD = re.compile(r"(?<![\d.])[2-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{1,7}(?!\d)")
LONG_NUMBER = re.compile(r"\d{3}[ -]?\d{4}[ -]?\d{4}")
RESIDENT_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
RESIDENT_DIGITS = "10X98765432"


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """What each kind is replaced by; an empty string turns the kind off."""

    email: str = "[email]"
    public_ip: str = "[ip]"
    mobile: str = "[phone]"
    resident_id: str = "[id]"
    bank_card: str = "[card]"


def personal(page: Page, config: PersonalConfig) -> str | None:
    """The text with personal data replaced, or None when there is none."""
    text = page.text
    if config.email and "@" in text:
        text = _replace_email(text, config.email)
    if config.public_ip and "." in text:
        text = IP.sub(
            lambda m: config.public_ip if _stands_alone(m) and is_public_ip(m[0]) else m[0], text
        )
    if LONG_NUMBER.search(text):  # the three below hold one
        # the longest first: a resident number holds what looks like a mobile number
        if config.resident_id:
            text = RESIDENT.sub(
                lambda m: config.resident_id if is_resident_id(m[0]) else m[0], text
            )
        if config.bank_card:
            text = CARD.sub(lambda m: config.bank_card if is_bank_card(m[0]) else m[0], text)
        if config.mobile:
            text = MOBILE.sub(config.mobile, text)
    return None if text == page.text else text


def _replace_email(text: str, name: str) -> str:
    parts, done = [], 0
    for host in HOST.finditer(text):
        local = LOCAL.search(text, max(done, host.start() - LONGEST_LOCAL), host.start())
        if local is None or EXAMPLES.search(host[0]):
            continue
        parts += [text[done : local.start()], name]
        done = host.end()
    return "".join(parts) + text[done:]


def _stands_alone(match: re.Match[str]) -> bool:
    """Whether no digit or dot comes before, as in a version number of five parts."""
    start = match.start()
    return start == 0 or match.string[start - 1] not in "0123456789."


def is_public_ip(text: str) -> bool:
    """Whether the dotted quad is an address that is routed on the internet."""
    try:
        return ipaddress.IPv4Address(text).is_global
    except ValueError:
        return False


def is_resident_id(text: str) -> bool:
    """Whether the last of 18 characters is the check digit of the others."""
    total = sum(int(d) * w for d, w in zip(text[:17], RESIDENT_WEIGHTS, strict=True))
    return RESIDENT_DIGITS[total % 11] == text[17].upper()


def is_bank_card(text: str) -> bool:
    """Whether 13 to 19 digits pass Luhn's test."""
    digits = [int(character) for character in text if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
