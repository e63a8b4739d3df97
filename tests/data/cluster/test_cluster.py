"""The Beam pipeline makes what the stages of one machine make, document for document."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam")
from apache_beam.io.filesystem import FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem

from llm_jax.data.clean.rules import CleanConfig
from llm_jax.data.clean.stage import CleanStage, clean_stage
from llm_jax.data.cluster import writing
from llm_jax.data.cluster.stage import ClusterConfig, cluster_stage
from llm_jax.data.prepare import PrepareConfig, prepare
from llm_jax.data.shards import open_prepared
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.run import cli, data
from tests.data.cluster.conftest import HOLDOUT, REJECTS


@pytest.fixture
def run(raw, byte_tokenizer, tmp_path):
    """Runs the pipeline on Beam's local runner."""

    def run_(*options: str, **settings):
        known = {
            "sources": raw,
            "tokenizer": str(byte_tokenizer),
            "output": str(tmp_path / "out"),
            "keep": ("zh", "en"),
            "holdout_fraction": HOLDOUT,
            "max_reject_fraction": REJECTS,
        }
        return cluster_stage(ClusterConfig(**{**known, **settings}), list(options))

    return run_


def read_json(path: Path):
    return json.loads(path.read_text("utf-8"))


def tokens(folder: Path) -> dict[tuple[str, str], list[list[int]]]:
    """All documents of prepared data, in order."""
    return {
        (name, split): [found.document(i).tolist() for i in range(found.num_documents)]
        for name, splits in open_prepared(folder).sources.items()
        for split, found in splits.items()
    }


def test_the_pipeline_gives_the_shards_and_reports_of_one_machine(run, local, tmp_path, capsys):
    manifest = run()
    out = tmp_path / "out"
    assert open_prepared(out).digest == open_prepared(local / "prepared").digest
    assert open_prepared(out).verify() > 0
    assert read_json(out / "report.json") == read_json(local / "clean/report.json")
    assert (out / "report.html").read_bytes() == (local / "clean/report.html").read_bytes()
    assert (out / "rejects.jsonl").read_bytes() == (local / "clean/rejects.jsonl").read_bytes()
    cleaned = read_json(local / "clean/manifest.json")["sources"]
    languages = read_json(local / "language/manifest.json")["seen"]
    for name, read in manifest["read"].items():
        assert read["rules"] == cleaned[name]["rules"]
        assert read["rejects"] == cleaned[name]["rejects"]
        for kind in ("kept", "dropped"):
            assert read["languages"][kind] == languages[name][kind]
    dedup = read_json(local / "dedup/manifest.json")["sources"]
    assert {n: e["repeats"] for n, e in manifest["sources"].items()} == {
        name: entry["repeats"] for name, entry in dedup.items()
    }
    assert sum(entry["repeats"]["near"] for entry in dedup.values()) >= 20
    assert sum(entry["repeats"]["exact"] for entry in dedup.values()) >= 20
    ours, theirs = (
        [(p["similarity"], p["dropped_text"], p["kept_text"]) for p in read_json(f)["samples"]]
        for f in (out / "pairs-report.json", local / "dedup/report.json")
    )
    assert ours == theirs
    assert not list(out.rglob("*.partial"))
    assert not (out / "scratch").exists()
    assert cli.run(data.main, ["verify", str(out)]) == 0
    assert "web/2.jsonl.gz" in capsys.readouterr().out


