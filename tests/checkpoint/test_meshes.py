"""A checkpoint goes from any mesh, of one process or several, to any other; the fingerprints do not change."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_jax.checkpoint import read_meta
from tests.checkpoint.tiny_run import flip_bit_of

ROOT = Path(__file__).parents[2]


def on_mesh(folder: Path, verb: str, shape: str, processes: int = 1) -> list[str]:
    """Runs mesh_program.py; the step restored, then the fingerprints in order of name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.mesh_program", folder, verb, shape, str(i), str(processes), str(port)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return outputs[0][0].splitlines()[-1].split()  # gloo writes lines of its own


@pytest.mark.multidevice
def test_eight_devices_save_and_one_restores(tmp_path):
    saved = on_mesh(tmp_path, "save", "4x2")
    assert saved[0] == "2"
    assert on_mesh(tmp_path, "restore", "1x1") == saved
    arrays = read_meta(tmp_path / "checkpoints" / "2")["arrays"]
    assert [arrays[name]["fingerprint"] for name in sorted(arrays)] == saved[1:]


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_save_and_other_meshes_restore_and_agree_on_damage(tmp_path):
    saved = on_mesh(tmp_path, "save", "4x2", processes=2)
    assert saved[0] == "2"
    for shape, processes in (("2x1", 1), ("2x4", 2), ("1x2", 2)):
        assert on_mesh(tmp_path, "restore", shape, processes) == saved
    row = np.arange(32, dtype=np.float32) * 2 - 300  # of the first shard, see mesh_program.make
    files = sorted((tmp_path / "checkpoints/2/state").glob("ocdbt.process_*/d/*"))
    (holding,) = [path for path in files if row.tobytes() in path.read_bytes()]
    flip_bit_of(holding, row)
    assert on_mesh(tmp_path, "damaged", "4x2", processes=2)[0] == "1"
    assert (tmp_path / "checkpoints/2.corrupt").is_dir()
