"""The chain from raw text to token shards, made by the commands and followed back by `data verify`."""

import json
import shutil

import pytest

from llm_jax.run import cli, data

TEXT = (
    "第{}天的早晨，我们沿着河边走了很久，看见{}只水鸟在浅滩上找吃的，它们并不怕人，也不急着飞走。"
)
PLACES = ["河边", "山下", "湖上", "林间", "田里", "桥头", "城外", "村口", "井旁", "楼上"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    """raw.jsonl -> clean -> dedup -> prepared."""
    folder = tmp_path_factory.mktemp("chain")
    lines = [TEXT.format(i, i * i).replace("河边", PLACES[i % 10]) for i in range(30)]
    text = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    (folder / "raw.jsonl").write_text(text, encoding="utf-8")
    raw = f"zh={folder}/raw.jsonl"
    prepare = ("prepare", "--source", f"zh={folder}/dedup/zh", "--output", f"{folder}/prepared")
    for words in (
        ("clean", "--source", raw, "--output", f"{folder}/clean"),
        (
            "dedup",
            "--source",
            f"zh={folder}/clean/zh",
            "--exact-only",
            "--output",
            f"{folder}/dedup",
        ),
        (*prepare, "--tokenizer", str(tiny_tokenizer)),
    ):
        assert cli.run(data.main, list(words)) == 0
    return folder


def verify(capsys, folder):
    status = cli.run(data.main, ["verify", str(folder)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_intact_chain_is_followed_to_the_raw_file(capsys, made):
    status, out, _ = verify(capsys, made / "prepared")
    assert status == 0
    assert "BAD" not in out
    for stage in ("data prepare", "data dedup", "data clean", "raw.jsonl"):
        assert stage in out
    assert "4 levels" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raw.jsonl", "content differs from what was recorded"),
        ("clean/zh/part-00000.jsonl.zst", "content differs from what was recorded"),
        ("dedup/zh/part-00000.jsonl.zst", "content differs from what was recorded"),
        ("prepared/zh/train-00000.tokens.npy", "content differs from what was recorded"),
    ],
)
def test_a_flipped_bit_anywhere_in_the_chain_is_named(capsys, made, name, message):
    file = made / name
    intact = file.read_bytes()
    file.write_bytes(intact[:-9] + bytes([intact[-9] ^ 1]) + intact[-8:])
    try:
        status, out, err = verify(capsys, made / "prepared")
    finally:
        file.write_bytes(intact)
    assert status == 2
    assert err.count("\n") == 1
    assert f"{name}: {message}" in err
    assert out.count("BAD") == (1 if name.startswith(("raw", "prepared")) else 2)


def test_a_missing_raw_file_and_a_stage_made_again_are_told(capsys, made):
    (made / "raw.jsonl").rename(made / "away.jsonl")
    try:
        assert "raw.jsonl: missing" in verify(capsys, made / "prepared")[2]
    finally:
        (made / "away.jsonl").rename(made / "raw.jsonl")
    shutil.copytree(made / "clean", made / "clean-before")
    words = [
        "clean",
        "--source",
        f"zh={made}/raw.jsonl",
        "--output",
        f"{made}/clean",
        "--overwrite",
    ]
    assert cli.run(data.main, [*words, "--compression", "gz"]) == 0
    capsys.readouterr()
    try:
        status, out, _ = verify(capsys, made / "prepared")
    finally:
        shutil.rmtree(made / "clean")
        (made / "clean-before").rename(made / "clean")
    assert status == 2
    assert "it was made again since" in out


@pytest.mark.parametrize("stage", ["clean", "dedup", "prepared"])
def test_a_manifest_that_was_edited_is_told(capsys, made, stage):
    file = made / stage / "manifest.json"
    intact = file.read_text(encoding="utf-8")
    content = json.loads(intact)
    content["inputs"]["zh"]["files"] = []  # as if it had been made of nothing
    file.write_text(json.dumps(content), encoding="utf-8")
    try:
        assert "was changed after it was written" in verify(capsys, made / stage)[2]
    finally:
        file.write_text(intact, encoding="utf-8")


def test_a_folder_that_no_stage_made_is_refused(capsys, tmp_path):
    status, _, err = verify(capsys, tmp_path)
    assert status == 2
    assert "holds no manifest.json; give a folder made by" in err


def test_a_chain_whose_folders_were_moved_is_followed_with_root(capsys, made, tmp_path):
    for name in ("prepared", "dedup"):
        shutil.copytree(made / name, tmp_path / "new" / name)
    for name in ("clean", "raw.jsonl"):
        (shutil.copytree if name == "clean" else shutil.copy)(made / name, tmp_path / name)
    away = made.with_name("away")
    made.rename(away)  # nothing is where it was
    try:
        prepared = str(tmp_path / "new/prepared")
        status, _, err = verify(capsys, prepared)
        assert status == 2
        assert "missing (if it was moved, pass --root OLD=NEW)" in err
        words = ["--root", f"{made}={tmp_path}", "--root", f"{made}/dedup={tmp_path}/new/dedup"]
        assert cli.run(data.main, ["verify", prepared, *words]) == 0
        out = capsys.readouterr().out
        assert "4 levels" in out
        assert f"OK   zh: {tmp_path}/raw.jsonl" in out
        assert str(made) not in out
    finally:
        away.rename(made)


@pytest.mark.parametrize("word", ["old", "old=new", "/old=/nowhere/at/all"])
def test_a_root_that_names_no_move_is_refused(capsys, made, word):
    assert cli.run(data.main, ["verify", str(made / "prepared"), "--root", word]) == 2
    assert f"--root {word!r} must be OLD=NEW" in capsys.readouterr().err