def test_threads_and_small_shards_change_nothing_but_the_cuts(run, local, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_BITS", 3)
    run(
        *("--direct_running_mode=multi_threading", "--direct_num_workers=3"),
        shard_max_tokens=20_000,
    )
    out = tmp_path / "out"
    assert tokens(out) == tokens(local / "prepared")
    shards = [shard.num_tokens for shard in open_prepared(out).shards()]
    assert len(shards) > 8
    assert max(shards) <= 20_000
    assert cli.run(data.main, ["verify", str(out), "--quiet"]) == 0


def test_without_stages_all_documents_are_kept_as_prepare_keeps_them(
    run, raw, byte_tokenizer, tmp_path, monkeypatch
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run(stages=(), keep=())
    # one folder, which goes at the exit
    assert [path.name[:13] for path in temporary.iterdir()] == ["llm-jax-beam-"]
    config = PrepareConfig(
        sources=raw,
        tokenizer=str(byte_tokenizer),
        output=str(tmp_path / "local"),
        holdout_fraction=HOLDOUT,
        max_reject_fraction=REJECTS,
        drop_duplicates=False,
    )
    assert prepare(config).digest == open_prepared(tmp_path / "out").digest


def test_a_reference_scores_and_drops_and_is_recorded_as_on_one_machine(run, raw, tmp_path, capsys):
    from llm_jax.data.language_stage import LanguageStage, language_stage

    # made by a stage of ours, so that the chain goes on behind it
    sample = SourceConfig(name="good", format="sample", path="zh")
    clean_stage(CleanStage(sources=(sample,), output=str(tmp_path / "good")))

    judged = {
        "keep": ("zh",),
        "references": (SourceConfig(name="zh", path=f"{tmp_path}/good/good"),),
        "max_bits": 8.0,
    }
    manifest = run(stages=("language",), **judged)
    config = LanguageStage(
        sources=raw, output=str(tmp_path / "local"), max_reject_fraction=REJECTS, **judged
    )
    expected = language_stage(config)
    for name, read in manifest["read"].items():
        seen = {key: expected["seen"][name][key] for key in ("kept", "dropped", "samples")}
        assert read["languages"] == seen
    assert any(
        "unlike" in key for r in manifest["read"].values() for key in r["languages"]["dropped"]
    )
    assert manifest["references"] == expected["references"]
    assert manifest["references"]["zh"]["made_by"][0]["folder"] == f"{tmp_path}/good"
    assert cli.run(data.main, ["verify", str(tmp_path / "out")]) == 0
    assert "reference zh: " in capsys.readouterr().out
    (tmp_path / "good/good/part-00000.jsonl.zst").write_bytes(b"another text")
    assert cli.run(data.main, ["verify", str(tmp_path / "out"), "--quiet"]) == 2
    assert "BAD  reference zh: " in capsys.readouterr().out


class Elsewhere(LocalFileSystem):
    """ "else:/PATH" is PATH here, without folders: what gs:// and s3:// look like to Beam."""

    @classmethod
    def scheme(cls):
        return "else"

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        here = Path(dir_or_prefix.removeprefix("else:/"))
        for path in sorted(here.parent.rglob("*")):
            if path.is_file() and str(path).startswith(str(here)):
                yield FileMetadata(f"else:/{path}", path.stat().st_size)

    def exists(self, path):
        return Path(path.removeprefix("else:/")).is_file()

    def metadata(self, path):
        return super().metadata(path.removeprefix("else:/"))

    def match_files(self, file_metas, pattern):
        plain = pattern.removeprefix("else:/")
        for found in file_metas:
            found = FileMetadata(found.path.removeprefix("else:/"), found.size_in_bytes)
            for match in super().match_files([found], plain):
                yield FileMetadata(f"else:/{match.path}", match.size_in_bytes)

    def open(self, path, *rest, **more):
        return super().open(path.removeprefix("else:/"), *rest, **more)

    def create(self, path, *rest, **more):
        return super().create(path.removeprefix("else:/"), *rest, **more)

    def delete(self, paths):
        for path in paths:
            Path(path.removeprefix("else:/")).unlink()


def test_remote_files_are_fetched_and_published_through_beam(
    run, raw, local, byte_tokenizer, tmp_path
):
    remote = tuple(SourceConfig(name=s.name, path=f"else:/{s.path}") for s in raw)
    words = tmp_path / "block.txt"
    words.write_text("一个不会出现的词\n", encoding="utf-8")
    rules = CleanConfig(
        rules=(*CleanConfig().rules[:4], "block_list", *CleanConfig().rules[4:]),
        block_list=f"else:/{words}",
    )
    settings = {"sources": remote, "tokenizer": f"else:/{byte_tokenizer}", "rules": rules}
    manifest = run(output=f"else:/{tmp_path}/out", **settings)
    assert open_prepared(tmp_path / "out").digest == open_prepared(local / "prepared").digest
    assert not list((tmp_path / "out/scratch").iterdir())
    files = [f["file"] for f in manifest["inputs"]["web"]["files"]]
    assert files == [f"else:/{raw[0].path}/{name}" for name in ("1.jsonl", "2.jsonl.gz", "3.jsonl")]
    with pytest.raises(DataError, match="already exists; choose another output"):
        run(output=f"else:/{tmp_path}/out", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_reject_fraction": 0.001}, "more than max_reject_fraction=0.001 allows"),
        ({"max_drop_fraction": 0.01}, "more than max_drop_fraction=0.01 allows"),
        ({"keep": ("ko",)}, "no document of any source is kept"),
    ],
)
def test_what_stops_one_machine_stops_the_pipeline_and_leaves_nothing(
    run, tmp_path, settings, message
):
    with pytest.raises(DataError, match=message):
        run(**settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [[], ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]]
)
def test_a_damaged_file_is_named_in_one_line(run, tmp_path, options):
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b torn")
    source = SourceConfig(name="bad", path=str(tmp_path / "bad.jsonl.gz"))
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz: ") as caught:
        run(*options, sources=(source,))
    assert str(caught.value).endswith("fetch it again")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--runer=DirectRunner"], {}, "did you mean '--runner'"),
        (["--runner=NoRunner"], {}, "NoRunner"),
        ([], {"stages": ("clean", "dedupe")}, "did you mean 'dedup'"),
        ([], {"stages": ("clean",)}, "keep needs the stage 'language'"),
        ([], {"threshold": 0.1}, "threshold=0.1 must be between"),
        ([], {"holdout_fraction": 0.9}, "holdout_fraction=0.9 must be between"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(run, tmp_path, options, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(*options, **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_the_pipeline_with_beams_options_after_two_dashes(
    capsys, raw, local, byte_tokenizer, tmp_path
):
    words = ["beam", "--tokenizer", str(byte_tokenizer), "--output", str(tmp_path / "out")]
    words += [w for s in raw for w in ("--source", f"{s.name}={s.path}")]
    words += ["--keep", "zh,en", "--max-reject-fraction", f"{REJECTS}"]
    words += ["--holdout-fraction", f"{HOLDOUT}", "--", "--runner=DirectRunner"]
    assert cli.run(data.main, words) == 0
    out = capsys.readouterr().out
    assert "near repeats" in out
    digest = open_prepared(local / "prepared").digest
    assert f"prepared data in {tmp_path}/out, digest {digest[:16]}" in out.replace("\n", "")
    assert np.load(tmp_path / "out/web.zh/train-00000.tokens.npy").dtype == np.uint16
