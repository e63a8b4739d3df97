"""Which files are read, what they say, what is refused, and that saving gives them back."""

import json
import random

import pytest
from sentencepiece import sentencepiece_model_pb2 as schema
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from llm_jax import tokenizer
from llm_jax.errors import DataError
from llm_jax.tokenizer import files, specials
from tests.tokenizer.conftest import TEXTS, edited, small


def put(folder, **contents):
    """Writes files given as `tokenizer_config=...`; dicts become JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def model_bytes(trained, tmp_path) -> bytes:
    trained.save(tmp_path / "model-bytes")
    return (tmp_path / "model-bytes" / "tokenizer.model").read_bytes()


def test_saving_and_loading_give_the_same_tokenizer(trained, tmp_path):
    trained.save(tmp_path / "here")
    loaded = tokenizer.load(tmp_path / "here")
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.encode(TEXTS[2]) == trained.encode(TEXTS[2])
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["tokenizer.model"]


def test_saving_gives_back_the_bytes_of_every_file(byte_level_json, tmp_path):
    config = '{ "eos_token":"<|endoftext|>",\n "chat_template": "x" }'
    source = put(tmp_path / "a", tokenizer=byte_level_json, tokenizer_config=config)
    tokenizer.load(source).save(tmp_path / "b" / "deep")
    for file in source.iterdir():
        assert (tmp_path / "b" / "deep" / file.name).read_bytes() == file.read_bytes()
    again = tokenizer.load(tmp_path / "b" / "deep")
    assert again.fingerprint == tokenizer.load(source).fingerprint
    again.save(tmp_path / "b" / "deep")  # over itself


def test_saving_over_another_kind_is_refused(bpe, byte_level, tmp_path):
    bpe.save(tmp_path / "t")
    with pytest.raises(DataError, match=r"already holds the tokenizer\.model of another"):
        byte_level.save(tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["tokenizer.model"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path)
    before = (tmp_path / "tokenizer.model").read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path, {"tokenizer.model": b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    assert (tmp_path / "tokenizer.model").read_bytes() == before


def test_a_file_is_loaded_by_its_ending_whatever_its_name(bpe, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model_bytes(bpe, tmp_path))
    for path in (tmp_path / "spiece.model", tmp_path):
        assert tokenizer.load(path).fingerprint == bpe.fingerprint


def test_in_a_folder_with_both_the_json_comes_first(bpe, byte_level_json, tmp_path):
    bpe.save(tmp_path)
    put(tmp_path, tokenizer=byte_level_json)
    assert tokenizer.load(tmp_path).kind == "Hugging Face BPE"
    assert tokenizer.load(tmp_path / "tokenizer.model").kind == "SentencePiece bpe"


def test_usual_names_give_the_roles_when_nothing_declares_them(byte_level, unigram_list):
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.pad_id) == (0, 0, -1)
    assert (unigram_list.bos_id, unigram_list.eos_id, unigram_list.pad_id) == (-1, 1, 0)


def test_companion_files_give_the_roles(byte_level_json, tmp_path):
    folder = put(
        tmp_path / "t",
        tokenizer=byte_level_json,
        tokenizer_config={"bos_token": None, "eos_token": {"content": "<|im_start|>"}},
        special_tokens_map={"eos_token": "<think>", "pad_token": "<|endoftext|>"},
    )
    loaded = tokenizer.load(folder)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (-1, 1, 0)
    guessed = tokenizer.load(put(tmp_path / "u", tokenizer=byte_level_json))
    assert loaded.fingerprint != guessed.fingerprint


def test_long_texts_are_not_cut_by_the_files_truncation(byte_level):
    assert len(byte_level.encode("one two three four five six")) > 4


def test_spelled_markers_encode_as_if_they_were_never_added(byte_level, byte_level_json):
    plain = Tokenizer.from_str(edited(byte_level_json, added_tokens=[], truncation=None))
    assert len(plain.encode("<|").ids) == 1  # so a cut inside "<|" would show
    for text in ("<|endoftext|>", "a <|im_start|> b", "<|fim_prefix|>"):
        assert byte_level.encode(text) == plain.encode(text).ids


def test_ordinary_added_tokens_are_matched_and_markers_are_not(byte_level):
    assert byte_level.encode("<think>") == [byte_level.id_of("<think>")]
    assert len(byte_level.encode("<|fim_prefix|>")) > 1
    assert byte_level.id_of("<|fim_prefix|>") in byte_level.special_ids


@pytest.mark.parametrize(
    ("piece", "marker"),
    [
        ("<|fim_prefix|>", True),
        ("<start_of_turn>", True),
        ("<unused12>", True),
        ("<｜User｜>", True),
        ("[/INST]", True),
        ("<think>", False),
        ("<table>", False),
        ("\n\n", False),
        ("▁▁", False),
        ("[1]", False),
    ],
)
def test_markers_are_told_by_their_look(piece, marker):
    assert specials.is_marker(piece) == marker


def test_user_defined_markers_of_a_sentencepiece_model_stay_text(bpe, tmp_path):
    # as Gemma ships them: pieces that SentencePiece would match in what a user types
    proto = schema.ModelProto.FromString(model_bytes(bpe, tmp_path))  # pyright: ignore[reportAttributeAccessIssue]
    proto.pieces.add(piece="<start_of_turn>", score=0.0, type=4)
    proto.pieces.add(piece="<h1>", score=0.0, type=4)
    content = proto.SerializeToString()
    (tmp_path / "gemma.model").write_bytes(content)
    loaded = tokenizer.load(tmp_path / "gemma.model")
    marker = loaded.id_of("<start_of_turn>")
    assert marker == 400
    assert marker in loaded.special_ids
    assert marker not in loaded.encode("a<start_of_turn>b")
    assert loaded.decode(loaded.encode("a<start_of_turn>b")) == "a<start_of_turn>b"
    assert loaded.encode("<h1>") == [401]
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == content


def test_tokens_added_behind_a_sentencepiece_model_are_special(bpe, tmp_path):
    bpe.save(tmp_path)
    put(tmp_path, added_tokens={"<|tool|>": 401}, tokenizer_config={"pad_token": "<|tool|>"})
    loaded = tokenizer.load(tmp_path)
    assert loaded.vocab_size == 402
    assert (loaded.id_of("<|tool|>"), loaded.pad_id) == (401, 401)
    assert loaded.decode([401, *loaded.encode("<|tool|>"), 401]) == "<|tool|>"
    assert loaded.decode([400]) == ""  # a gap
    assert loaded.token_num_bytes()[400:].tolist() == [0, 0]
    assert loaded.fingerprint != bpe.fingerprint


def test_a_padding_that_is_the_unknown_token_is_left_out_of_text(bpe, tmp_path):
    bpe.save(tmp_path)
    put(tmp_path, special_tokens_map={"pad_token": "<unk>"})
    loaded = tokenizer.load(tmp_path)
    assert loaded.pad_id == 0
    assert loaded.decode([0, *loaded.encode("ab"), 0]) == "ab"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "file is empty"),
        ("{\n\n oops", r":3: not valid JSON"),
        ("[1]", "must hold a JSON object, not a list"),
        ("{}", "needs a model"),
        ('{"model": {"type": "BPE"}}', r"not a usable tokenizer\.json: Missing vocab"),
        ('{"model": {}, "added_tokens": [3]}', "added_tokens holds 3"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_tokenizer_json_is_one_line(content, message, tmp_path):
    put(tmp_path, tokenizer=content)
    with pytest.raises(DataError, match=message) as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["text", "truncated", "no pieces", "no eos"])
def test_broken_sentencepiece_models_are_one_line(damage, bpe, tmp_path):
    good = model_bytes(bpe, tmp_path)
    proto = schema.ModelProto.FromString(good)  # pyright: ignore[reportAttributeAccessIssue]
    proto.trainer_spec.eos_id = -1
    proto.pieces[2].piece, proto.trainer_spec.eos_piece = "<nothing>", "<absent>"
    content = {
        "text": b"this is not a model",
        "truncated": good[: len(good) // 2],
        "no pieces": schema.ModelProto().SerializeToString() or b"\x0a\x00",  # pyright: ignore[reportAttributeAccessIssue]
        "no eos": proto.SerializeToString(),
    }[damage]
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.model: ") as caught:
        tokenizer.load(tmp_path / "bad.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["sentencepiece", "json"])
def test_flipped_bytes_give_a_data_error_or_a_tokenizer_that_works(
    form, bpe, byte_level_json, tmp_path
):
    good = model_bytes(bpe, tmp_path) if form == "sentencepiece" else byte_level_json.encode()
    path = tmp_path / ("flipped.model" if form == "sentencepiece" else "flipped.json")
    draw, refusals = random.Random(0), []
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(draw.choice([1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            loaded = tokenizer.load(path)
        except DataError as error:
            refusals.append(str(error))
        else:
            loaded.decode(loaded.encode(TEXTS[2]))
            assert loaded.token_num_bytes().shape == (loaded.vocab_size,)
    assert len(refusals) > 100
    assert not any("\n" in line for line in refusals)


def as_tokenizer_json(model: bytes) -> str:
    """The same BPE as a tokenizer.json with byte fallback, as Llama's is (anchor: ecosystem 7)."""
    pieces = schema.ModelProto.FromString(model).pieces  # pyright: ignore[reportAttributeAccessIssue]
    ids = {piece.piece: id for id, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == 1}
    merges = [
        (score, ids[whole], whole[:cut], whole[cut:])
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1]))
    built = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for _, _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    built.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [piece.piece for piece in pieces if piece.type in (2, 3)]
    built.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    built.add_tokens([AddedToken("\n", normalized=False)])
    return built.to_str()


