"""Prepared data: what was stored is what was read, damage is noticed, nothing is half-written."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import tokenizer as tokenizers
from llm_jax.data.prepare import PrepareConfig, encode_chunk, prepare
from llm_jax.data.shard_writer import Encoded, HoldOut, SplitWriter, new_folder
from llm_jax.data.shards import HELDOUT, SPLITS, TRAIN, Split, open_prepared
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from tests.data.conftest import BOS, EOS, write_jsonl
from tests.tiny_text import byte_level

TEXTS = [f"{i} " + "text " * (i % 7) + "中" * (i % 3) for i in range(300)]


def stored(prepared, source, split):
    part = prepared.sources[source][split]
    return [part.document(i).tolist() for i in range(part.num_documents)]


def test_every_document_is_stored_framed_and_counted(make_prepared, byte_tokenizer):
    prepared = make_prepared({"a": TEXTS}, shard_max_tokens=1000)
    tokenizer = tokenizers.load(byte_tokenizer)
    documents = stored(prepared, "a", TRAIN) + stored(prepared, "a", HELDOUT)
    assert all(d[0] == BOS and d[-1] == EOS for d in documents)
    assert sorted(tokenizer.decode(d[1:-1]) for d in documents) == sorted(TEXTS)
    for name in SPLITS:
        split = prepared.sources["a"][name]
        texts = [tokenizer.decode(d) for d in stored(prepared, "a", name)]
        assert split.num_tokens == sum(len(d) for d in stored(prepared, "a", name))
        assert split.document_bytes.tolist() == [len(t.encode()) for t in texts]
        assert split.document_characters.tolist() == [len(t) for t in texts]
        assert split.num_bytes == split.document_bytes.sum()
        assert split.num_characters == split.document_characters.sum()
    assert len(prepared.sources["a"][TRAIN].shards) > 3
    assert tokenizers.load(prepared.tokenizer_folder).fingerprint == prepared.tokenizer_fingerprint
    assert prepared.tokenizer_fingerprint == tokenizer.fingerprint


def test_without_a_bos_the_eos_of_the_document_before_is_the_start(tmp_path):
    byte_level().save(tmp_path)
    settings = {"bos_token": None, "eos_token": "<|endoftext|>"}  # as Qwen's
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.load(tmp_path)
    (document,) = encode_chunk(tokenizer, ["你好"])
    assert tokenizer.bos_id == -1
    expected = [tokenizer.eos_id, *tokenizer.encode("你好"), tokenizer.eos_id]
    assert document.tokens.tolist() == expected
    assert (document.num_bytes, document.num_characters) == (6, 2)


def test_reading_crosses_shards_and_survives_pickling(make_prepared):
    split = make_prepared({"a": TEXTS}, shard_max_tokens=64).sources["a"][TRAIN]
    whole = np.concatenate([split.document(i) for i in range(split.num_documents)])
    assert split.read(0, split.num_tokens).tolist() == whole.tolist()
    assert split.read(0, 1).dtype == np.int32
    copy = pickle.loads(pickle.dumps(split))
    for start, count in ((0, 0), (5, 700), (split.num_tokens - 3, 3), (63, 2)):
        assert copy.read(start, count).tolist() == whole[start : start + count].tolist()
    for start, count in ((-1, 2), (0, split.num_tokens + 1), (0, -1)):
        with pytest.raises(IndexError):
            split.read(start, count)


def test_a_shard_holds_at_most_its_tokens_unless_one_document_is_longer(make_prepared):
    split = make_prepared({"a": [*TEXTS, "x" * 500]}, shard_max_tokens=100).sources["a"][TRAIN]
    assert all(s.num_tokens <= 100 or s.num_documents == 1 for s in split.shards)
    assert max(s.num_tokens for s in split.shards) == 502


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    (tmp_path / "a").mkdir()
    writer = SplitWriter(tmp_path, "a", TRAIN, "uint32", 1000)
    writer.add(Encoded(np.array([1, 70_000, 2**31 - 1]), 3, 3, 0.5))
    split = Split(tmp_path, writer.finish(), "uint32")
    assert split.read(0, 3).tolist() == [1, 70_000, 2**31 - 1]


def test_shards_are_plain_numpy_files(make_prepared):
    prepared = make_prepared({"a": TEXTS})
    shard = prepared.sources["a"][TRAIN].shards[0]
    tokens = np.load(prepared.folder / shard.tokens_file)
    assert tokens.dtype == np.uint16
    assert tokens.shape == (shard.num_tokens,)
    assert np.load(prepared.folder / shard.documents_file).shape == (shard.num_documents, 3)


def encoded(position):
    return Encoded(np.array([1]), 1, 1, position)


def deal(fraction, positions, together=False):
    holdout = HoldOut(fraction, together)
    dealt = [pair for p in positions for pair in holdout.deal(encoded(p))] + list(holdout.rest())
    return [(split, document.position) for split, document in dealt]


def test_both_splits_get_a_document_when_there_are_two():
    assert deal(0.1, [0.5]) == [(TRAIN, 0.5)]
    assert deal(0.1, [0.05]) == [(TRAIN, 0.05)]
    assert sorted(deal(0.1, [0.5, 0.3, 0.9])) == [(HELDOUT, 0.3), (TRAIN, 0.5), (TRAIN, 0.9)]
    assert sorted(deal(0.5, [0.1, 0.4, 0.2])) == [(HELDOUT, 0.1), (HELDOUT, 0.2), (TRAIN, 0.4)]
    assert sorted(deal(0.1, [0.5, 0.3, 0.05, 0.9])) == [
        *[(HELDOUT, 0.05)],
        *[(TRAIN, 0.3), (TRAIN, 0.5), (TRAIN, 0.9)],
    ]
    assert sorted(deal(0.0, [0.5, 0.0])) == [(TRAIN, 0.0), (TRAIN, 0.5)]


@given(st.lists(st.sampled_from([0.02, 0.04, 0.2, 0.3, 0.5, 0.9]), min_size=1, max_size=12))
def test_documents_of_one_position_do_not_part_where_they_belong_together(positions):
    dealt = deal(0.1, positions, together=True)
    assert sorted(position for _, position in dealt) == sorted(positions)
    sides = {split: {p for s, p in dealt if s == split} for split in (TRAIN, HELDOUT)}
    assert not sides[TRAIN] & sides[HELDOUT]
    if len(set(positions)) == len(positions) > 1:
        assert dict(dealt) == dict(deal(0.1, positions))
        assert all(sides.values())


def test_the_held_out_share_is_near_its_fraction_and_stays_with_the_text(make_prepared):
    first = make_prepared({"a": TEXTS}, holdout_fraction=0.2)
    held = {tuple(d) for d in stored(first, "a", HELDOUT)}
    assert 40 <= len(held) <= 80  # 60 expected, standard deviation 7
    # the same texts in another order, among others, under another name
    second = make_prepared(
        {"b": [f"new {i}" for i in range(99)] + TEXTS[::-1]}, holdout_fraction=0.2
    )
    assert held <= {tuple(d) for d in stored(second, "b", HELDOUT)}
    assert not held & {tuple(d) for d in stored(second, "b", TRAIN)}


def test_exact_duplicates_are_dropped_and_counted_unless_kept(make_prepared):
    texts = ["same", "other", "same", "same"]
    prepared = make_prepared({"a": texts}, holdout_fraction=0.0)
    assert prepared.sources["a"][TRAIN].num_documents == 2
    assert prepared.manifest["sources"]["a"]["duplicates"] == 2
    kept = make_prepared({"a": texts}, holdout_fraction=0.0, drop_duplicates=False)
    assert kept.sources["a"][TRAIN].num_documents == 4


def test_worker_processes_give_the_same_folder(make_prepared, monkeypatch):
    monkeypatch.setattr("llm_jax.data.prepare.CHUNK_DOCUMENTS", 7)  # many chunks in flight
    alone, together = (make_prepared({"a": TEXTS}, workers=w) for w in (0, 2))
    assert alone.digest == together.digest
    assert together.verify() == alone.verify() > 1000


def test_progress_ends_with_the_totals(tmp_path, byte_tokenizer):
    calls = []
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config = PrepareConfig(
        sources=(SourceConfig(name="a", path=str(path)),),
        tokenizer=str(byte_tokenizer),
        output=str(tmp_path / "out"),
    )
    splits = prepare(config, calls.append).sources["a"]
    assert calls[-1].source == "a"
    assert calls[-1].documents == sum(s.num_documents for s in splits.values()) == len(TEXTS)
    assert calls[-1].tokens == sum(s.num_tokens for s in splits.values())


def test_rejects_are_in_the_manifest_and_their_samples_in_a_file(tmp_path, byte_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"text": 3}\n{"text": "\\ud800 end"}\n')
    config = PrepareConfig(
        sources=(SourceConfig(name="a", path=str(path)),),
        tokenizer=str(byte_tokenizer),
        output=str(tmp_path / "out"),
        max_reject_fraction=0.01,
    )
    prepared = prepare(config)
    report = prepared.manifest["sources"]["a"]["rejects"]
    assert report["rejected"] == {"text is not a string": 1}
    assert report["repaired"] == {"lone surrogate replaced by '?'": 1}
    sample = json.loads((prepared.folder / "rejects.jsonl").read_text())
    assert sample["place"] == "a.jsonl:301"


def test_too_many_rejects_leave_nothing_behind(tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n[]\n')
    config = PrepareConfig(
        sources=(SourceConfig(name="a", path=str(path)),),
        tokenizer=str(byte_tokenizer),
        output=str(tmp_path / "out"),
    )
    with pytest.raises(DataError, match=r"1 of 2 records rejected.*a.jsonl:2"):
        prepare(config)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_truncated_or_missing_file_is_noticed_on_opening(make_prepared, kind):
    prepared = make_prepared({"a": TEXTS})
    shard = prepared.sources["a"][TRAIN].shards[0]
    path = prepared.folder / getattr(shard, f"{kind}_file")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{path.name}: \d+ bytes, but \d+ were written"):
        open_prepared(prepared.folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: missing"):
        open_prepared(prepared.folder)


def test_a_flipped_bit_is_found_by_verify(make_prepared):
    prepared = make_prepared({"a": TEXTS, "b": TEXTS[:9]})
    path = prepared.folder / prepared.sources["b"][TRAIN].shards[0].tokens_file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"b/{path.name}: content differs"):
        open_prepared(prepared.folder).verify()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["tokenizer"].update(vocab_size=9), "was changed after it was written"),
        (lambda m: m["sources"]["a"]["splits"]["train"].update(tokens=9), "was changed"),
        (lambda m: m.update(format=99), "format 99, but this version reads format 1"),
        (lambda m: m.pop("tokenizer"), "damaged manifest"),
        (lambda m: m.update(sources=[]), "damaged manifest"),
    ],
)
def test_an_edited_manifest_is_noticed(make_prepared, edit, message):
    prepared = make_prepared({"a": TEXTS})
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    edit(manifest)
    (prepared.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_prepared(prepared.folder)


def test_a_folder_that_is_not_prepared_data_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        open_prepared(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged manifest"):
        open_prepared(tmp_path)


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path, make_prepared):
    prepared = make_prepared({"a": TEXTS})
    with pytest.raises(DataError, match="already exists"), new_folder(prepared.folder, False):
        pass
    with pytest.raises(RuntimeError), new_folder(prepared.folder, True):
        raise RuntimeError("the old folder must survive a failure")
    assert open_prepared(prepared.folder).verify()
    with new_folder(prepared.folder, True) as folder:
        (folder / "new").write_text("x")
    assert os.listdir(prepared.folder) == ["new"]
    with pytest.raises(DataError, match="is not prepared data"), new_folder(prepared.folder, True):
        pass
    assert not list(tmp_path.glob("*.tmp-*"))
    assert not list(tmp_path.glob("*.old-*"))


PREPARE_IN_A_PROCESS = """
import resource, sys, json
from llm_jax.errors import DataError
from llm_jax.data.prepare import PrepareConfig, prepare
from llm_jax.data.sources import SourceConfig
path, tokenizer, output, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
def report(progress):
    print("working", flush=True)
