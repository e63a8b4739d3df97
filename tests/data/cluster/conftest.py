"""Raw files with everything in them that the stages decide on, and what one machine makes of them."""

import gzip
import json
import random
from pathlib import Path

import pytest

from llm_jax.data.clean.stage import CleanStage, clean_stage
from llm_jax.data.dedup.stage import DedupStage, dedup_stage
from llm_jax.data.documents import Rejects
from llm_jax.data.language_stage import LanguageStage, language_stage
from llm_jax.data.prepare import PrepareConfig, prepare
from llm_jax.data.sources import SourceConfig, read_documents
from tests.data.dedup.planted import repost

JUNK = Path(__file__).parents[1] / "junk"
HOLDOUT = 0.1
REJECTS = 0.2  # bad records are planted


def texts_of(format_: str, path: str, least: int) -> list[str]:
    source = SourceConfig(name="a", format=format_, path=path)  # pyright: ignore[reportArgumentType]
    return [d.text[:1500] for d in read_documents(source, Rejects()) if len(d.text) > least]


def junk(language: str) -> list[str]:
    with open(JUNK / f"{language}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> tuple[SourceConfig, ...]:
    """Two sources: `web` of three files in two formats of compression, `docs` of one file."""
    folder = tmp_path_factory.mktemp("raw")
    rng = random.Random(5)
    zh, en = texts_of("sample", "zh", 300)[:60], texts_of("package-docs", "rich", 400)[:60]
    near = [repost(t, "zh", rng) for t in zh[:12]] + [repost(t, "en", rng) for t in en[:12]]
    again = [repost(near[0], "zh", rng), *zh[20:26], *en[20:26]]
    web = [*zh[:40], *en[:40], *near, *again, *junk("zh")[:40], *junk("en")[:40]]
    rng.shuffle(web)
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in web]
    for place in range(0, len(lines), 11):
        lines.insert(place, (b'{"text": 3}\n', b"{\n", b'{"txt": "a"}\n')[place % 3])
    lines.insert(7, b'{"text": "' + "他说 ".encode() * 50 + b'\\ud800"}\n')
    (folder / "web").mkdir()
    third = len(lines) // 3
    (folder / "web/1.jsonl").write_bytes(b"".join(lines[:third]))
    (folder / "web/2.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[third : 2 * third])))
    (folder / "web/3.jsonl").write_bytes(b"".join(lines[2 * third :]))
    docs = [*zh[30:], *en[30:], repost(en[1], "en", rng)]
    rows = (json.dumps({"text": text}) + "\n" for text in docs)
    (folder / "docs.jsonl").write_text("".join(rows))
    return tuple(
        SourceConfig(name=n, path=str(folder / p))
        for n, p in (("web", "web"), ("docs", "docs.jsonl"))
    )


@pytest.fixture(scope="session")
def local(raw, byte_tokenizer, tmp_path_factory) -> Path:
    """clean -> language -> dedup -> prepare on one machine, each in a folder of its name."""
    root = tmp_path_factory.mktemp("local")
    clean_stage(CleanStage(sources=raw, output=f"{root}/clean", max_reject_fraction=REJECTS))
    language_stage(
        LanguageStage(
            sources=tuple(SourceConfig(name=s.name, path=f"{root}/clean/{s.name}") for s in raw),
            output=f"{root}/language",
            keep=("zh", "en"),
        )
    )
    names = [f"{source.name}.{language}" for source in raw for language in ("en", "zh")]
    dedup_stage(
        DedupStage(
            sources=tuple(SourceConfig(name=n, path=f"{root}/language/{n}") for n in names),
            output=f"{root}/dedup",
        )
    )
    prepare(
        PrepareConfig(
            sources=tuple(SourceConfig(name=n, path=f"{root}/dedup/{n}") for n in names),
            tokenizer=str(byte_tokenizer),
            output=f"{root}/prepared",
            holdout_fraction=HOLDOUT,
        )
    )
    return root
