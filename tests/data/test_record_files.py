"""Parquet, ArrayRecord and TFDS: the same documents, and damage told by file name."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore

from llm_jax.data.documents import Rejects
from llm_jax.data.sources import SourceConfig, parse_source_spec, read_documents
from llm_jax.errors import DataError

TEXTS = ["first", "第二", "third"]


def read(path, **settings):
    rejects = Rejects()
    source = SourceConfig(name="s", path=str(path), **settings)
    return [d.text for d in read_documents(source, rejects)], rejects


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_rows_are_documents(tmp_path, kind):
    columns = {"n": [1, 2, 3], "text": pa.array(TEXTS, kind)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == TEXTS


def test_null_and_bad_utf8_in_parquet_are_counted(tmp_path):
    bad = pa.array([b"good", b"\xff\xfe", None, b""], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    found, rejects = read(tmp_path / "a.parquet")
    assert found == ["good"]
    assert rejects.counts == {"not valid UTF-8": 1, "text is null": 1, "empty text": 1}
    assert [s.place for s in rejects.samples] == ["a.parquet:2", "a.parquet:3", "a.parquet:4"]


def test_parquet_without_a_string_column_is_one_line(tmp_path):
    pq.write_table(pa.table({"texts": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: has no column 'text'; did you mean 'texts'"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'n' holds int64, not strings"):
        read(tmp_path / "a.parquet", text_field="n")


def test_a_truncated_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read"):
        read(tmp_path / "a.parquet")


def test_array_record_holds_text_or_json(tmp_path):
    write_array_record(tmp_path / "a.array_record", [t.encode() for t in TEXTS])
    write_array_record(
        tmp_path / "b.array_record", [json.dumps({"body": t}).encode() for t in TEXTS]
    )
    assert read(tmp_path / "a.array_record")[0] == TEXTS
    assert read(tmp_path / "b.array_record", text_field="body")[0] == TEXTS
    _, rejects = read(tmp_path / "b.array_record")
    assert rejects.counts == {"no field 'text'": 3}


def test_text_that_looks_like_json_stays_text_when_the_first_record_is_text(tmp_path):
    records = ["plain", '{"text": "inner"}']
    write_array_record(tmp_path / "a.array_record", [r.encode() for r in records])
    assert read(tmp_path / "a.array_record")[0] == records


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage"])
def test_a_damaged_array_record_is_named(tmp_path, damage):
    path = tmp_path / "a.array_record"
    noise = np.random.default_rng(0).integers(32, 126, (400, 1000), dtype=np.uint8)
    write_array_record(path, [row.tobytes() for row in noise])
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    else:
        data = bytearray(b"x" * 1000)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.array_record: cannot be read"):
        read(path)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A tiny dataset made by a TFDS builder, in ArrayRecord format."""
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        # a name without dots: TFDS 4.9.10 looks for the code of others with importlib_resources,
        # which it forgets to require
        __module__ = "tiny_texts"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["t"])}

        def _generate_examples(self, texts):  # pyright: ignore
            for n, text in enumerate(texts):
                yield n, {"text": text, "n": n}

    root = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(root))  # TFDS leaves a folder behind
        builder = TinyTexts(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def test_a_tfds_split_is_read_without_tensorflow(tfds_folder):
    import sys

    found, rejects = read(tfds_folder, format="tfds")
    assert sorted(found) == sorted(TEXTS)  # TFDS shuffles when it writes
    assert rejects.total == 0
    assert found == read(tfds_folder, format="tfds")[0]
    rejects = Rejects()
    source = parse_source_spec(f"tiny=tfds:{tfds_folder}:test")
    assert [d.text for d in read_documents(source, rejects)] == ["t"]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("path", "field", "message"),
    [
        ("{}:valid", "text", "has no split 'valid'; known: test, train"),
        ("{}", "body", "has no feature 'body'"),
        ("{}", "n", None),
        ("no_such_dataset_anywhere:train", "text", "cannot be read"),
    ],
)
def test_a_tfds_source_that_does_not_fit_is_one_line(tfds_folder, path, field, message):
    path = path.format(tfds_folder)
    if message is None:
        _, rejects = read(path, format="tfds", text_field=field)
        assert rejects.counts == {"text is not a string": 3}
        return
    with pytest.raises(DataError, match=message) as error:
        read(path, format="tfds", text_field=field)
    assert "\n" not in str(error.value)
