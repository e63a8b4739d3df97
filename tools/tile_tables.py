"""Tables of tiles as JSON a person can read and diff: one entry a line."""

import json
import re
from pathlib import Path
from typing import Any

ENTRY = re.compile(r"\{\n\s+(\"length\"[^{}]*?)\n\s+\}", re.DOTALL)


def read(path: Path) -> dict[str, Any]:
    """The whole table."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, table: dict[str, Any]) -> None:
    """The whole table, each entry (what starts with its length) on a line of its own."""
    flat = ENTRY.sub(_one_line, json.dumps(table, indent=1))
    path.write_text(flat + "\n", encoding="utf-8")


def _one_line(entry: re.Match[str]) -> str:
    text = re.sub(r"\s*\n\s*", " ", entry[1])
    return "{" + text.replace("[ ", "[").replace(" ]", "]") + "}"
