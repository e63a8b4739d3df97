"""`llm-jax plan`: what it prints and writes, and what it says of mistakes."""

import importlib.util
import json
from pathlib import Path

import pytest

from llm_jax.plan import Collective, Compiled, estimate, parse_topology
from llm_jax.plan.products import Products
from llm_jax.run import cli, plan
from tests.plan.requests import LLAMA_2_7B, ask
from tests.test_configs import FOLDER

B7 = str(FOLDER / "pretrain_7b_tpu.py")
TUNING = Path(__file__).parent / "tiny_instruct.py"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(plan.main, list(words))
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return command


def test_the_estimate_of_a_config_whose_data_does_not_exist(run, tmp_path):
    words = ("--topology", "v5e:4x4", "--fast", "--step.batch-size", "16")
    status, out, _ = run(B7, *words, "--json", "plan.json")
    assert status == 0
    assert "16 x TPU v5 lite" in out
    assert "6,738,415,616 parameters" in out
    assert "fits: 9.1" in out
    assert "of 15.75" in out
    answer = json.loads((tmp_path / "plan.json").read_text())
    assert answer["estimate"]["fits"]
    assert answer["estimate"]["memory"]["parameters"] == pytest.approx(
        4 * 6_738_415_616 / 16, rel=1e-3
    )
    assert "compiled" not in answer


def test_what_does_not_fit_is_said_with_what_to_do(run):
    status, out, _ = run(B7, "--topology", "v5e:2x2", "--fast", "--step.batch-size", "4")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert "raise --step.micro-batches" in out
    assert "too close" not in out


def test_an_estimate_that_nearly_fits_asks_for_the_compiler():
    topology = parse_topology("v5e:4x4")
    for share in (0.95, 1.05):
        assert "too close to be sure" in plan.estimated(share * topology.usable, topology)
    assert "too close to be sure" not in plan.estimated(0.8 * topology.usable, topology)


@pytest.mark.slow
def test_a_search_prints_what_to_type(run):
    words = ("--topology", "v5e:1x2", "--fast", "--search", "--step.batch-size", "16")
    status, out, _ = run(str(FOLDER / "pretrain_125m.py"), *words)
    assert status == 0
    assert "ways fit; the fastest" in out
    assert "--mesh.fsdp" in out


def test_what_the_compiler_says_is_set_beside_the_estimate():
    topology = parse_topology("v5e:4x4")
    counted = estimate(ask(LLAMA_2_7B, batch_size=16, seq_len=4096), topology)
    found = Compiled(
        platform="tpu", arguments=5_056_890_880, outputs=5_056_813_056, aliased=5_056_808_960,
        temporaries=6_506_000_000, peak=9_630_000_000, attention="pallas_tpu",
        collectives=(Collective("all-gather", "fsdp", 258, 11.9e9),), products=Products(203.6e12, 19.8e12),
    )  # fmt: skip
    assert found.total == found.peak, "libtpu's temporaries are more than it allocates"
    shown = plan.compiled_lines(found, counted, topology)
    assert "fits: 8.97 GiB of 15.75" in shown
    assert "the estimate is +1." in shown
    assert "over fsdp: 11.90 GB received; estimated 38.15 (258 all-gather)" in shown
    assert "203.6 TFLOP in products, 19.8 in kernels: 1.47 s a step, MFU 60" in shown


@pytest.mark.parametrize(
    ("words", "needed", "off"),
    [
        ("E1000: the total memory required for HLO temporaries (17.34G) exceeds available HBM (15.75G).",
         17.34 * 2**30, " the estimate is -47.4% off"),
        ("Ran out of memory", 0, ""),
    ],
)  # fmt: skip
def test_a_refusal_is_in_the_compilers_words_with_what_it_needs(words, needed, off):
    topology = parse_topology("v5e:4x4")
    counted = estimate(ask(LLAMA_2_7B, batch_size=16, seq_len=4096), topology)
    refused = Compiled(platform="tpu", too_large=words)
    assert refused.total == int(needed)
    shown = plan.compiled_lines(refused, counted, topology)
    assert shown == f"compiled   DOES NOT FIT, says the compiler: {words}{off}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology", "v5:4x4"), "topology='v5:4x4': 'v5' is no known chip"),
        (("--topology", "v5p:4x4"), "must look like v5p:4x4x4"),
        ((), "the following arguments are required: --topology"),
        (("--topology", "v5e:4x4", "--fsat"), "unknown setting --fsat"),
        (("--topology", "v5e:4x4", "--mesh.fsdp", "3"), "mesh data=1 x fsdp=3"),
        (("--topology", "v5e:4x4", "--step.batch-size", "8"), "step.batch_size"),
        (
            ("--topology", "v5e:4x4", "--mesh.tensor", "16", "--model.mlp-dim", "11000"),
            "mlp=11000 must be a multiple of mesh.tensor=16",
        ),
        (("--topology", "v5e:4x4", "--json", "none/x.json"), "there is no folder"),
        (("--topology", "v5e:4x4", "--json", "."), "--json .: is a folder"),
        (("--topology", "v5e:3x5"), "sides of a slice of v5e are 1, 2, 4, 8 or 16"),
        (("--topology", "v5p:2x2x3"), "1, 2 or a multiple of 4"),
        (("--topology", "cpu:7", "--search"), "no mesh suits the run; step.batch_size: batch="),
        (
            ("--topology", "v5e:4x4", "--search", "--mesh.context", "3"),
            "mesh.context=3 must divide 16",
        ),
    ],
)
def test_a_mistake_is_one_line(run, words, message, tmp_path):
    status, _, error = run(B7, *words, "--fast")
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_share_of_a_gpus_memory_that_is_none_is_one_line(run, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    status, _, error = run(B7, "--topology", "h100:1x8", "--fast")
    assert status == 2
    assert error.startswith("error: XLA_PYTHON_CLIENT_MEM_FRACTION='most' must be a share")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "parameters, remat"),
        (("--method", "dpo"), "parameters, and as many of a reference, remat"),
        (("--model.lora.rank", "2"), "of them trained, remat"),
        (("--model.lora.rank", "2", "--method", "dpo"), "of them trained, remat"),
    ],
)
def test_a_tuning_run_is_planned_from_its_base_alone(run, tmp_path, base, words, told):
    where = ("--topology", "cpu:4", "--fast", "--json", "plan.json", "--init-from", str(base))
    status, out, error = run(str(TUNING), *where, *words)
    assert status == 0, error
    assert told in out
    memory = json.loads((tmp_path / "plan.json").read_text())["estimate"]["memory"]
    whole = "--model.lora.rank" not in words
    assert (memory["optimizer"] >= memory["parameters"]) == whole, "moments of what is trained"


def test_an_absent_compiler_is_named_with_what_to_install(run, monkeypatch):
    if importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("the plugin is here")
    status, out, error = run(
        str(FOLDER / "pretrain_125m.py"), "--topology", "h100:1x8", "--mesh.data", "8"
    )
    assert status == 2
    assert "estimate" in out, "the estimate needs no compiler"
    assert 'pip install "jax[cuda13]"' in error
    assert error.count("\n") == 1
