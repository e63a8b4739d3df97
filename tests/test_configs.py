"""Every page in configs/ builds, documents itself, survives JSON, and fits the mesh it is meant for."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from llm_jax import config as config_files
from llm_jax.data.batch import Batch
from llm_jax.model import count_params
from llm_jax.run.continuation import fill_in
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.pretrain import AS_BASE, PretrainConfig
from llm_jax.sharding import batch_sharding, mesh_sizes
from llm_jax.train import (
    count_trained,
    make_optimizer,
    make_schedule,
    new_state,
    plan_stages,
    state_shardings,
    train_step,
)

FOLDER = Path(__file__).parent.parent / "configs"
OTHERS = ("__init__", "self_instruct")  # pages of other commands are tested beside these
PAGES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in OTHERS)
# of the hardware the page names; otherwise one host of 8
DEVICES = {"demo": 1, "pretrain_7b_tpu": 64, "instruct_demo": 1, "instruct_7b_tpu": 64}
BASES = {
    "instruct_7b_tpu": "pretrain_7b_tpu",
    "instruct_7b_lora": "pretrain_7b_gpu",
}  # the page whose model it begins with; else 125m


def kind_of(page: Path) -> type[PretrainConfig] | type[InstructConfig]:
    """The config that a page of this name holds."""
    return InstructConfig if page.stem.startswith("instruct") else PretrainConfig


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_config_builds_abstractly_and_says_what_to_run_and_expect(page):
    config = config_files.load(page, kind_of(page))
    source = FOLDER / f"{BASES.get(page.stem, 'pretrain_125m')}.py"
    base = config_files.load(source, PretrainConfig).model
    text = ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or ""
    assert "Run:" in text
    assert "Expect:" in text
    assert config_files.loads(config_files.dumps(config), kind_of(page)) == config

    stated = re.search(r"([\d,]+) parameters", text)
    if config.init_from:  # the model is whichever base it is given
        least = 0 if page.stem in BASES else 38_016
        model = fill_in(config.model, AS_BASE, base, least=least, where="the base")
        own = {"vocab_size": max(least, base.vocab_size)}
        own |= {name: getattr(config.model, name) for name in ("param_dtype", "lora")}
        assert model == dataclasses.replace(base, **own)
        config = dataclasses.replace(config, model=model)
        if page.stem in BASES:
            assert stated
            assert count_params(model) == int(stated[1].replace(",", ""))
    else:
        assert stated, "Expect: gives the number of parameters"
        assert count_params(config.model) == int(stated[1].replace(",", ""))

    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, config.train.steps)
    stages = dataclasses.replace(config.stages, new_rows_steps=0)
    trainable = plan_stages(stages, config.optimizer, config.train.steps, config.model)[
        -1
    ].trainable
    if part := re.search(r"([\d,]+) of them trained", text):
        assert count_trained(config.model, trainable) == int(part[1].replace(",", ""))
    state = jax.eval_shape(lambda: new_state(config.model, optimizer, jax.random.key(0), trainable))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory = re.search(r"([\d.]+) GB of parameters and optimizer state", text)
    if memory:
        assert f"{size / 1e9:.1f}" == memory[1]

    sizes = mesh_sizes(config.mesh, DEVICES.get(page.stem, 8))
    shape = tuple(sizes.values())
    mesh = AbstractMesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    state_shardings(config.model, optimizer, mesh, trainable)  # raises when a size does not divide
    batch_sharding(mesh, config.step.batch_size // config.step.micro_batches)

    rows = (config.step.batch_size, config.data.seq_len)
    ids = jax.ShapeDtypeStruct(rows, jnp.int32)
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(rows, jnp.float32))
    new, metrics = jax.eval_shape(
        lambda s, b: train_step(
            s,
            b,
            model=config.model,
            config=config.step,
            optimizer=optimizer,
            schedule=schedule,
            clip_norm=1.0,
            trainable=trainable,
        ),
        state,
        batch,
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()
