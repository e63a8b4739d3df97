"""Damaged shards: seen when they are read, and left out from a step on where the config says so."""

import json
import pickle

import numpy as np
import pytest

from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.page_checks import PAGE, DamagedShardError
from llm_jax.data.phases import LeftOut
from llm_jax.data.row_order import RowOrder
from llm_jax.data.shards import TRAIN, open_prepared
from llm_jax.data.weights import SourceWeight
from llm_jax.errors import ConfigError, DataError

# of 21 to 60 or of 128 pairs, so that every piece of 64 pairs at most tells its document
TEXTS = {
    "a": [(f"{i:03d}-" * 40)[: 127 if i % 2 else 20 + i % 40] for i in range(240)],
    "b": ["short"] * 9,
}
BATCH, STEP = 4, 5  # rows of a batch; where the shard is left out


@pytest.fixture
def prepared(make_prepared):
    """Three or more shards of `a`, of more than two pages each."""
    made = make_prepared(TEXTS, shard_max_tokens=6000)
    assert len(made.sources["a"][TRAIN].shards) >= 3
    return made


def flip(path, at: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[at] ^= 4
    path.write_bytes(contents)


def plan_of(prepared, *left_out: LeftOut) -> DataPlan:
    config = DataConfig(
        prepared=str(prepared.folder),
        sources=(SourceWeight(name="a", weight=0.8), SourceWeight(name="b", weight=0.2)),
        seq_len=64,
        leave_out=left_out,
    )
    return DataPlan(config, order=RowOrder(sizes=((0, BATCH),)))


@pytest.mark.parametrize("at", [130, PAGE - 1, PAGE, PAGE + 900, -1])
def test_a_flipped_bit_is_seen_by_whoever_reads_its_page_and_by_nobody_else(prepared, at):
    shard = prepared.sources["a"][TRAIN].shards[1]
    path = prepared.folder / shard.tokens_file
    flip(path, at)
    split = open_prepared(prepared.folder).sources["a"][TRAIN]
    first, _ = split.span(shard.name)
    bytes_per_token = (shard.tokens_size - 128) // shard.num_tokens
    page = (at % shard.tokens_size) // PAGE
    for place in range(0, shard.num_tokens, 50):
        begin = 128 + place * bytes_per_token
        pages = range(begin // PAGE, (begin + 10 * bytes_per_token - 1) // PAGE + 1)
        count = min(10, shard.num_tokens - place)
        if page in pages and count == 10:
            with pytest.raises(DamagedShardError, match=r"bytes \d+ to \d+ .*\(CRC-32\)") as caught:
                split.read(first + place, count)
            assert str(caught.value).startswith(f"{path}: bytes {page * PAGE} to ")
            assert "put a good copy back" in str(caught.value)
            assert caught.value.shard == "a/train-00001"
        elif page not in pages:
            split.read(first + place, count)


def test_a_damaged_header_is_told_as_well(prepared):
    shard = prepared.sources["a"][TRAIN].shards[1]
    flip(prepared.folder / shard.tokens_file, 1)
    split = open_prepared(prepared.folder).sources["a"][TRAIN]
    with pytest.raises(DamagedShardError, match=r"00001\.tokens\.npy: cannot be read"):
        split.read(split.span(shard.name)[0], 1)


def test_the_error_comes_whole_out_of_another_process():
    error = pickle.loads(pickle.dumps(DamagedShardError("told", "a/train-00001")))
    assert (str(error), error.shard) == ("told", "a/train-00001")


def test_a_flipped_bit_in_the_table_of_documents_is_seen_on_planning(prepared):
    path = prepared.folder / prepared.sources["a"][TRAIN].shards[1].documents_file
    flip(path, -1)
    with pytest.raises(DataError, match=r"00001\.documents\.npy: content differs") as caught:
        plan_of(prepared)
    assert not isinstance(caught.value, DamagedShardError), "without it there is no plan"


def test_data_without_checks_are_the_same_data_and_are_read(prepared):
    path = prepared.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for source in manifest["sources"].values():
        for entry in source["splits"].values():
            for shard in entry["shards"]:
                for name in [name for name in shard if name.startswith("checks_")]:
                    shard.pop(name)
    path.write_text(json.dumps(manifest))
    old = open_prepared(prepared.folder)
    assert old.digest == prepared.digest
    assert not any(shard.checks_file for shard in old.shards())
    one, other = (DataPlan(DataConfig(prepared=str(p.folder)), p) for p in (old, prepared))
    assert one.digest == other.digest
    np.testing.assert_array_equal(one.rows(range(9)).tokens_BT, other.rows(range(9)).tokens_BT)


def test_from_its_step_on_the_shards_documents_are_padding_and_all_else_stays(prepared):
    whole, shard = plan_of(prepared), prepared.sources["a"][TRAIN].shards[1]
    holed = plan_of(prepared, LeftOut(shard=shard.name, from_step=STEP))
    before, after = np.arange(STEP * BATCH), np.arange(STEP * BATCH, 40 * BATCH)
    for one, other in zip(whole.rows(before), holed.rows(before), strict=True):
        np.testing.assert_array_equal(one, other)
    bad, missing = pieces_of(prepared, shard), 0
    for one, other in zip(documents(whole, after), documents(holed, after), strict=True):
        kept = [piece for piece in one if piece not in bad]
        assert other == kept
        missing += len(one) - len(kept)
    assert missing > 10, "the shard came up"
    edge = STEP * BATCH
    assert whole.digest_before(edge) == holed.digest_before(edge)
    assert whole.digest_before(edge + 1) != holed.digest_before(edge + 1)
    (told,) = holed.left_out()
    assert told["share"] == shard.num_tokens / prepared.sources["a"][TRAIN].num_tokens


def documents(plan: DataPlan, rows: np.ndarray) -> list[list[bytes]]:
    """The inputs of every segment of every row, and nothing else in it."""
    batch, found = plan.rows(rows), []
    for tokens, segments, mask in zip(
        batch.tokens_BT, batch.segments_BT, batch.loss_mask_BT, strict=True
    ):
        count = segments.max()
        found.append([tokens[segments == n].tobytes() for n in range(1, count + 1)])
        assert all(found[-1]), "segments count from 1 without a gap"
        assert not mask[segments == 0].any()
    return found


def pieces_of(prepared, shard) -> set[bytes]:
    """Inputs of every piece that a plan makes of the documents in a shard."""
    split, pieces = prepared.sources["a"][TRAIN], set()
    begin, end = split.span(shard.name)
    for start, stop in zip(split.document_starts[:-1], split.document_starts[1:], strict=True):
        if begin <= start < end:
            inputs = split.read(int(start), int(stop - start))[:-1]
            pieces |= {inputs[at : at + 64].tobytes() for at in range(0, len(inputs), 64)}
    return pieces


@pytest.mark.parametrize("kind", ["tokens", "checks"])
def test_what_is_left_out_need_not_be_there_but_for_where_its_documents_begin(prepared, kind):
    shard = prepared.sources["a"][TRAIN].shards[1]
    (prepared.folder / getattr(shard, f"{kind}_file")).unlink()
    with pytest.raises(DamagedShardError, match=rf"{kind}\.npy: missing; put a good copy back"):
        plan_of(prepared)
    plan_of(prepared, LeftOut(shard=shard.name)).rows(range(200))
    (prepared.folder / shard.documents_file).unlink()
    with pytest.raises(DataError, match=r"documents\.npy: missing"):
        plan_of(prepared, LeftOut(shard=shard.name))


def test_the_order_in_which_shards_are_left_out_does_not_matter(prepared):
    one, other = (LeftOut(shard=f"a/train-0000{n}", from_step=STEP) for n in (1, 2))
    assert plan_of(prepared, one, other).digest == plan_of(prepared, other, one).digest


def test_a_source_that_no_part_of_the_run_names_may_be_damaged(prepared):
    only_a = DataConfig(
        prepared=str(prepared.folder), sources=(SourceWeight(name="a"),), seq_len=64
    )
    (prepared.folder / "b" / "train-00000.tokens.npy").unlink()
    DataPlan(only_a).rows(range(9))
    with pytest.raises(DamagedShardError, match=r"b/train-00000\.tokens\.npy: missing"):
        plan_of(prepared)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ([("a/train-00007", 0)], "'a/train-00007' is no shard to train on; did you mean"),
        ([("b/train-00000", 0)], "'b/train-00000' is all that 'b' has"),
        ([("a/train-00001", 0), ("a/train-00001", 9)], "'a/train-00001' occurs twice"),
        ([("a/train-00001", -1)], "from_step=-1 of 'a/train-00001' must be 0 or more"),
    ],
)
def test_what_cannot_be_left_out_is_told(prepared, left_out, said):
    with pytest.raises(ConfigError, match=said):
        plan_of(prepared, *(LeftOut(shard=name, from_step=step) for name, step in left_out))
