"""Meshes over a fast and a slow network: real processes are the islands of the fast one."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.sharding import MeshConfig, make_mesh, mesh_sizes
from tests.tiny import LLAMA
from tests.train.mesh_training import train_on
from tests.virtual_devices import with_devices


def run_two(name: str) -> dict:
    """Both processes; the JSON of the first, after a look that the second says the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.train.hybrid_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(index), port, name],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=with_devices(4),
        )
        for index in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told[0][1][-2000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in told)
    assert first == second
    return first


# hsdp: parameters split inside a host, replicas over hosts; slices: parameters split over both networks
@pytest.mark.multidevice
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsdp", "slices"])
def test_training_over_two_hosts_is_the_same_training(name):
    result = run_two(name)
    alone, _, _ = train_on(make_mesh(MeshConfig()), LLAMA, steps=2)
    np.testing.assert_allclose(result["losses"], alone, rtol=1e-5)
    expected = {
        "hsdp": [[0] * 4, [1] * 4],  # a replica is a host
        "slices": [[0, 0, 1, 1]] * 2,  # every replica is split over both, half and half
    }[name]
    assert result["hosts"] == expected
    assert "mesh.dcn_data=4 x mesh.dcn_fsdp=1 must be 2" in result["refused"]
    assert "2 process(es)" in result["refused"]


def test_sizes_over_both_networks_multiply():
    assert mesh_sizes(MeshConfig(data=1, fsdp=-1, dcn_data=2), 16) == {
        "data": 2, "fsdp": 8, "tensor": 1, "context": 1,
    }  # fmt: skip
    assert mesh_sizes(MeshConfig(data=2, fsdp=2, tensor=2, dcn_fsdp=4), 32)["fsdp"] == 8
    with pytest.raises(
        ConfigError, match=r"mesh data=1 x fsdp=3 x tensor=1 x context=1 x dcn_data=2"
    ):
        mesh_sizes(MeshConfig(fsdp=3, dcn_data=2), 8)
    with pytest.raises(ConfigError, match=r"mesh\.dcn_data=0 must be at least 1"):
        MeshConfig(dcn_data=0)


def test_a_slow_network_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.dcn_data=2 .* must be 1, .* lie on 1 process"):
        make_mesh(MeshConfig(data=1, fsdp=1, dcn_data=2), [FakeDevice(0), FakeDevice(0)])


class FakeDevice:
    """What `make_mesh` looks at of a device."""

    platform = "cpu"

    def __init__(self, process: int) -> None:
        self.process_index = process
