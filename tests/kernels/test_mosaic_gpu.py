"""The Hopper kernels: who may call them, interpreted, compiled without a GPU, and run on one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from llm_jax.kernels.attention import Request, Rule, mosaic_gpu, mosaic_gpu_backward, ptxas
from llm_jax.kernels.device import Device
from tests.kernels import gpu_aot, mosaic_gpu_interpreted
from tests.kernels.attention_cases import CASES, LONG, answer, make_inputs, rule, run

H200 = Device("gpu", "NVIDIA H200")


def test_query_heads_are_split_into_the_fewest_parts_that_fill_the_gpu():
    assert mosaic_gpu_backward._parts(group=1, blocks=1) == 1
    assert mosaic_gpu_backward._parts(group=16, blocks=128) == 4
    assert mosaic_gpu_backward._parts(group=16, blocks=396) == 1
    assert mosaic_gpu_backward._parts(group=12, blocks=6) == 12
    assert mosaic_gpu_backward._parts(group=6, blocks=150) == 3


def test_every_head_size_has_tiles_for_every_length():
    for H in (8, 64, 80, 128, 200, 256):
        for T in (1, 2048, 4096, 10**6):
            for tiling in mosaic_gpu.tilings_for(T, T, H):
                assert mosaic_gpu.BLOCK % tiling.block == 0
                assert mosaic_gpu.BLOCK % tiling.rows == 0


def request_for(**changes) -> Request:
    plain = Request(1, 256, 256, 8, 2, 128, "bfloat16", Rule(0.1, True, 0, 0.0), *[False] * 4)
    return plain._replace(**changes)


@pytest.fixture
def sound_ptxas(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "ptxas_objection", lambda: None)


@pytest.mark.parametrize("kind", [*gpu_aot.NAMES.values(), "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_every_hopper_is_taken_with_all_features(kind, sound_ptxas):
    everything = Rule(0.1, True, 64, 30.0)
    for H in (64, 80, 128, 256):
        request = request_for(
            H=H, rule=everything, alibi=True, segments=True, positions=True, lse=True
        )
        assert mosaic_gpu.refuses(request, Device("gpu", kind)) is None


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        ({}, Device("cpu", "cpu"), "needs a Hopper GPU"),
        ({}, Device("gpu", "NVIDIA A100-SXM4-80GB"), "not NVIDIA A100-SXM4-80GB"),
        ({}, Device("gpu", "NVIDIA B200"), "needs a Hopper GPU"),
        ({"dtype": "float32"}, H200, "needs bfloat16 or float16, not float32"),
        ({"H": 320}, H200, "at most 256, not 320"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(changes, device, words, sound_ptxas):
    assert words in str(mosaic_gpu.refuses(request_for(**changes), device))


@pytest.mark.parametrize("version", ["12.8.61", "12.8.93", "12.9.41"])
def test_a_ptxas_that_miscompiles_is_refused(version, caplog):
    assert version in str(ptxas.judge(version))
    assert not caplog.text


@pytest.mark.parametrize(
    ("version", "suspect"), [("12.9.86", True), ("13.0.88", True), ("13.5.37", False), ("?", False)]
)
def test_a_suspect_ptxas_is_taken_and_logged(version, suspect, caplog):
    assert ptxas.judge(version) is None
    assert (version in caplog.text) is suspect


def test_the_ptxas_that_is_found_says_what_it_is():
    path = ptxas.find_ptxas()
    if path is None:
        pytest.skip("no ptxas on PATH or in nvidia-cuda-nvcc")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    assert ptxas.VERSION.match(done.stdout.rpartition(", V")[2])


@pytest.mark.parametrize("features", [[], list(gpu_aot.FEATURES)], ids=["plain", "everything"])
def test_forward_and_backward_lower_without_any_cuda_installed(features, sound_ptxas):
    lowered = export.export(
        jax.jit(gpu_aot.call(features, backward=True)),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )
    with gpu_aot.hopper():
        text = lowered(*gpu_aot.arguments(T=2048, H=128)).mlir_module()
    for name in ("forward", "backward_q", "backward_kv"):
        assert f"attention_{name}" in text


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 interprets no load or layout")
@pytest.mark.parametrize("name", mosaic_gpu_interpreted.CASES)
def test_interpreted_results_are_those_of_the_oracle_and_nothing_races(name):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mosaic_gpu_interpreted", name],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout == "ok\n", done.stderr[-3000:]


needs_cuda = pytest.mark.skipif(gpu_aot.missing() is not None, reason=str(gpu_aot.missing()))


COMPILED = [
    ("H100", 64, "causal alibi segments soft_cap window positions"),
    ("H200", 64, "alibi"),
    ("H200", 80, "causal segments"),
    ("H100", 128, "causal alibi segments soft_cap window positions"),
    ("H200", 128, "causal alibi segments"),
    ("H200", 128, "soft_cap positions alibi"),
    ("H100", 256, "causal window"),
    ("H200", 256, "causal alibi segments soft_cap window positions"),
]


def compiled(chip: str, heads: int, features: str) -> dict:
    found = gpu_aot.report(chip, "--heads", str(heads), "--features", *features.split())
    kernels = {"attention_forward", "attention_backward_q", "attention_backward_kv"}
    assert set(found["spills"]) == kernels
    return found


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("chip", "heads", "features"), COMPILED)
def test_forward_and_backward_compile_for_an_absent_gpu(chip, heads, features):
    scores = 4 * gpu_aot.N * 2048 * 2048  # bytes of float32
    assert compiled(chip, heads, features)["temporary_bytes"] < scores / 4


FEW_REGISTERS = "jax 0.12 assembles with libnvJitLink, which ignores setmaxnreg"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("chip", "heads", "features"), COMPILED)
def test_few_registers_are_spilled_and_no_product_waits_for_another(chip, heads, features):
    found = compiled(chip, heads, features)
    if found["few_registers"]:
        pytest.skip(FEW_REGISTERS)
    assert not found["serialized"]
    assert found["spills"]["attention_forward"] <= 32  # in loops with masks
    assert max(found["spills"].values()) <= (128 if heads <= 128 else 1024), found


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("features", ["", "alibi", "soft_cap"])
@pytest.mark.parametrize("heads", [64, 128, 256])
def test_the_unmasked_forward_spills_nothing(heads, features):
    found = compiled("H200", heads, features)
    if found["few_registers"]:
        pytest.skip(FEW_REGISTERS)
    assert found["spills"]["attention_forward"] == 0
    if heads <= 128 and not features:
        assert max(found["spills"].values()) == 0, found


@pytest.mark.gpu
@needs_cuda
def test_memory_grows_linearly_with_length():
    short, long = (
        gpu_aot.report("H200", "--length", str(T), "--features", "causal", "alibi")
        for T in (4096, 16384)
    )
    assert long["temporary_bytes"] <= 4.2 * short["temporary_bytes"]


@pytest.fixture
def on_hopper():
    if jax.default_backend() != "gpu" or not mosaic_gpu.HOPPER.search(jax.devices()[0].device_kind):
        pytest.skip("no Hopper GPU here, or JAX_PLATFORMS=cuda is not set")


GROUPED = [case for case in CASES if case.group == 4]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: "-".join(map(str, case)))
def test_on_a_gpu_query_heads_that_share_keys_may_share_a_block(case, on_hopper, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_backward, "ENOUGH_BLOCKS", 1)  # these sizes would be split
    jax.clear_caches()
    check_on_gpu(case)
    jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_on_a_gpu_bfloat16_is_as_exact_as_dense_bfloat16(case, on_hopper):
    check_on_gpu(case)


def check_on_gpu(case):
    inputs, options = make_inputs(case, LONG), rule(case, LONG)
    *arrays, grad_lse = inputs.arrays
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in arrays]
    expected = answer(case, LONG, inputs._replace(arrays=(*rounded, grad_lse)))
    empty = np.isneginf(expected[1])
    grad_lse = np.where(empty, np.nan, grad_lse)  # must not spread
    inputs = inputs._replace(arrays=(*rounded, grad_lse))

    def errors(implementation: str) -> list[float]:
        found = [np.asarray(x) for x in run(inputs, implementation=implementation, **options)]
        assert [x.dtype.name for x in found] == ["bfloat16", "float32"] + ["bfloat16"] * 3
        np.testing.assert_array_equal(np.isneginf(found[1]), empty)
        assert not found[0][empty].any()
        assert not found[2][empty].any()
        return [
            float(
                np.sqrt(np.mean(np.square(x[~np.isneginf(y)].astype(float) - y[~np.isneginf(y)])))
            )
            for x, y in zip(found, expected, strict=True)
        ]

    for name, tiled, dense in zip(
        ("out", "lse", "dq", "dk", "dv"), errors("mosaic_gpu"), errors("reference"), strict=True
    ):
        floor = 1e-3 if name == "lse" else 1e-4  # float32 in both, but the GPU's tanh has 11 bits
        assert tiled <= max(2 * dense, floor), f"{name}: {tiled} for {dense}"


@pytest.mark.gpu
def test_on_a_gpu_the_same_call_gives_the_same_bits(on_hopper):
    inputs, options = make_inputs(CASES[2], LONG), rule(CASES[2], LONG)
    inputs = inputs._replace(
        arrays=tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs.arrays[:4]) + inputs.arrays[4:]
    )
    first, *others = (run(inputs, implementation="mosaic_gpu", **options) for _ in range(10))
    for other in others:
        for x, y in zip(first, other, strict=True):
            np.testing.assert_array_equal(x, y)
