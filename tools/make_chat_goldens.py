"""Writes tests/golden/chat.json: ids and masks of conversations as transformers makes them.

Run: .venv/bin/python tools/make_chat_goldens.py        (needs transformers)
Expect: 8 templates of 8 conversations each; the file changes only when a template does.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from llm_jax.instruct.templates import TEMPLATES
from tests.instruct import chat_cases

OUT = Path(__file__).parent.parent / "tests" / "golden" / "chat.json"


def main() -> None:
    """Makes the file."""
    tokenizer = chat_cases.byte_level()
    made = chat_cases.conversations(8, seed=3)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for name, template in TEMPLATES.items():
            loaded = chat_cases.open_theirs(tokenizer, template, Path(folder) / name)
            for turns in made:
                ids, mask = chat_cases.apply(loaded, turns)
                cases.append(
                    {"template": name, "turns": [list(t[:2]) for t in turns]}
                    | {"ids": ids, "mask": mask}
                )
    files = {name: content.decode() for name, content in tokenizer.files.items()}
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    text = f'{{"tokenizer": {json.dumps(files, ensure_ascii=False)},\n"cases": [\n{lines}\n]}}\n'
    OUT.write_text(text, encoding="utf-8")
    print(f"{len(cases)} conversations in {OUT}")


if __name__ == "__main__":
    main()
