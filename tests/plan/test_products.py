"""Operations of a program's products, by hand: plain, many-headed, in a loop, in a kernel."""

import pytest

from llm_jax.plan.products import Products, products

# lines of real programs for TPUs, but for their layouts
PROGRAM = """HloModule jit_step

%fused (x: bf16[1024,4096], w: bf16[4096,32000]) -> f32[1024,32000] {
  %x = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4096,32000]{1,0} parameter(1)
  ROOT %convolution.76 = f32[1024,32000]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %t = (s32[], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %kernel = (bf16[8], f32[8]) custom-call(%t), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"7","transcendentals":"9"}}}
  ROOT %r = (s32[], bf16[8]) tuple(%next, %t)
}

%condition (t: (s32[], bf16[8])) -> pred[] {
  %t = (s32[], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(32)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[1024,4096], w: bf16[4096,32000]) -> f32[1024,32000] {
  %x = bf16[1024,4096] parameter(0)
  %w = bf16[4096,32000] parameter(1)
  %t = (s32[], bf16[8]) tuple()
  %loop = (s32[], bf16[8]) while(%t), condition=%condition, body=%body
  ROOT %first = f32[1024,32000] fusion(%x, %w), kind=kOutput, calls=%fused
}
"""
ONCE = 2.0 * 1024 * 4096 * 32_000


def test_a_product_counts_where_it_is_called_and_a_kernel_as_often_as_its_loop_turns():
    assert products(PROGRAM) == Products(ONCE, 32 * 7.0)


@pytest.mark.parametrize(
    ("left", "right", "line", "expected"),
    [
        pytest.param(
            "bf16[4096,11008,1]", "bf16[11008,2,256]",
            "bf16[4096,2,256]{2,0,1} convolution(%x, %w), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            2.0 * 4096 * 11_008 * 512, id="a window over two halves, of which one is inside",
        ),
        pytest.param(
            "bf16[4096,2,256,1]", "bf16[2,256,32,128]",
            "bf16[4096,32,128,1] convolution(%x, %w), window={size=32x2 pad=31_31x0_0 rhs_reversal=1x0}, dim_labels=b1f0_1i0o->b0f1",
            2.0 * 4096 * 512 * 32 * 128, id="heads, and a sum over two halves",
        ),
        pytest.param(
            "f32[8,64,16]", "f32[8,16,4]",
            "f32[8,64,4] dot(%x, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
            2.0 * 8 * 64 * 16 * 4, id="a batched product on a CPU",
        ),
        pytest.param(
            "f32[4,6,9]", "f32[3,9,2]",
            "f32[4,2,2] convolution(%x, %w), window={size=3 stride=2}, dim_labels=b0f_0io->b0f",
            2.0 * 4 * 2 * 2 * 9 * 3, id="a strided window, wholly inside",
        ),
        pytest.param(
            "f32[1,4,1]", "f32[4,1,1]",
            "f32[1,4,1] convolution(%x, %w), window={size=4 stride=3 pad=3_3 lhs_dilate=4}, dim_labels=b0f_0io->b0f",
            2.0 * 4, id="a batch as a spread input: every window sees one entry",
        ),
    ],
)  # fmt: skip
def test_only_what_lies_inside_a_window_counts(left, right, line, expected):
    text = f"ENTRY %main (x: f32[1], w: f32[1]) -> f32[1] {{\n  %x = {left} parameter(0)\n  %w = {right} parameter(1)\n  ROOT %y = {line}\n}}\n"
    assert products(text) == Products(expected, 0.0)
