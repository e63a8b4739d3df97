"""Lists that a user brings: one spelling per term, and what no document may hold.

A term table has a line `wrong<TAB>right` (or `wrong -> right`) for each spelling; a block list one
phrase a line, or `/regular expression/`. `#` starts a comment.
"""

import re
from collections.abc import Callable
from pathlib import Path

from llm_jax.data.clean.page import Page, Rejection
from llm_jax.errors import ConfigError


def term_rule(path: str) -> Callable[[Page], str | None]:
    """A rule that gives every term of the table its one spelling. Longest first; Latin whole words only."""
    table: dict[str, str] = {}
    for number, line in _lines(path):
        wrong, separator, right = line.partition("\t" if "\t" in line else "->")
        wrong, right = wrong.strip(), right.strip()
        if not separator or not wrong:
            raise ConfigError(
                f"{path}:{number}: {line!r} must be WRONG<TAB>RIGHT or WRONG -> RIGHT"
            )
        if table.get(wrong, right) != right:
            raise ConfigError(
                f"{path}:{number}: {wrong!r} already becomes {table[wrong]!r}; keep one"
            )
        table[wrong] = right
    for wrong, right in table.items():
        # else a second pass would change the text again
        chained = next((w for w in table if w != wrong and w in right and table[w] not in w), None)
        if wrong in right and wrong != right and not _bounded(wrong):
            chained = wrong
        if chained or table.get(right, right) != right:
            raise ConfigError(
                f"{path}: {wrong!r} becomes {right!r}, which holds the term {chained or right!r}; "
                "say where it ends"
            )
    pattern = _any_of(table)

    def rule(page: Page) -> str | None:
        text = pattern.sub(lambda match: table[match[0]], page.text)
        return None if text == page.text else text

    return rule


def block_rule(path: str) -> Callable[[Page], Rejection | None]:
    """A rule that rejects a document holding a phrase of the list, whatever its case."""
    phrases, expressions = [], []
    for number, line in _lines(path):
        if len(line) > 2 and line.startswith("/") and line.endswith("/"):
            try:
                re.compile(line[1:-1])
            except re.error as error:
                raise ConfigError(
                    f"{path}:{number}: {line!r} is no regular expression: {error}"
                ) from None
            expressions.append(f"(?:{line[1:-1]})")
        else:
            phrases.append(line.lower())
    pattern = re.compile("|".join([*expressions, *([_any_of(phrases).pattern] if phrases else [])]))

    def rule(page: Page) -> Rejection | None:
        found = pattern.search(page.text.lower())
        return Rejection("block list", f"holds {found[0]!r}") if found else None

    return rule


def _lines(path: str) -> list[tuple[int, str]]:
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"list {path!r} cannot be read: {error.strerror}") from None
    lines = [(n, line.strip()) for n, line in enumerate(content.split("\n"), start=1)]
    kept = [(n, line) for n, line in lines if line and not line.startswith("#")]
    if not kept:
        raise ConfigError(f"list {path!r} is empty; fill it, or leave its rule out")
    return kept


def _bounded(term: str) -> bool:
    """Whether the term is matched as a whole word at both ends."""
    return term[0].isascii() and term[0].isalnum() and term[-1].isascii() and term[-1].isalnum()


def _any_of(terms: list[str] | dict[str, str]) -> re.Pattern[str]:
    """Matches the longest of the terms; a Latin end must be the end of a Latin word."""
    parts = []
    for term in sorted(terms, key=len, reverse=True):
        before = r"(?<![A-Za-z0-9])" if term[0].isascii() and term[0].isalnum() else ""
        after = r"(?![A-Za-z0-9])" if term[-1].isascii() and term[-1].isalnum() else ""
        parts.append(before + re.escape(term) + after)
    return re.compile("|".join(parts))
