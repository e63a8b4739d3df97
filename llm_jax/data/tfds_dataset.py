"""A folder of ours as a TFDS dataset in ArrayRecord format: written by TFDS itself, without TensorFlow.

    tfds.data_source(NAME, split="zh_train", data_dir=DIR)          random access, numpy, no TensorFlow
    tfds.builder_from_directory(f"{DIR}/NAME/VERSION")

Of prepared data an example is `tokens` (int32, with BOS and EOS), `bytes` and `characters` of its text, and
every source and split is a split SOURCE_SPLIT. Of a stage that made documents it is `text` and `id`, and every
source is a split. Order is kept. The folder has a manifest of ours too, so `data verify` follows the chain.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.document_files import Part, write_manifest
from llm_jax.data.lineage import read_manifest
from llm_jax.data.shard_writer import new_folder
from llm_jax.data.shards import Split, open_prepared, sha256_of
from llm_jax.data.text_files import open_bytes
from llm_jax.errors import ConfigError, DataError

Examples = Callable[[], Iterator[dict[str, Any]]]
NAME = re.compile(r"[a-z][a-z0-9_]*")
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class TfdsConfig:
    """What to make a dataset of, and where."""

    folder: str  # made by any `llm-jax data` stage
    name: str  # of the dataset
    data_dir: str  # TFDS's folder of datasets
    version: str = "1.0.0"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"name={self.name!r} must be lower-case letters, digits and '_', a letter first"
            )
        if not VERSION.fullmatch(self.version):
            raise ConfigError(f"version={self.version!r} must be three numbers, such as 1.0.0")
        if not self.data_dir:
            raise ConfigError("data_dir is empty; name the folder of TFDS datasets")


def write_tfds(config: TfdsConfig) -> dict[str, Any]:
    """Writes DATA_DIR/NAME/VERSION; returns our manifest of it.

    Raises:
      DataError: a folder that no stage made or that is damaged, two sources whose names TFDS cannot
        tell apart, an output that exists, a full disk. Nothing is left there then.
    """
    source = Path(os.path.abspath(config.folder))
    manifest = read_manifest(source)
    prepared = "stage" not in manifest
    splits = _prepared_splits(source) if prepared else _document_splits(source, manifest)
    maker = {"folder": str(source), "digest": manifest["digest"]}
    inputs = {"data": {"format": "folder", "path": config.folder, "files": [], "made_by": [maker]}}
    target = Path(config.data_dir) / config.name / config.version
    with new_folder(target, config.overwrite) as root:
        masked = "conversations" in manifest
        made = _build(config, splits, manifest["digest"], prepared, masked, root / "made")
        for file in made.iterdir():
            file.rename(root / file.name)
        shutil.rmtree(root / "made")
        entries = {}
        for name, (_, count) in splits.items():
            files = sorted(root.glob(f"{config.name}-{name}.array_record-*"))
            parts = [_part(file, count if len(files) == 1 else 0) for file in files]
            entries[name] = {"documents": count, "parts": parts}
        return write_manifest(root, "tfds", config, inputs, entries)


def _part(file: Path, documents: int) -> dict[str, Any]:
    return asdict(Part(file.name, file.stat().st_size, sha256_of(file), documents))


def _prepared_splits(folder: Path) -> dict[str, tuple[Examples, int]]:
    """Examples and their number by name of a split; empty splits are left out."""

    def examples(split: Split) -> Iterator[dict[str, Any]]:
        sizes = zip(split.document_bytes, split.document_characters, strict=True)
        for number, (size, characters) in enumerate(sizes):
            tokens = split.document(number)
            example = {"tokens": tokens, "bytes": int(size), "characters": int(characters)}
            if split.has_mask:
                start = int(split.document_starts[number])
                example["mask"] = split.read_mask(start, len(tokens))
            yield example

    found = open_prepared(folder)
    found.verify()
    return _named(
        (f"{name}_{split_name}", lambda split=split: examples(split), split.num_documents)
        for name, splits in found.sources.items()
        for split_name, split in splits.items()
        if split.num_documents
    )


def _document_splits(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[Examples, int]]:
    def examples(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for part in parts:
            file = folder / part["file"]
            if not file.is_file() or sha256_of(file) != part["sha256"]:
                raise DataError(f"{file}: is not what was written (sha256); make the folder again")
            with open_bytes(str(file)) as lines:
                for line in lines:
                    fields = json.loads(line)
                    yield {"text": fields["text"], "id": fields["id"]}

    if manifest["stage"] == "tfds":
        raise DataError(f"{folder} is a TFDS dataset already; give the folder it was made of")
    return _named(
        (name, lambda parts=entry["parts"]: examples(parts), entry["documents"])
        for name, entry in manifest["sources"].items()
        if entry["documents"]
    )


def _named(splits: Iterator[tuple[str, Examples, int]]) -> dict[str, tuple[Examples, int]]:
    """By names that TFDS accepts: letters, digits and '_'."""
    named: dict[str, tuple[Examples, int]] = {}
    for name, examples, count in splits:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        if plain in named:
            raise DataError(f"two splits would be called {plain!r} in TFDS; rename a source")
        named[plain] = examples, count
    return named


def _build(
    config: TfdsConfig,
    splits: dict[str, tuple[Examples, int]],
    digest: str,
    prepared: bool,
    masked: bool,
    data_dir: Path,
) -> Path:
    """Lets TFDS write the dataset below `data_dir`; returns its folder there."""
    import tensorflow_datasets as tfds

    text, integer = tfds.features.Text(), tfds.features.Scalar(np.int64)
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    told: dict[str, Any] = {"text": text, "id": text}
    if prepared:
        told = {"tokens": tokens, "bytes": integer, "characters": integer}
    if masked:  # of conversations: what is learned; bytes and characters are of that
        told["mask"] = tfds.features.Tensor(shape=(None,), dtype=np.uint8)

    class Info(tfds.core.DatasetInfo):
        """Never looked for on Google's server, where a dataset of that name may be another's."""

        def initialize_from_bucket(self) -> None:
            """Does nothing; TFDS would also leave an empty folder in /tmp for every dataset."""

    class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A dataset whose code is not needed to read it."""

        # without dots: TFDS 4.9.10 looks for the code of others with a package it may lack
        __module__ = "llm_jax_corpus"
        name = config.name
        VERSION = tfds.core.Version(config.version)

        def _info(self) -> Any:
            return Info(
                builder=self,
                description=f"Made by `llm-jax data tfds`; digest of its input: {digest}",
                features=tfds.features.FeaturesDict(told),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {name: self._generate_examples(make) for name, (make, _) in splits.items()}

        def _generate_examples(self, make: Examples) -> Any:  # pyright: ignore
            yield from enumerate(make())

    tfds.disable_progress_bar()
    builder: Any = Corpus(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return data_dir / config.name / config.version
