"""The stage `llm-jax data beam`: from raw files to token shards in one pipeline, on any runner of Beam.

The launcher lists the files, starts the pipeline, waits, checks what was counted, and writes reports and
manifest. What workers find out comes back in one file, as a runner need not be able to answer.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from llm_jax import tokenizer as tokenizers
from llm_jax.config import nearest
from llm_jax.data import shards
from llm_jax.data.clean.report import write_reports
from llm_jax.data.clean.rules import CleanConfig, cleaner
from llm_jax.data.clean.stage import CleanStage
from llm_jax.data.cluster.pipeline import build
from llm_jax.data.cluster.reading import ReadUnit
from llm_jax.data.cluster.tally import Tally, from_json, rejects_of, rules_of, seen_of
from llm_jax.data.cluster.units import (
    fetch,
    fetched_rules,
    is_remote,
    list_units,
    publish,
)
from llm_jax.data.cluster.writing import RESULT
from llm_jax.data.dedup.stage import REPORT as PAIRS_REPORT
from llm_jax.data.dedup.stage import DedupStage
from llm_jax.data.documents import Rejects
from llm_jax.data.language_stage import LanguageStage
from llm_jax.data.lineage import UNTRACKED, maker_records
from llm_jax.data.prepare import PrepareConfig, prepared_manifest, token_dtype
from llm_jax.data.shard_writer import new_folder, write_file
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer.base import Tokenizer

STAGES = ("clean", "language", "dedup")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The settings of the stages of one machine, in one place; what they mean is said there."""

    sources: tuple[SourceConfig, ...]
    tokenizer: str
    output: str  # folder to make; a remote one ("://") is complete when its manifest is there
    stages: tuple[str, ...] = STAGES  # before the shards
    rules: CleanConfig = CleanConfig()
    max_reject_fraction: float = 0.001
    max_drop_fraction: float = 1.0
    keep: tuple[str, ...] = ()
    references: tuple[SourceConfig, ...] = ()
    max_bits: float = 0.0
    threshold: float = 0.7
    shingle: int = 5
    exact_only: bool = False
    holdout_fraction: float = 0.01
    shard_max_tokens: int = 1 << 27  # one worker sorts a shard in its memory: 4 bytes a token
    overwrite: bool = False

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ConfigError(f"stages holds {stage!r}; {nearest(stage, STAGES)}")
        asked = {"keep": self.keep, "references": self.references}
        for name, value in asked.items():
            if value and "language" not in self.stages:
                raise ConfigError(f"{name} needs the stage 'language'; add it to stages")
        # the stages' own checks of these values
        reading = {"sources": self.sources, "output": self.output}
        CleanStage(
            **reading,
            max_reject_fraction=self.max_reject_fraction,
            max_drop_fraction=self.max_drop_fraction,
        )
        LanguageStage(**reading, keep=self.keep, references=self.references, max_bits=self.max_bits)
        self.dedup()
        self.prepare(self.output)

    def dedup(self) -> DedupStage | None:
        """What `data dedup` would be told; None when repeats stay."""
        stage = DedupStage(
            sources=self.sources,
            output=self.output,
            threshold=self.threshold,
            shingle=self.shingle,
            exact_only=self.exact_only,
        )
        return stage if "dedup" in self.stages else None

    def prepare(self, root: str) -> PrepareConfig:
        """What `data prepare` would be told."""
        return PrepareConfig(
            sources=self.sources,
            tokenizer=self.tokenizer,
            output=root,
            holdout_fraction=self.holdout_fraction,
            shard_max_tokens=self.shard_max_tokens,
        )


