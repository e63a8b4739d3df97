"""Names of hardware: what they mean, and what is said of a mistake."""

import pytest

from llm_jax.errors import ConfigError
from llm_jax.plan import parse_topology
from llm_jax.plan.chips import CHIPS, GIB
from llm_jax.plan.topology import FORMS


@pytest.mark.parametrize(
    ("name", "devices", "islands"),
    [
        ("v5p:4x4x4", 64, 1),
        ("v5e:16x16", 256, 1),
        ("2*v6e:8x8", 128, 2),
        ("h100:1x8", 8, 1),
        ("h200:4x8", 32, 4),
        ("cpu:8", 8, 1),
    ],
)
def test_a_name_says_how_many_devices_and_how_they_are_joined(name, devices, islands):
    topology = parse_topology(name)
    assert (topology.devices, topology.islands) == (devices, islands)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", "topology='v5:4x4': 'v5' is no known chip; did you mean 'v5p'?"),
        ("a100:1x8", "'a100' is no known chip; did you mean 'h100'?"),
        ("v5p:4x4", "topology='v5p:4x4' must look like v5p:4x4x4"),
        ("v5e:4x4x4", "topology='v5e:4x4x4' must look like v5e:4x4"),
        ("h100:8", "topology='h100:8' must look like h100:1x8, hosts x GPUs"),
        ("v5e:0x4", "topology='v5e:0x4' must look like v5e:4x4"),
        ("v5e", "topology='v5e' must look like v5e:4x4"),
        ("2*h100:1x8", "topology='2*h100:1x8': only TPUs come in slices"),
        ("", "topology='': '' is no known chip"),
        ("v5e:32x32", "a slice of v5e has at most 256 chips, these are 1024; several slices are"),
    ],
)
def test_a_mistaken_name_is_told_in_one_line(name, message):
    with pytest.raises(ConfigError) as caught:
        parse_topology(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_chip_has_an_example_and_plausible_numbers():
    assert FORMS.keys() == CHIPS.keys()
    for name, form in FORMS.items():
        chip = parse_topology(form.partition(",")[0]).chip
        assert chip == CHIPS[name]
        assert chip.slow_bandwidth < chip.link_bandwidth < chip.memory_bandwidth < chip.flops


def test_a_torus_without_closed_rings_has_half_the_bandwidth():
    assert parse_topology("v5e:4x4").link_bandwidth == 100e9
    assert parse_topology("v5e:16x16").link_bandwidth == 200e9
    assert parse_topology("v5p:2x2x1").link_bandwidth == 300e9
    assert parse_topology("v5p:4x4x4").link_bandwidth == 600e9


def test_a_gpu_gives_a_program_the_share_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    h100 = parse_topology("h100:1x8")
    assert h100.usable == 0.75 * 84_942_979_072
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    assert h100.usable == 0.92 * 84_942_979_072
    assert parse_topology("v5e:4x4").usable == 15.75 * GIB