def test_the_same_vocabulary_in_both_formats_encodes_alike(bpe, tmp_path):
    converted = as_tokenizer_json(model_bytes(bpe, tmp_path))
    loaded = tokenizer.load(put(tmp_path / "json", tokenizer=converted))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 3)
    assert loaded.special_ids == bpe.special_ids
    assert loaded.token_num_bytes().tolist() == bpe.token_num_bytes().tolist()
    for text in [*TEXTS, " two  spaces\n\n", "龘 <s> <|im_end|> 😀", "</s>"]:
        assert loaded.encode(text) == bpe.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.fingerprint != bpe.fingerprint


def test_a_dummy_prefix_is_one_space_of_bytes_and_not_in_the_text():
    learned = tokenizer.train(small(add_dummy_prefix=True), TEXTS)
    for text in ("hello", " two", "你好\n\nx  y"):
        ids = learned.encode(text)
        assert learned.decode(ids) == text
        assert learned.token_num_bytes()[ids].sum() == len(text.encode()) + 1


def test_a_json_without_an_end_of_text_names_the_remedy(byte_level_json, tmp_path):
    put(tmp_path, tokenizer=edited(byte_level_json, added_tokens=[]))
    with pytest.raises(DataError, match=r"name one as eos_token in tokenizer_config\.json"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<nowhere>"}, r"tokenizer_config\.json: eos_token='<nowhere>' is not in"),
        ({"eos_token": 7}, r"tokenizer_config\.json: eos_token=7 must be a string"),
        ({"added_tokens_decoder": {"x": "<a>"}}, "'x' is not a token id"),
        ({"added_tokens_decoder": [1]}, "must be an object from id to token"),
        ("{", r"tokenizer_config\.json:1: not valid JSON"),
    ],
)
def test_companions_that_do_not_fit_are_named(config, message, byte_level_json, tmp_path):
    put(tmp_path, tokenizer=byte_level_json, tokenizer_config=config)
    with pytest.raises(DataError, match=message):
        tokenizer.load(tmp_path)


def test_missing_ambiguous_and_oversize_files_are_refused(bpe, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer\.json or tokenizer\.model in this folder"):
        tokenizer.load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"ends in \.json"):
        tokenizer.load(tmp_path / "notes.txt")
    put(tmp_path, tokenizer_config={})
    with pytest.raises(DataError, match="holds settings only"):
        tokenizer.load(tmp_path / "tokenizer_config.json")
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"several tokenizers \(a\.model, b\.model\)"):
        tokenizer.load(tmp_path)
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    (tmp_path / "a.model").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(DataError, match=r"a\.model: larger than 1 MiB"):
        tokenizer.load(tmp_path / "a.model")
