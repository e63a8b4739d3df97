"""`llm-jax data tfds`: prepared data, or documents, as a TFDS dataset."""

from typing import Any

from rich.markup import escape

from llm_jax.data.tfds_dataset import TfdsConfig, write_tfds
from llm_jax.run.data_sources import console


def add_tfds(parser: Any) -> None:
    """Arguments of `data tfds`."""
    parser.add_argument("folder", help="folder made by any `llm-jax data` stage")
    parser.add_argument("--name", required=True, help="name of the dataset, such as my_corpus")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="TFDS's folder")
    parser.add_argument("--version", default="1.0.0", help="of the dataset (1.0.0)")
    parser.add_argument("--overwrite", action="store_true", help="replace that version there")


def tfds(arguments: Any) -> None:
    """Runs `data tfds`."""
    config = TfdsConfig(
        folder=arguments.folder,
        name=arguments.name,
        data_dir=arguments.data_dir,
        version=arguments.version,
        overwrite=arguments.overwrite,
    )
    with console.status("TFDS writes"):
        manifest = write_tfds(config)
    for name, entry in manifest["sources"].items():
        console.print(f"split {escape(name)}: {entry['documents']:,} examples")
    split = next(iter(manifest["sources"]), "")
    console.print(
        f"tfds.data_source({config.name!r}, split={split!r}, data_dir={config.data_dir!r})",
        markup=False,
        soft_wrap=True,
    )
