"""What the makers say of their chips, as data: memory, arithmetic and networks of one device.

Bandwidths count one direction, as a collective does: what a device can send while it receives as much.
Sources, read in November 2026:

    TPU    docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e ("bidirectional" there is twice ours; the
           data-centre network is a pod's divided by its chips), and what libtpu 0.0.52 says is left
           for a program when it refuses a larger one
    H100   NVIDIA H100 data sheet, SXM: 989.4 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways;
    H200   NVIDIA H200 data sheet: as H100, 141 GB at 4.8 TB/s; DGX: one 400 Gbit/s port for each GPU
    CPU    one core of the machine the project is built on: float32 products measured, the rest assumed
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of device."""

    name: str  # as in a topology, "v5e"
    platform: str  # "tpu", "gpu" or "cpu"
    kind: str  # JAX's name of it: what kernels are chosen by
    memory: int  # bytes; of a CPU whatever this machine has
    usable: float  # share of them that a program gets
    flops: float  # bfloat16 multiply-adds count two, per second, dense
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second into the fast network (ICI, NVLink), all ports together
    slow_bandwidth: float  # bytes a second into the network between slices or hosts
    closes_at: int = 0  # a torus' rings close where every side is a multiple of this; 0: no torus
    cores: int = 1  # of AbstractDevice
    slice_of: int = 0  # most chips in one slice; 0: no slices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", platform="tpu", kind="TPU v4", cores=2,
            memory=32 * GIB, usable=30.75 / 32, flops=275e12, memory_bandwidth=1.228e12,
            link_bandwidth=300e9, slow_bandwidth=3.1e9, closes_at=4, slice_of=4096,
        ),
        Chip(
            name="v5e", platform="tpu", kind="TPU v5 lite",
            memory=16 * GIB, usable=15.75 / 16, flops=197e12, memory_bandwidth=0.819e12,
            link_bandwidth=200e9, slow_bandwidth=3.1e9, closes_at=16, slice_of=256,
        ),
        Chip(
            name="v5p", platform="tpu", kind="TPU v5", cores=2,
            memory=96 * GIB, usable=95.74 / 96, flops=459e12, memory_bandwidth=2.765e12,
            link_bandwidth=600e9, slow_bandwidth=6.2e9, closes_at=4, slice_of=6144,
        ),
        Chip(
            name="v6e", platform="tpu", kind="TPU v6 lite",
            memory=32 * GIB, usable=31.25 / 32, flops=918e12, memory_bandwidth=1.638e12,
            link_bandwidth=400e9, slow_bandwidth=12.5e9, closes_at=16, slice_of=256,
        ),
        Chip(
            name="h100", platform="gpu", kind="NVIDIA H100 80GB HBM3", cores=132,
            memory=84_942_979_072, usable=0.75, flops=989.4e12, memory_bandwidth=3.35e12,
            link_bandwidth=450e9, slow_bandwidth=50e9,
        ),
        Chip(
            name="h200", platform="gpu", kind="NVIDIA H200", cores=132,
            memory=151_397_597_184, usable=0.75, flops=989.4e12, memory_bandwidth=4.8e12,
            link_bandwidth=450e9, slow_bandwidth=50e9,
        ),
        Chip(
            name="cpu", platform="cpu", kind="cpu",
            memory=0, usable=1.0, flops=100e9, memory_bandwidth=10e9,
            link_bandwidth=5e9, slow_bandwidth=1e9,
        ),
    )
}  # fmt: skip
