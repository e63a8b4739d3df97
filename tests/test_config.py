"""The config loader: one-line errors that name the field, overrides, and the JSON round trip."""

import dataclasses
from typing import Literal

import pytest

from llm_jax import config
from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    steps: int = 10
    rate: float = 1e-3
    mode: Literal["fast", "safe"] = "safe"
    loud: bool = False
    part: Part = Part(name="a")
    parts: tuple[Part, ...] = (Part(name="x"), Part(name="y"))


def test_overrides_reach_every_depth_and_keep_types():
    words = [
        "--steps",
        "20",
        "--rate=3e-4",
        "--loud",
        "true",
        "--part.name",
        "b",
        "--parts.1.weight=5",
    ]
    changed = config.override(Whole(), words)
    assert changed == Whole(
        steps=20,
        rate=3e-4,
        loud=True,
        part=Part(name="b"),
        parts=(Part(name="x"), Part(name="y", weight=5.0)),
    )


def test_underscores_and_dashes_name_the_same_field():
    model = tiny()
    assert config.override(model, ["--num-layers", "8"]) == config.override(
        model, ["--num_layers", "8"]
    )


def test_a_whole_list_can_be_given_as_json():
    changed = config.override(Whole(), ["--parts", '[{"name": "only"}]'])
    assert changed.parts == (Part(name="only"),)


def test_saved_config_loads_back_equal(tmp_path):
    whole = Whole(mode="fast", parts=(Part(name="中文", weight=0.25),))
    path = tmp_path / "config.json"
    path.write_text(config.dumps(whole), encoding="utf-8")
    assert config.load(path, Whole) == whole


def test_python_file_is_a_config_and_its_errors_name_the_line(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(
        "from llm_jax.model import RopeScaling\ndef config():\n    return RopeScaling(kind='linear')\n"
    )
    assert config.load(good, RopeScaling, ["--factor", "2"]).factor == 2.0
    bad = tmp_path / "bad.py"
    bad.write_text("def config():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"bad\.py:2: ZeroDivisionError"):
        config.load(bad, RopeScaling)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stepz", "1"], "unknown setting --stepz: no 'stepz'; did you mean 'steps'"),
        (["--part.nam", "1"], "did you mean 'name'"),
        (["--steps.deeper", "1"], "'steps' has no fields"),
        (["--steps", "many"], "--steps='many' must be a number"),
        (["--steps", "1.5"], "--steps='1.5' must be a whole number"),
        (["--steps"], "--steps needs a value"),
        (["steps", "1"], "unexpected argument 'steps'"),
        (["--mode", "fats"], "mode='fats' must be one of 'fast', 'safe'; did you mean 'fast'"),
        (["--loud", "yes"], "loud='yes' must be of type bool"),
        (["--parts.7.weight", "1"], "'7' must be an index below 2"),
    ],
)
def test_a_mistyped_override_is_told_in_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        config.override(Whole(), words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stesp": 3}, "unknown setting 'stesp'; did you mean 'steps'"),
        ({"part": {"wieght": 3}}, "unknown setting 'part.wieght'; did you mean 'weight'"),
        ({"steps": "3"}, "steps='3' must be of type int, not str"),
        ({"steps": True}, "steps=True must be of type int"),
        ({"part": {}}, "part.name is missing"),
        ({"part": 3}, "part=3 must be an object"),
        ({"parts": "x"}, "parts='x' must be a list"),
    ],
)
def test_a_broken_file_is_told_in_one_line(data, message):
    with pytest.raises(ConfigError) as caught:
        config.from_dict(Whole, data)
    assert message in str(caught.value)


def test_a_config_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config.dumps(Whole()), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a Whole, but this command needs a Part"):
        config.load(path, Part)
    path.write_text('{"steps": 3,', encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        config.load(path, Whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_heads": 5, "num_kv_heads": 2},
            "model.num_heads=5 must be a multiple of model.num_kv_heads=2",
        ),
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        ({"rope_fraction": 1.5}, "model.rope_fraction=1.5 must be above 0 and at most 1"),
        ({"rope_fraction": 0.4}, "rotates 3 dimensions; the number must be even"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0 must be above 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_the_rule(change, message):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(tiny(), **change)
    assert message in str(caught.value)


def tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=64,
        max_seq_len=64,
    )
