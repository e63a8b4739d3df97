"""What is planned: the settings of a run that decide its memory and time, and its mesh."""

import dataclasses
import functools
import math
from typing import Any, Literal

from jax.sharding import AbstractMesh, AxisType

from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig, abstract_params, logical_axes
from llm_jax.plan.topology import Topology
from llm_jax.sharding import MeshConfig, batch_sharding, mesh_sizes, tree_shardings
from llm_jax.train import OptimizerConfig, PreferenceConfig, StepConfig
from llm_jax.train.preference import has_reference_below
from llm_jax.train.trainable import ALL, Trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A run, without its data. A config in JSON, so that a process of its own can compile it."""

    model: ModelConfig
    step: StepConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    seq_len: int
    steps: int
    trainable: Trainable = ALL
    method: Literal["sft", "dpo", "simpo"] = (
        "sft"  # sft: of targets, as in pretraining; else of pairs
    )
    preference: PreferenceConfig = PreferenceConfig()

    @property
    def has_reference(self) -> bool:
        """Whether the step is given the parameters of another model to compare with."""
        return self.method == "dpo" and not has_reference_below(self.model, self.trainable)

    @property
    def trains_vocabulary(self) -> bool:
        """Whether any row of embedding or head is trained."""
        return self.trainable.leaves == "all" or self.trainable.first_row > 0

    def sizes(self, topology: Topology) -> dict[str, int]:
        """Of the mesh axes on these devices. Raises ConfigError when they do not fit."""
        return mesh_sizes(self.mesh, topology.devices)

    def abstract_mesh(self, topology: Topology) -> AbstractMesh:
        """The mesh without devices, after a look at whether batch and tokens divide over it.

        Raises:
          ConfigError: they do not.
        """
        sizes = self.sizes(topology)
        between = self.mesh.dcn_data * self.mesh.dcn_fsdp
        if between != topology.islands and (between > 1 or topology.slices > 1):
            raise ConfigError(
                f"mesh.dcn_data={self.mesh.dcn_data} x mesh.dcn_fsdp={self.mesh.dcn_fsdp} must be "
                f"{topology.islands}, the slices or hosts of topology={topology.name!r}"
            )
        axis_types = (AxisType.Auto,) * len(sizes)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)
        batch_sharding(mesh, self.step.batch_size, self.seq_len)
        micro = self.step.batch_size // self.step.micro_batches
        try:
            batch_sharding(mesh, micro)
        except ConfigError:
            rows = sizes["data"] * sizes["fsdp"]
            raise ConfigError(
                f"step.batch_size={self.step.batch_size} in step.micro_batches={self.step.micro_batches} "
                f"parts is {micro} rows at a time, which {rows} devices (mesh.data x mesh.fsdp) cannot "
                f"share; micro_batches may be up to {max(self.step.batch_size // rows, 1)}"
            ) from None
        return mesh

    def check(self, topology: Topology) -> None:
        """Raises ConfigError when model or batch do not divide over the mesh."""
        mesh = self.abstract_mesh(topology)
        shapes, axes = _parameters(self.model)
        tree_shardings(mesh, shapes, axes)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.step.batch_size * self.seq_len


@functools.cache
def _parameters(model: ModelConfig) -> tuple[Any, Any]:
    return abstract_params(model), logical_axes(model)


def rows_and_tokens(request: Request, sizes: dict[str, int]) -> tuple[int, int]:
    """Rows of a micro-batch on one device, and tokens of each."""
    micro = request.step.batch_size // request.step.micro_batches
    return micro // math.prod((sizes["data"], sizes["fsdp"])), request.seq_len // sizes["context"]
