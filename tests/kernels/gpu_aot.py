"""Compiling our attention for an absent H100 or H200, and what ptxas says of it.

    python -m tests.kernels.gpu_aot H200 --heads 128 --features causal alibi segments

prints the peak bytes of temporary arrays; `report` adds the spilled bytes of every kernel and what
ptxas complains of. It needs jax's CUDA plugin and a ptxas from CUDA 13.3 on, and no GPU:

    pip install "jax[cuda13]"
    export PATH=$VIRTUAL_ENV/lib/python3.12/site-packages/nvidia/cu13/bin:$PATH

The second line matters with jax 0.10, which prefers the system's ptxas to the wheel's.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.kernels.attention import flash_attention
from llm_jax.kernels.attention.ptxas import find_ptxas

NAMES = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
MEMORY = {"H100": 84942979072, "H200": 151397597184}
FEATURES = ("causal", "window", "alibi", "segments", "positions", "soft_cap")
B, N, K = 1, 8, 2


def missing() -> str | None:
    """What is not installed here that this needs; None: nothing."""
    plugins = [importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)]
    if not any(plugins):
        return 'no CUDA plugin of jax; pip install "jax[cuda13]"'
    return None if find_ptxas() else "no ptxas on PATH or in nvidia-cuda-nvcc"


def target(chip: str) -> str:
    """XLA's description of one GPU, a GpuTargetConfigProto in text."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {dict(H100=3352320000000, H200=4800000000000)[chip]} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {MEMORY[chip]} device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0" name: "{NAMES[chip]}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{NAMES[chip]}"
"""


def hopper(chip: str = "H100") -> Any:
    """A context in which `current_device()` is this GPU."""
    device = jax.sharding.AbstractDevice(device_kind=NAMES[chip], platform="gpu", num_cores=132)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def call(features: list[str], backward: bool) -> Callable[..., Any]:
    """Attention, with gradients if `backward`, of the arrays that `arguments` describes."""

    def results(q, k, v, grads, slopes_N, segments, positions):
        def attend(q, k, v):
            return flash_attention(
                q,
                k,
                v,
                causal="causal" in features,
                window=256 if "window" in features else 0,
                soft_cap=30.0 if "soft_cap" in features else 0.0,
                alibi_slopes_N=slopes_N if "alibi" in features else None,
                q_segments_BT=segments if "segments" in features else None,
                kv_segments_BS=segments if "segments" in features else None,
                q_positions_BT=positions if "positions" in features else None,
                kv_positions_BS=positions if "positions" in features else None,
                implementation="mosaic_gpu",
                return_lse=True,
            )

        if not backward:
            return attend(q, k, v)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(grads)

    return results


def arguments(T: int, H: int, sharding: Any = None) -> tuple[Any, ...]:
    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = array(B, T, N, H), array(B, T, K, H)
    grads = (q, array(B, T, N, dtype=jnp.float32))
    rows = array(B, T, dtype=jnp.int32)
    return q, k, k, grads, array(N, dtype=jnp.float32), rows, rows


def compile_for(chip: str, T: int, H: int, features: list[str], backward: bool) -> Any:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target(chip), topology="1x1x1"
    )
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("x",)), P())
    with hopper(chip):
        lowered = jax.jit(call(features, backward)).lower(*arguments(T, H, sharding))
    return lowered.compile()


@cache
def report(*arguments: str) -> dict[str, Any]:
    """Runs this module, with the environment that makes Mosaic GPU show what ptxas says."""
    found = find_ptxas() or shutil.which("ptxas") or ""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PATH": os.path.dirname(found) + os.pathsep + os.environ["PATH"],
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gpu_aot", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = re.findall(
        r"entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores", done.stdout, re.S
    )
    *_, last = done.stdout.strip().splitlines()
    return {
        **json.loads(last),
        "spills": {name: int(spilled) for name, spilled in kernels},
        "serialized": "serializ" in done.stdout,
        "few_registers": "'setmaxnreg' ignored" in done.stdout,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("chip", choices=NAMES)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--features", nargs="*", choices=FEATURES, default=[])
    parser.add_argument("--forward-only", action="store_true")
    wanted = parser.parse_args()
    compiled = compile_for(
        wanted.chip, wanted.length, wanted.heads, wanted.features, not wanted.forward_only
    )
    print(json.dumps({"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}))


if __name__ == "__main__":
    main()
