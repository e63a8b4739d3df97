"""A folder of ours written as a TFDS dataset and read back by TFDS itself."""

import sys
from typing import Any

import pytest

from llm_jax.data.clean.stage import CleanStage, clean_stage
from llm_jax.data.documents import Rejects
from llm_jax.data.sources import SourceConfig, parse_source_spec, read_documents
from llm_jax.data.tfds_dataset import TfdsConfig, write_tfds
from llm_jax.errors import ConfigError, DataError
from llm_jax.run import cli, data


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """Documents of two sources with names that TFDS would not take."""
    root = tmp_path_factory.mktemp("clean")
    sample = SourceConfig(name="zh.zh", format="sample", path="zh")
    docs = SourceConfig(name="en-docs", format="package-docs", path="rich", max_bytes=200_000)
    clean_stage(CleanStage(sources=(sample, docs), output=str(root / "out")))
    return root / "out"


def data_source(*words, **settings):
    import tensorflow_datasets as tfds

    return tfds.data_source(*words, **settings)


def test_prepared_data_is_read_back_by_tfds_document_for_document(make_prepared, tmp_path):
    texts = {"zh.a": [f"第{n}页，有字。" for n in range(40)], "en": [f"page {n}" for n in range(9)]}
    prepared = make_prepared(texts, holdout_fraction=0.2)
    words = ["tfds", str(prepared.folder), "--name", "corpus", "--data-dir", str(tmp_path / "tf")]
    assert cli.run(data.main, words) == 0
    for source, splits in prepared.sources.items():
        for name, split in splits.items():
            named = f"{source.replace('.', '_')}_{name}"
            found: list = list(data_source("corpus", split=named, data_dir=str(tmp_path / "tf")))
            assert len(found) == split.num_documents > 0
            for number, example in enumerate(found):
                assert example["tokens"].tolist() == split.document(number).tolist()
                assert example["bytes"] == split.document_bytes[number]
                assert example["characters"] == split.document_characters[number]
    assert "tensorflow" not in sys.modules
    assert cli.run(data.main, ["verify", str(tmp_path / "tf/corpus/1.0.0")]) == 0


def test_documents_are_read_back_and_are_a_source_again(cleaned, tmp_path):
    import tensorflow_datasets as tfds

    config = TfdsConfig(folder=str(cleaned), name="texts", data_dir=str(tmp_path), version="0.2.1")
    write_tfds(config)
    folder = tmp_path / "texts/0.2.1"
    builder: Any = tfds.builder_from_directory(str(folder))
    assert sorted(builder.info.splits) == ["en_docs", "zh_zh"]
    expected = [
        (d.text, d.id)
        for d in read_documents(SourceConfig(name="a", path=f"{cleaned}/zh.zh"), Rejects())
    ]
    examples: list = list(builder.as_data_source("zh_zh"))
    assert [e["text"].decode() for e in examples] == [text for text, _ in expected]
    assert all(e["id"].decode().startswith("zh-") for e in examples)
    again = read_documents(parse_source_spec(f"a=tfds:{folder}:zh_zh"), Rejects())
    assert [d.text for d in again] == [text for text, _ in expected]
    with pytest.raises(DataError, match="already exists; choose another output"):
        write_tfds(config)
    with pytest.raises(DataError, match="is a TFDS dataset already"):
        write_tfds(TfdsConfig(folder=str(folder), name="b", data_dir=str(tmp_path)))


def test_data_verify_follows_a_dataset_to_the_raw_text(cleaned, tmp_path, capsys):
    write_tfds(TfdsConfig(folder=str(cleaned), name="texts", data_dir=str(tmp_path)))
    folder = tmp_path / "texts/1.0.0"
    assert cli.run(data.main, ["verify", str(folder)]) == 0
    assert "zh-1.txt" in capsys.readouterr().out
    (part, *_) = folder.glob("texts-zh_zh.array_record-*")
    content = part.read_bytes()
    part.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert cli.run(data.main, ["verify", str(folder)]) == 2
    assert "content differs from what was recorded" in capsys.readouterr().err


def test_a_damaged_input_is_named_and_nothing_is_left(cleaned, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(cleaned, copy)
    part = copy / "zh.zh/part-00000.jsonl.zst"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"part-00000.jsonl.zst: is not what was written"):
        write_tfds(TfdsConfig(folder=str(copy), name="texts", data_dir=str(tmp_path / "tf")))
    assert list((tmp_path / "tf").rglob("*.*")) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "My-Corpus"}, "name='My-Corpus' must be lower-case letters"),
        ({"version": "1"}, "version='1' must be three numbers"),
        ({"data_dir": ""}, "data_dir is empty"),
    ],
)
def test_a_setting_that_tfds_would_refuse_is_told_first(settings, message):
    with pytest.raises(ConfigError, match=message):
        TfdsConfig(**{"folder": "a", "name": "a", "data_dir": "a", **settings})


def test_two_sources_that_tfds_would_call_the_same_are_refused(make_prepared, tmp_path):
    prepared = make_prepared({"a.b": ["one", "two"], "a-b": ["three", "four"]})
    with pytest.raises(DataError, match="two splits would be called 'a_b_train'"):
        write_tfds(TfdsConfig(folder=str(prepared.folder), name="c", data_dir=str(tmp_path)))


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    """Texts inside another feature, as TFDS's translation sets have them."""
    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder):
        __module__ = "pairs"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            both = {"zh": tfds.features.Text(), "en": tfds.features.Text()}
            features = tfds.features.FeaturesDict({"pair": both, "source": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):  # pyright: ignore
            for number, (zh, en) in enumerate((("早上好", "good morning"), ("晚安", "good night"))):
                yield number, {"pair": {"zh": zh, "en": en}, "source": "book"}

    folder = str(tmp_path_factory.mktemp("pairs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", folder)  # TFDS leaves a folder behind
        builder = Pairs(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def test_a_feature_inside_another_is_named_with_a_dot(translations):
    def texts(field):
        source = SourceConfig(name="a", format="tfds", path=translations, text_field=field)
        return [document.text for document in read_documents(source, Rejects())]

    assert texts("pair.zh") == ["早上好", "晚安"]
    assert texts("source") == ["book", "book"]
    with pytest.raises(DataError, match=r"no feature 'pair\.zn'; did you mean 'pair\."):
        texts("pair.zn")
    with pytest.raises(DataError, match=r"no feature 'text'; known: pair\.en, pair\.zh, source"):
        texts("text")