def cluster_stage(config: ClusterConfig, options: list[str]) -> dict[str, Any]:
    """Runs the pipeline and returns the manifest.

    Args:
      config: what to do.
      options: Beam's own pipeline options, such as `--runner=DataflowRunner`.

    Raises:
      ConfigError: an option or runner that Beam does not know.
      DataError: an unusable source or tokenizer, too many unreadable records or rejected documents,
        nothing kept, an output that exists. Nothing is left at a local `output` then, and no
        manifest at a remote one.
    """
    beam_options = _options(options)
    units, references = list_units(config.sources), list_units(config.references)
    with tempfile.TemporaryDirectory(prefix="llm-jax-") as scratch:
        folder = Path(scratch)
        cleaner(fetched_rules(config.rules, folder))  # a mistake in a list is told first
        tokenizer = _tokenizer(config.tokenizer, folder)
        parts = [unit.part for unit in (*units, *references) if unit.part]
        makers = maker_records([part.file for part in parts if not is_remote(part.file)])
        with _target(config) as root:
            saved = folder / "tokenizer-to-save"
            saved.mkdir()
            tokenizer.save(saved)
            files = tuple(sorted(file.name for file in saved.iterdir()))
            for name in files:
                publish(saved / name, f"{root}/{shards.TOKENIZER}/{name}")
            reader = ReadUnit(
                config.rules if "clean" in config.stages else None,
                config.keep if "language" in config.stages else None,
                config.max_bits,
            )
            with _told(), _temporary_files():
                pipeline = beam.Pipeline(options=beam_options)
                build(
                    *(pipeline, units, references, reader, config.dedup()),
                    *(config.prepare(root), files, token_dtype(tokenizer)),
                )
                pipeline.run().wait_until_finish()
            results = _results(f"{root}/{RESULT}", folder)
            _forget(f"{root}/{RESULT}")
            return _finish(config, tokenizer, results, makers, root, folder)


def _options(words: list[str]) -> PipelineOptions:
    """Beam's options. Those it does not know may be a runner's own, so only typing errors are refused."""
    parser = beam.options.pipeline_options._BeamArgumentParser(allow_abbrev=False)
    for kind in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if "_add_argparse_args" in vars(kind):
            kind._add_argparse_args(parser)
    known = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            remedy = nearest(option, known)
            if remedy.startswith("did you mean"):
                raise ConfigError(f"Beam knows no option {option!r}; {remedy}")
    return PipelineOptions(words)


def _tokenizer(path: str, folder: Path) -> Tokenizer:
    if not is_remote(path):
        return tokenizers.load(Path(path))
    copy = folder / "tokenizer"
    copy.mkdir()
    found = [
        file.path
        for match in FileSystems.match([path, path.rstrip("/") + "/*"])
        for file in match.metadata_list
    ]
    if not found:
        raise DataError(f"tokenizer {path!r} does not exist; give a folder or a file")
    for file in found:
        fetch(file, copy)
    return tokenizers.load(copy)


@contextmanager
def _target(config: ClusterConfig) -> Iterator[str]:
    """The folder that workers write to, and that is `output` when the block ends without error."""
    if not is_remote(config.output):
        with new_folder(config.output, config.overwrite) as made:
            yield str(made)
        return
    root = config.output.rstrip("/")
    manifest = f"{root}/{shards.MANIFEST}"
    if FileSystems.exists(manifest):
        if not config.overwrite:
            raise DataError(f"{root} already exists; choose another output or pass --overwrite")
        FileSystems.delete([manifest])
    yield root


@contextmanager
def _temporary_files() -> Iterator[None]:
    """Where Beam makes the folders that it leaves behind, three a run: one that goes at the exit.

    Not sooner, as a job server of Beam's removes its own then and fails where there is none.
    """
    folder, before = tempfile.mkdtemp(prefix="llm-jax-beam-"), tempfile.tempdir
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def _forget(file: str) -> None:
    """Removes a file, and its folder where there are folders."""
    if is_remote(file):
        FileSystems.delete([file])
        return
    Path(file).unlink()
    Path(file).parent.rmdir()


@contextmanager
def _told() -> Iterator[None]:
    """Turns what a worker or Beam found wrong with the user's input into our errors."""
    try:
        yield
    except Exception as error:
        # as it was raised, with a tail, or in a traceback inside an error of Beam's
        text = f"{type(error).__name__}: {error}"
        said = re.findall(r"(?:Data|Config)Error: (.+?)(?: \[while running .*)?$", text, re.M)
        if said:
            raise DataError(said[-1]) from error
        if isinstance(error, ValueError) and "pipeline runner" in text:
            raise ConfigError(f"Beam: {error}") from error
        raise


def _results(path: str, folder: Path) -> dict[str, list[Any]]:
    """What `write_result` wrote, by kind."""
    found: dict[str, list[Any]] = {}
    with open(fetch(path, folder), encoding="utf-8") as lines:
        for kind, value in map(json.loads, lines):
            found.setdefault(kind, []).append(value)
    return found


