"""Which tokens are special: read from the files beside a tokenizer, and told by their look.

A special id stands for no text. It is put in by its id (BOS, EOS, a chat template) and must never
come out of encoding what a user typed, or anyone could end a document or speak as the system.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files

# Pieces that are markers although their file marks them as ordinary text to be matched: ChatML and fill-in-the-middle
# (<|fim_prefix|>), Gemma (<start_of_turn>, <unused7>), Mistral ([INST], [/INST]), DeepSeek (full-width bars).
# Not here: <think>, <tool_call> and HTML tags, which models write and read as text.
MARKER = re.compile(r"<\|.+\|>|<｜.+｜>|<\w+_of_\w+>|<unused_?\d+>|\[/?[A-Z_]{2,}\]")

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def is_marker(piece: str) -> bool:
    """Whether a piece that a file declares as matched text is a control marker by its look."""
    return MARKER.fullmatch(piece) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """What the companion files say."""

    roles: dict[
        str, str
    ]  # role -> piece; "" when the file says there is none; only roles that are named
    added: dict[
        int, str
    ]  # id -> piece, for special tokens and for those beyond the model's own pieces
    special: frozenset[int]  # the ids of `added` that are flagged special
    where: str  # the files, for messages

    def resolve(self, role: str, id_of: Callable[[str], int], default: int) -> int:
        """The id with this role: the declared one, else `default`; -1 when declared as none.

        Raises:
          DataError: the declared piece has no id.
        """
        if role not in self.roles:
            return default
        piece = self.roles[role]
        found = id_of(piece) if piece else -1
        if piece and found < 0:
            raise DataError(f"{self.where}: {role}={piece!r} is not in the tokenizer's vocabulary")
        return found


def declared(files: Mapping[str, bytes]) -> Declared:
    """Reads the companions among `files`; without any, nothing is declared.

    `tokenizer_config.json` is the newer format and wins over `special_tokens_map.json`.
    """
    roles: dict[str, str] = {}
    added: dict[int, str] = {}
    special: set[int] = set()
    present = [name for name in tokenizer_files.COMPANIONS if name in files]
    for name in present:
        data = tokenizer_files.parse_json(files[name], name)
        if name == "added_tokens.json":
            added |= {_id(value, name): piece for piece, value in data.items()}
            continue
        for role in ROLES:
            if role in data and role not in roles:
                roles[role] = _piece(data[role], f"{name}: {role}")
        entries = data.get("added_tokens_decoder", {})
        if not isinstance(entries, dict):
            raise DataError(f"{name}: added_tokens_decoder must be an object from id to token")
        for key, entry in entries.items():
            token = _id(key, f"{name}: added_tokens_decoder")
            added[token] = _piece(entry, f"{name}: added_tokens_decoder.{key}")
            if entry.get("special", False) if isinstance(entry, dict) else False:
                special.add(token)
    return Declared(roles=roles, added=added, special=frozenset(special), where=", ".join(present))


def _id(value: Any, where: str) -> int:
    """An id, written as a number or, as a JSON key, as digits."""
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) >= 1 << 24:
        raise DataError(f"{where}: {value!r} is not a token id (0 .. 16777215)")
    return int(text)


def _piece(value: Any, where: str) -> str:
    """The text of a token, written as a string, as `{"content": ...}`, or as null for none."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}={value!r} must be a string, or an object with `content`")
    return value
