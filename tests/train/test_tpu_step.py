"""The whole training step of a shipped config, compiled for a TPU slice that is not here."""

import dataclasses

import jax
import pytest

from llm_jax import config as config_files
from llm_jax.data.batch import Batch
from llm_jax.plan import tpu_devices
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import batch_sharding, make_mesh
from llm_jax.train import compile_step, make_optimizer, make_schedule
from llm_jax.train.state import abstract_state
from tests.test_configs import FOLDER

pytest.importorskip("libtpu", reason="compiling for TPUs needs the package libtpu")

GIB = 2**30


@pytest.mark.tpu
@pytest.mark.slow
def test_the_1b_step_compiles_for_sixteen_chips_with_our_kernels_in_it():
    config = config_files.load(FOLDER / "pretrain_1b.py", PretrainConfig)
    mesh = make_mesh(config.mesh, tpu_devices("v5e:4x4"))
    rows, T = (
        64,
        config.data.seq_len,
    )  # four micro-batches of one row a chip, as its memory is 16 GiB
    optimizer = make_optimizer(config.optimizer)
    step = compile_step(
        mesh,
        model=config.model,
        config=dataclasses.replace(config.step, batch_size=rows),
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, config.train.steps),
        clip_norm=1.0,
    )
    sharding = batch_sharding(mesh, rows, T)
    array = lambda dtype: jax.ShapeDtypeStruct((rows, T), dtype, sharding=sharding)  # noqa: E731
    batch = Batch(*(array("float32" if "mask" in name else "int32") for name in Batch._fields))
    state = abstract_state(config.model, optimizer, mesh)  # runs a little, so not on absent devices
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    text = compiled.as_text()
    assert "llm_jax_attention_forward" in text
    assert "llm_jax_attention_backward" in text
    assert compiled.memory_analysis().peak_memory_in_bytes < 16 * GIB