config = PrepareConfig(sources=(SourceConfig(name="a", path=path),), tokenizer=tokenizer, output=output)
try:
    prepare(config, report)
except DataError as error:
    print(error)
"""


def start_prepare(tmp_path, byte_tokenizer, output, limit=0):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{i} {'x' * 2000}" for i in range(5000)])
    arguments = [str(path), str(byte_tokenizer), str(output), str(limit)]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE_IN_A_PROCESS, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_a_file_size_limit_or_quota_is_one_line_and_leaves_nothing(tmp_path, byte_tokenizer):
    out, _ = start_prepare(tmp_path, byte_tokenizer, tmp_path / "out", limit=1 << 20).communicate()
    assert out.splitlines()[-1].startswith(f"{tmp_path}/out: no room to write (File too large)")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, byte_tokenizer):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("not allowed to mount a tmpfs")
    try:
        out, _ = start_prepare(tmp_path, byte_tokenizer, disk / "out").communicate()
        assert "no room to write (No space left on device)" in out.splitlines()[-1]
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_killed_run_leaves_no_output_and_the_next_one_clears_up(tmp_path, byte_tokenizer):
    process = start_prepare(tmp_path, byte_tokenizer, tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.tmp-*"))) == 1
    deadline = time.monotonic() + 10  # the id stays taken until the system has reaped it
    while os.path.exists(f"/proc/{process.pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    with new_folder(tmp_path / "out", False):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"sources": (SourceConfig(name="a", path="x"),) * 2}, "'a' occurs twice"),
        ({"output": ""}, "output is empty"),
        ({"holdout_fraction": 0.7}, "holdout_fraction=0.7 must be between 0 and 0.5"),
        ({"max_reject_fraction": -1.0}, "max_reject_fraction=-1.0"),
        ({"shard_max_tokens": 0}, "shard_max_tokens=0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message):
    defaults = {"sources": (SourceConfig(name="a", path="x"),), "tokenizer": "t", "output": "o"}
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**(defaults | settings))