def _finish(
    config: ClusterConfig,
    tokenizer: Tokenizer,
    results: dict[str, list[Any]],
    makers: list[dict[str, str]],
    root: str,
    folder: Path,
) -> dict[str, Any]:
    """Checks the counts, writes reports, and the manifest last."""
    tallies = {name: from_json(value) for name, value in results["tally"]}
    report, counted, samples = {}, {}, ""
    for source in config.sources:
        total = tallies.get(source.name, Tally())
        rejects, rules = rejects_of(total), rules_of(total, config.rules.rules)
        rejects.check(source.name, config.max_reject_fraction)
        report[source.name] = {"rejects": rejects.report()}
        if "clean" in config.stages:
            rules.check(source.name, config.max_drop_fraction)
            counted[source.name] = rules
            report[source.name]["rules"] = rules.counts()
        if "language" in config.stages:
            report[source.name]["languages"] = seen_of(total).report()
        samples += rejects.lines(source.name)
    entries = _entries(config, results)
    out = folder / "reports"
    out.mkdir()
    write_file(out / shards.REJECTS, samples.encode("utf-8", "replace"))
    if counted:
        write_reports(out, counted)
    if "pairs" in results:
        pairs = json.dumps({"samples": results["pairs"][0]}, indent=1, ensure_ascii=False)
        write_file(out / f"pairs-{PAIRS_REPORT}", pairs.encode("utf-8", "replace"))
    inputs = _records(config.sources, results.get("file", []), makers)
    references = _records(config.references, results.get("reference", []), makers)
    for name, bits in results["bits"][0].items():
        references[name]["bits"] = bits
    more = {"pipeline": "beam", "read": report, "references": references}
    manifest = prepared_manifest(tokenizer, config, inputs, entries, **more)
    for file in sorted(out.iterdir()):
        publish(file, f"{root}/{file.name}")
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_file(out / shards.MANIFEST, text.encode("utf-8", "replace"))
    publish(out / shards.MANIFEST, f"{root}/{shards.MANIFEST}")
    return manifest


def _entries(config: ClusterConfig, results: dict[str, list[Any]]) -> dict[str, Any]:
    """The manifest's entry of each output source, in the order of the sources and their languages.

    Raises:
      DataError: no document is left.
    """
    read, unique = dict(results.get("read", [])), dict(results.get("unique", []))
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for shard in sorted(results.get("shard", []), key=lambda s: s["number"]):
        made.setdefault((shard["output"], shard["split"]), []).append(shard)
    if not made:
        raise DataError("data beam: no document of any source is kept; see the settings")
    names = [source.name for source in config.sources]
    outputs = sorted({name for name, _ in made}, key=lambda n: (_raw_place(n, names), n))
    entries: dict[str, Any] = {}
    for output in outputs:
        splits = {}
        for split in shards.SPLITS:
            found = made.get((output, split), [])
            sums = {
                key: sum(shard[key] for shard in found)
                for key in ("documents", "tokens", "bytes", "characters")
            }
            splits[split] = {**sums, "shards": [shard["shard"] for shard in found]}
        documents = read[output]
        kept = sum(split["documents"] for split in splits.values())
        exact = documents - unique.get(output, documents)
        repeats = {"documents": documents, "exact": exact, "near": documents - exact - kept}
        rejects = Rejects()
        rejects.records = documents
        entries[output] = {
            "duplicates": exact,
            "repeats": repeats,
            "rejects": rejects.report(),
            "splits": splits,
        }
    return entries


def _raw_place(output: str, names: list[str]) -> int:
    """Which source an output is of: the one it is named after, or that and a language."""
    if output in names:
        return names.index(output)
    return names.index(output.rpartition(".")[0])


def _records(
    sources: tuple[SourceConfig, ...], files: list[Any], makers: list[dict[str, str]]
) -> dict[str, Any]:
    """As `input_records` on one machine, of what the workers read: (source, unit, record)."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, unit, record in files:
        found.setdefault(name, []).append((unit, record))
    records: dict[str, Any] = {}
    for source in sources:
        mine = [record for _, record in sorted(found.get(source.name, []), key=lambda f: f[0])]
        records[source.name] = {"format": source.format, "path": source.path, "files": mine}
        if source.format not in UNTRACKED:
            folders = {str(Path(record["file"]).parent.parent) for record in mine}
            records[source.name]["made_by"] = [m for m in makers if m["folder"] in folders]
    return records
