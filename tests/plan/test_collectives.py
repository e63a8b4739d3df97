"""Collectives of a program's text, by hand: loops, groups in every notation, split and asynchronous ones."""

import pytest

from llm_jax.plan.collectives import Collective, collectives

SIZES = {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}

PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %ag = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%fused.again (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter (p: f32[16]) -> f32[4] {
  %p = f32[16] parameter(0)
  %ar.2 = f32[16] all-reduce(%p), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %at = u32[] partition-id()
  ROOT %part = f32[4] dynamic-slice(%ar.2, %at), dynamic_slice_sizes={4}
}

%body (t: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %t = (s32[]{:T(128)}, bf16[2,8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %next.2 = s32[] add(%next, %one)
  %w = bf16[2,8] get-tuple-element(%t), index=1
  %first = bf16[8,8] fusion(%w), kind=kCustom, calls=%fused
  %second = bf16[8,8] fusion(%w), kind=kCustom, calls=%fused.again
  %cp = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%w), channel_id=2, source_target_pairs={{0,4},{1,5},{4,0},{5,1}}
  ROOT %r = (s32[], bf16[2,8]) tuple(%next.2, %w)
}

%condition (t: (s32[], bf16[2,8])) -> pred[] {
  %t = (s32[], bf16[2,8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(32)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[2,8], g: f32[16]) -> f32[16] {
  %w = bf16[2,8] parameter(0)
  %g = f32[16] parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[2,8]) tuple(%zero, %w)
  %loop = (s32[], bf16[2,8]) while(%t), condition=%condition, body=%body
  %rs = (f32[16], f32[4]) reduce-scatter-start(%g), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%sum
  %own = f32[4] fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %ar = f32[16] all-reduce(%g), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%sum
}
"""


def test_every_collective_counts_as_often_as_it_runs_with_its_axes_and_bytes():
    found = {(c.kind, c.axes): (c.times, c.bytes) for c in collectives(PROGRAM, SIZES)}
    # 32 in steps of 2; two fusions of one channel are one gather of 128 bytes, 3/4 from elsewhere
    assert found["all-gather", "fsdp"] == (16, 16 * 128 * 3 / 4)
    assert found["collective-permute", "data"] == (16, 16 * 32)
    # one by its name, one as libtpu writes it: summed, then sliced
    assert found["reduce-scatter", "fsdp"] == (2, 2 * 3 * 16)
    assert found["all-reduce", "data+fsdp"] == (1, 2 * 64 * 7 / 8)
    assert len(found) == 4


def test_a_stated_trip_count_is_believed():
    stated = PROGRAM.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
    )
    assert Collective("all-gather", "fsdp", 5, 5 * 96) in collectives(stated, SIZES)


@pytest.mark.parametrize(
    ("groups", "axes", "bytes_"),
    [
        ("[4,2]<=[2,4]T(1,0)", "data", 2 * 64 / 2),
        ("[2,4]<=[8]", "fsdp", 2 * 64 * 3 / 4),
        ("mesh['a'=2,'b'=4] {'a'}", "data", 2 * 64 / 2),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", None, 0),
    ],
)
def test_groups_are_read_in_every_notation(groups, axes, bytes_):
    text = PROGRAM.replace("mesh['a'=2,'b'=4] {'a','b'}", groups)
    found = [c for c in collectives(text, SIZES) if c.kind == "all-reduce"]
    assert found == ([Collective("all-reduce", axes, 1, bytes_)] if axes else [])
