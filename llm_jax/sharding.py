"""Which mesh axis holds which array axis: the one place that knows about devices.

Model code names its axes (`embed`, `heads`, ...); the table `RULES` says which mesh axes hold each.
Notation as in the scaling book: wq[D_fsdp, N_tensor, H] is embed over `fsdp`, heads over `tensor`.

    data    replicas of the parameters, each on its own rows of the batch (the slow network)
    fsdp    rows of the batch AND slices of every parameter (gathered layer by layer)
    tensor  heads, mlp and vocabulary split inside a layer (the fast network)
    context tokens of every row, for documents too long for one device; attention gathers the keys
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.errors import ConfigError

# logical axis -> mesh axes. `embed` is the stored axis of parameters, `act_embed` the one of
# activations: sharding both over fsdp would put two axes of x_BTD on the same mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("context",),
    "embed": ("fsdp",),
    "act_embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "layers": (),
    "rank": (),
    "position": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. Their product is the number of devices used."""

    data: int = 1  # replicas; -1: as many as there are devices left
    fsdp: int = 1  # parameter shards; -1: as many as there are devices left
    tensor: int = 1  # splits of heads, mlp and vocabulary
    context: int = 1  # splits of every row's tokens
    # over the slow network, between TPU slices or GPU hosts: these multiply `data` and `fsdp`, which
    # then count inside one slice or host. HSDP on two hosts of 8 GPUs is fsdp=8, dcn_data=2
    dcn_data: int = 1
    dcn_fsdp: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and not (size == -1 and name in ("data", "fsdp")):
                raise ConfigError(
                    f"mesh.{name}={size} must be at least 1, or -1 to fill (data, fsdp)"
                )
        if self.data == -1 and self.fsdp == -1:
            raise ConfigError(
                "mesh.data=-1 and mesh.fsdp=-1: only one axis can be filled; state the other"
            )


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes on so many devices, both networks together.

    Raises:
      ConfigError: they do not multiply to the number of devices.
    """
    stated = math.prod(size for size in dataclasses.asdict(config).values() if size > 0)
    fill = max(devices // stated, 1)
    sizes = {
        "data": (fill if config.data == -1 else config.data) * config.dcn_data,
        "fsdp": (fill if config.fsdp == -1 else config.fsdp) * config.dcn_fsdp,
        "tensor": config.tensor,
        "context": config.context,
    }
    if math.prod(sizes.values()) != devices:
        shape = " x ".join(
            f"{name}={size}"
            for name, size in dataclasses.asdict(config).items()
            if size != 1 or not name.startswith("dcn")
        )
        raise ConfigError(
            f"mesh {shape} does not fit {devices} device(s): the product must be {devices}; "
            "-1 for mesh.data or mesh.fsdp fills what is left"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor x context` over all devices, or over `devices`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the parts over the slow
        network not to the number of slices or hosts.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # Auto: jax.make_mesh now defaults to Explicit, which activation constraints do not accept
    axis_types = (AxisType.Auto,) * len(sizes)
    slow = {"data": config.dcn_data, "fsdp": config.dcn_fsdp}
    by_process, islands = _islands(devices)
    # GPU hosts may be one flat mesh, slow as it is; slices of TPUs may not
    if math.prod(slow.values()) == 1 and (devices[0].platform != "tpu" or islands == 1):
        return jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices
        )
    if math.prod(slow.values()) != islands:
        what = "process(es)" if by_process else "slice(s)"
        raise ConfigError(
            f"mesh.dcn_data={config.dcn_data} x mesh.dcn_fsdp={config.dcn_fsdp} must be {islands}, as the "
            f"devices lie on {islands} {what}: these two say how the slow network between them is used"
        )
    outer = tuple(slow.get(name, 1) for name in sizes)
    inner = tuple(size // between for size, between in zip(sizes.values(), outer, strict=True))
    array = mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process
    )
    return Mesh(array, tuple(sizes), axis_types=axis_types)


def _islands(devices: Sequence[Any]) -> tuple[bool, int]:
    """Whether a process is what the slow network joins, not a slice, and how many of them there are.

    JAX numbers TPU slices, and GPU hosts where it runs on them; described GPUs and CPUs differ by
    process only.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    by_process = devices[0].platform != "tpu" and len(slices) == 1
    found = {device.process_index for device in devices} if by_process else slices
    return by_process, len(found)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Any, what: str = ""
) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names.

    `kv_heads` alone may be fewer than its mesh axis (multi-query attention under tensor parallelism):
    it is then replicated, every shard holding the heads its queries need.

    Args:
      axes: logical name of each axis; None is never split.
      shape: size of each axis.
      mesh: anything with the sizes of its axes under `shape`.
      what: name of the array, for the error. Without one, an axis that does not divide is not split:
        right for activations, whose batch may be a single prompt.

    Raises:
      ConfigError: a size does not divide, or two axes of one array fall on the same mesh axis.
    """
    entries: list[Any] = []
    used: dict[str, str] = {}
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in RULES[name] if mesh.shape[a] > 1) if name else ()
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            if what and not (name == "kv_heads" and parts % size == 0):
                held = " x ".join(f"mesh.{a}={mesh.shape[a]}" for a in mesh_axes)
                raise ConfigError(f"{what}: {name}={size} must be a multiple of {held}")
            mesh_axes = ()
        for axis in mesh_axes:
            if axis in used:
                raise ConfigError(
                    f"{what}: axes {used[axis]} and {name} both fall on mesh axis {axis}"
                )
            used[axis] = str(name)
        # a bare name for one axis: P("fsdp") and P(("fsdp",)) differ as jit cache keys
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def tree_shardings(mesh: Mesh | AbstractMesh, abstract: Any, axes: Any) -> Any:
    """NamedShardings of a tree of shapes, given the tree of logical axis names (tuples) beside it."""

    def one(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        what = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, what))

    return jax.tree_util.tree_map_with_path(one, abstract, axes)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(
    mesh: Mesh | AbstractMesh, batch_size: int, seq_len: int | None = None
) -> NamedSharding:
    """Sharding of [B, T] arrays: rows over data and fsdp, tokens over context.

    Raises:
      ConfigError: `batch_size`, or `seq_len` where it is given, does not divide over the mesh.
    """
    if seq_len is not None:
        partition_spec(("time",), (seq_len,), mesh, "data.seq_len")
    rows = partition_spec(("batch",), (batch_size,), mesh, "step.batch_size")
    return NamedSharding(mesh, PartitionSpec(*rows, *partition_spec(("time",), (0,), mesh)))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Indices of the global batch's rows that this process holds, or parts of them, ascending.

    Read off the sharding: a slice by process index is silently wrong when a process does not own
    its own slice of the batch axis (tensor parallelism across processes).
    """
    index_map = sharding.addressable_devices_indices_map((batch_size, sharding.mesh.size))
    rows = {
        row for index in index_map.values() if index for row in range(*index[0].indices(batch_size))
    }
    return np.array(sorted(rows), np.int64)


