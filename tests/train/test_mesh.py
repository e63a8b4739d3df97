"""Sharded training is the same training: virtual devices in one process."""

import json
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.sharding import MeshConfig, make_mesh, partition_spec
from tests.virtual_devices import with_devices


def run_worker(module: str, *words: str, devices: int = 8) -> dict:
    """Runs a worker module on virtual devices and returns the JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        env=with_devices(devices),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # XLA says so where it has to gather a whole array because two shardings do not meet
    assert "Involuntary" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# llama: grouped-query attention over tensor; bloom: one kv head, replicated over tensor, and ALiBi;
# gemma: local layers beside others, soft-caps; cohere: a bias of the head, norms of each head
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("bloom", "gemma", "cohere"))],
)
def test_three_steps_on_every_mesh_equal_one_device_with_one_compilation(family):
    results = run_worker("tests.train.mesh_worker", family)
    for mesh, result in results.items():
        np.testing.assert_allclose(
            result["losses"], results["1x1x1x1"]["losses"], rtol=1e-5, err_msg=mesh
        )
        assert result["compilations"] == 1, mesh
    losses = results["1x1x1x1"]["losses"]
    assert len(set(losses)) == 3, "the steps did something"
    assert results["1x8x1x1"]["part"] == 1 / 8, "fsdp splits the parameters"
    assert results["8x1x1x1"]["part"] == 1, "data replicates them"
    assert results["2x2x2x1"]["part"] == 1 / 4


class Shape:
    """Stands in for a mesh where only the axis sizes matter."""

    shape = {"data": 1, "fsdp": 2, "tensor": 4}  # noqa: RUF012


def test_kv_heads_that_do_not_fill_the_tensor_axis_are_replicated():
    axes = ("embed", "kv_heads", "head_dim")
    assert partition_spec(axes, (8, 4, 16), Shape)[1] == "tensor"
    assert partition_spec(axes, (8, 2, 16), Shape)[1] is None
    with pytest.raises(ConfigError, match=r"kv_heads=3 must be a multiple of mesh\.tensor=4"):
        partition_spec(axes, (8, 3, 16), Shape, "key")


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "mlp"), (8, 6), "w: mlp=6 must be a multiple of mesh.tensor=4"),
        (("vocab", "embed"), (8, 7), "w: embed=7 must be a multiple of mesh.fsdp=2"),
        (("mlp", "heads"), (8, 8), "w: axes mlp and heads both fall on mesh axis tensor"),
    ],
)
def test_what_does_not_fit_the_mesh_is_told_by_its_axis(axes, shape, message):
    with pytest.raises(ConfigError) as caught:
        partition_spec(axes, shape, Shape, "w")
    assert message in str(caught.value)


def test_a_mesh_that_does_not_match_the_devices_says_how_to_fill_it():
    with pytest.raises(
        ConfigError, match=r"mesh data=3 x fsdp=1 x tensor=1 x context=1 does not fit 1 device"
    ):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ConfigError, match=r"mesh.data=-1 and mesh.fsdp=-1: only one axis"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"mesh.tensor=-1 must be at least 1"):
        MeshConfig(tensor=-1)
    assert make_mesh(MeshConfig(fsdp=-1)).size == 1