def place_rows(
    local: np.ndarray, rows: np.ndarray, batch_size: int, sharding: NamedSharding
) -> jax.Array:
    """The global [B, T] array whose rows `rows` this process has as `local` [len(rows), T]."""

    def fetch(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return local[np.searchsorted(rows, np.arange(start, stop)), index[1]]

    return jax.make_array_from_callback((batch_size, local.shape[1]), sharding, fetch)


def mesh_axes(name: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in use that split an array axis of this logical name and size."""
    mesh = jax.sharding.get_abstract_mesh()
    entry = None if mesh.empty else partition_spec((name,), (size,), mesh)[0]
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def part_of(name: str, size: int) -> int:
    """How long an axis of this logical name and size is on one device of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return size // math.prod(mesh.shape[axis] for axis in mesh_axes(name, size))


def axis_index(name: str, size: int) -> jax.Array | int:
    """Inside `map_shards`: which part of that axis this device has, from 0."""
    axes = mesh_axes(name, size)
    return jax.lax.axis_index(axes) if axes else 0


def map_shards(function: Callable[..., Any], arguments: Any, axes: Any, out_axes: Any) -> Any:
    """`function(*arguments)` on every device's own part of the arguments, for code that GSPMD cannot split.

    Without a mesh (`jax.set_mesh`), a plain call. An axis whose size does not divide over its mesh
    axes is not split: every device then computes the whole of it.

    Args:
      function: sees local shapes; collectives inside it name mesh axes.
      arguments: a tuple of pytrees of arrays; None where an array is absent.
      axes: for every array the tuple of its logical axis names, None for an axis not to be split.
      out_axes: the same for the results; a name splits an axis as it does in the arguments.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arguments)
    entries: dict[str | None, Any] = {}

    def spec(array: Any, names: tuple[str | None, ...]) -> PartitionSpec:
        found = partition_spec(names, array.shape, mesh)
        entries.update(zip(names, found, strict=True))
        return found

    leaves, tree = jax.tree.flatten(arguments)
    named = tree.flatten_up_to(axes)
    in_specs = tree.unflatten([spec(x, n) for x, n in zip(leaves, named, strict=True)])
    is_names = lambda x: isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)  # noqa: E731
    out_specs = jax.tree.map(
        lambda names: PartitionSpec(*(entries[name] if name else None for name in names)),
        out_axes,
        is_leaf=is_names,
    )
    # check_vma: a Pallas call does not say which mesh axes its results vary over
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*arguments)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States the sharding of an activation by its logical axes; without a mesh (`jax.set_mesh`), x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
