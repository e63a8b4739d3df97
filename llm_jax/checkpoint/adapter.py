"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, in both directions.

Of a module with weight W [out, in], PEFT has lora_A [r, in] and lora_B [out, r]. One of the two has the
width D of the model, and is ours but for the order of its axes; the other is cut into heads as W is, so the
row of `name_table` for W says how, with r in the place of D.

Where q, k and v are one module of theirs, their lora_A serves all three and lora_B is cut into parts. The
other way, three pairs of ours become one of three times the rank: B has blocks, so the products are the same.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from llm_jax.checkpoint import names
from llm_jax.checkpoint.name_table import ROWS
from llm_jax.checkpoint.safetensors_files import find_file, open_file, read_json, read_tensor
from llm_jax.config import nearest
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.model import PROJECTIONS, Lora, ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG = 1 << 20
NAME = re.compile(r"[\w.]+")  # PEFT reads patterns as regular expressions; here they are names
Tree = dict[str, dict[str, np.ndarray]]  # "attention" or "mlp" -> "query_lora_a" -> array

# fields of adapter_config.json that are read, and those that do not change what a trained adapter computes
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
        "init_lora_weights")  # fmt: skip
HARMLESS = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
            "lora_dropout", "target_modules", "exclude_modules", "layers_pattern", "megatron_core", "fan_in_fan_out",
            "qalora_group_size", "runtime_config", "eva_config", "loftq_config",
            "ensure_weight_tying")  # fmt: skip
# others, such as pissa, change the weights below the adapter as well
INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class Pair(NamedTuple):
    """The two matrices of an adapter, ours or theirs."""

    a: np.ndarray
    b: np.ndarray


class Module(NamedTuple):
    """One of their modules in one layer."""

    name: str  # model.layers.0.self_attn.q_proj
    layer: int
    group: str  # attention or mlp
    targets: tuple[str, ...]  # ours: one, or query, key and value
    pattern: str  # of its weight, see `names`
    reads: bool  # the model's width goes in; else it comes out
    transposed: bool  # its weight is [in, out], as in Conv1D

    @property
    def short(self) -> str:
        """The last two parts of its name, which tell modules of a layer apart: `attn.c_proj`."""
        return ".".join(self.name.split(".")[-2:])

    def layout(self, config: ModelConfig, rank: int) -> names.Layout:
        """Of the matrix that is cut into heads."""
        return names.make_layout(self.pattern, dataclasses.replace(config, embed_dim=rank))


def modules(family: str, config: ModelConfig) -> Iterator[Module]:
    """Every module of theirs that can have an adapter, layer by layer."""
    shapes = names.parameter_shapes(config)
    for row in ROWS[family]:
        parts = [path.split("/") for path in row.paths]
        is_projection = row.name.endswith(".weight") and all(p[-1] in PROJECTIONS for p in parts)
        if not is_projection or not row.when(config) or row.paths[0] not in shapes:
            continue
        theirs, ours = (side.split() for side in row.pattern.split(" -> "))
        reads = ours[0] == "D"
        for layer in range(config.num_layers):
            yield Module(
                row.name.format(i=layer).removesuffix(".weight"), layer, parts[0][1],
                tuple(p[-1] for p in parts), row.pattern, reads, (theirs[0] == "D") == reads,
            )  # fmt: skip


def to_peft(
    adapters: Mapping[str, Any], family: str, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of adapter_model.safetensors.

    Args:
      adapters: the tree under `layers` of the model's adapters.
      family: whose names.
      config: of the model, with adapters.
    """
    lora = config.lora
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    conv = False
    for module in modules(family, config):
        group = adapters.get(module.group, {})
        pairs = {
            target: Pair(*(np.asarray(group[f"{target}_lora_{x}"][module.layer]) for x in "ab"))
            for target in module.targets
            if f"{target}_lora_a" in group
        }
        if pairs:
            ranks[module.short] = lora.rank * len(pairs)
            conv |= module.transposed
            a, b = _their_pair(module, pairs, config)
            tensors[f"{PREFIX}{module.name}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{PREFIX}{module.name}.lora_B.weight"] = np.ascontiguousarray(b)
    return _peft_config(lora, ranks, conv), tensors


def _their_pair(module: Module, pairs: Mapping[str, Pair], config: ModelConfig) -> Pair:
    """lora_A and lora_B of a module from ours of one layer; a part of it that has none gets zeros."""
    rank = config.lora.rank * len(pairs)
    layout = module.layout(config, rank)
    if not module.reads:
        (a, b) = pairs[module.targets[0]]
        wide = names.join_ours(layout, a)
        return Pair(wide.T if module.transposed else wide, b.T)
    narrow, blocks = [], []
    for target in module.targets:
        if len(module.targets) == 1:
            shape = pairs[target].b.shape[1:]
        else:
            heads = config.num_heads if target == "query" else config.num_kv_heads
            shape = (heads, config.head_dim)
        block = np.zeros((rank, *shape), np.float32)
        if target in pairs:
            at = config.lora.rank * len(narrow)
            block[at : at + config.lora.rank] = pairs[target].b
            narrow.append(pairs[target].a.T)
        blocks.append(block)
    wide = names.join_ours(layout, *blocks)
    return Pair(np.concatenate(narrow), wide.T if module.transposed else wide)


def _peft_config(lora: Lora, ranks: Mapping[str, int], conv: bool) -> dict[str, Any]:
    more = {name: rank // lora.rank for name, rank in ranks.items() if rank != lora.rank}
    grow = lambda times: times**0.5 if lora.rank_stabilised else times  # noqa: E731
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "rank_pattern": {name: lora.rank * times for name, times in more.items()},
        "alpha_pattern": {name: lora.alpha * grow(times) for name, times in more.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv,
        "inference_mode": True,
    }


def write_adapter(
    folder: Path, adapters: Mapping[str, Any], family: str, config: ModelConfig
) -> dict[str, Any]:
    """Writes both files into an existing folder; returns what adapter_config.json says. Arguments as in `to_peft`."""
    said, tensors = to_peft(adapters, family, config)
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return said


def read_adapter(folder: Path, family: str, config: ModelConfig) -> tuple[Lora, Tree]:
    """An adapter that PEFT saved, for a model without one.

    Modules of several ranks get the largest: what is missing is 0, and stays so in training. A scale other
    than that of the largest is multiplied into B.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      family: the model's.
      config: of the model below.

    Returns:
      The settings, and the tree under `layers`, float32, stacked.

    Raises:
      CheckpointError: a file is missing or unsound, or does not fit the model.
      ConfigError: the adapter does something that ours cannot; the field is named.
    """
    said = _read_config(folder)
    pairs = _read_pairs(folder, family, config)
    rank = max(a.shape[0] for a, _ in pairs.values())
    stabilised = bool(said.get("use_rslora"))
    first = next(iter(pairs))
    alpha = float(_pattern(said, "alpha_pattern", first, said["lora_alpha"]))
    scale = lambda alpha, r: alpha / (r**0.5 if stabilised else r)  # noqa: E731
    # one module's alpha, so that nothing is rounded where all have the same
    least = pairs[first][0].shape[0]
    lora = Lora(
        rank=rank,
        alpha=alpha * scale(1, least) / scale(1, rank),
        rank_stabilised=stabilised,
        targets=_targets(pairs),
    )
    tree: Tree = {}
    for module, (a, b) in pairs.items():
        r = a.shape[0]
        own = scale(float(_pattern(said, "alpha_pattern", module, said["lora_alpha"])), r)
        factor = 1.0 if math.isclose(own, lora.scale, rel_tol=1e-6) else own / lora.scale
        layout = module.layout(config, r)
        wide = b if module.reads else a
        parts = names.split_theirs(layout, wide.T if module.transposed else wide)
        for target, part in zip(module.targets, parts, strict=True):
            ours = (a.T, part * factor) if module.reads else (part, b.T * factor)
            for name, value, axis in zip(("lora_a", "lora_b"), ours, (-1, 0), strict=True):
                padded = _padded(value, rank, axis)
                stacked = tree.setdefault(module.group, {}).setdefault(
                    f"{target}_{name}", np.zeros((config.num_layers, *padded.shape), np.float32)
                )
                stacked[module.layer] = padded
    return lora, tree


def _targets(pairs: Mapping[Module, Any]) -> tuple[str, ...]:
    found = {target for module in pairs for target in module.targets}
    return tuple(target for target in PROJECTIONS if target in found)


def _padded(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return np.pad(array, widths)


def _read_config(folder: Path) -> dict[str, Any]:
    path = find_file(folder, CONFIG) if folder.is_dir() else None
    if path is None:
        raise CheckpointError(
            f"{folder}: has no {CONFIG}; give a folder that PEFT saved an adapter in"
        )
    said = read_json(path, MAX_CONFIG)
    if said.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type={said.get('peft_type')!r} must be 'LORA'")
    for name, value in said.items():
        if name not in READ and name not in HARMLESS and value:
            raise ConfigError(
                f"{path}: {name}={value!r} is not supported; merge the adapter in PEFT (merge_and_unload) "
                "and import the model"
            )
    if said.get("bias", "none") != "none":
        raise ConfigError(
            f"{path}: bias={said['bias']!r} must be 'none'; merge the adapter in PEFT"
        )
    if said.get("init_lora_weights") not in INITS:
        raise ConfigError(
            f"{path}: init_lora_weights={said['init_lora_weights']!r} changed the weights below the adapter; save "
            "it converted to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = said.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(NAME.fullmatch, patterns)):
            raise ConfigError(f"{path}: {field}={patterns!r} must map names of modules to numbers")
    alpha = said.setdefault("lora_alpha", 8)
    numbers = [alpha, *(said.get("alpha_pattern") or {}).values()]
    if not all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in numbers):
        raise ConfigError(f"{path}: lora_alpha and alpha_pattern must be numbers above 0")
    return said


def _pattern(said: Mapping[str, Any], field: str, module: Module, otherwise: Any) -> Any:
    """The value for a module, by the end of its name."""
    for name, value in (said.get(field) or {}).items():
        if module.name == name or module.name.endswith(f".{name}"):
            return value
    return otherwise


def _read_pairs(folder: Path, family: str, config: ModelConfig) -> dict[Module, Pair]:
    """lora_A and lora_B of every module, checked against the model."""
    if find_file(folder, WEIGHTS) is None:
        raise CheckpointError(f"{folder}: has no {WEIGHTS}; pickle files are never read")
    stored = open_file(folder, WEIGHTS)
    known = {module.name: module for module in modules(family, config)}
    found: dict[Module, dict[str, np.ndarray]] = {}
    for name, entry in stored.items():
        module, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if module not in known or kind not in ("A.weight", "B.weight"):
            ends = sorted({m.short for m in known.values()})
            raise CheckpointError(
                f"{folder}: {name} is no adapter of a projection of this {family} model; "
                f"{nearest(module, ends)}"
            )
        if not np.issubdtype(entry.dtype, np.floating) and entry.dtype.name != "bfloat16":
            raise CheckpointError(f"{folder}: {name} is {entry.dtype}; it must be floating")
        found.setdefault(known[module], {})[kind[0]] = read_tensor(entry).astype(np.float32)
    pairs = {module: (ab.get("A"), ab.get("B")) for module, ab in found.items()}
    checked = {module: _check_pair(folder, module, *pair, config) for module, pair in pairs.items()}
    for module in known.values():  # the adapters of a layer are stacked with those of the others
        if module not in pairs and module.short in {there.short for there in pairs}:
            raise CheckpointError(
                f"{folder}: {module.name} has no adapter, though other layers have; all layers must"
            )
    if not checked:
        raise CheckpointError(f"{folder}: {WEIGHTS} holds no adapter")
    return checked


def _check_pair(
    folder: Path, module: Module, a: np.ndarray | None, b: np.ndarray | None, config: ModelConfig
) -> Pair:
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not a.size:
        raise CheckpointError(f"{folder}: {module.name} needs lora_A and lora_B, both matrices")
    wide = module.layout(config, a.shape[0]).shape
    cut = math.prod(wide) // a.shape[0]
    size_in, size_out = (config.embed_dim, cut) if module.reads else (cut, config.embed_dim)
    if a.shape[1] != size_in or b.shape != (size_out, a.shape[0]):
        raise CheckpointError(
            f"{folder}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module.name} do not fit its "
            f"weight, [{size_out}, {size_in}]; the adapter belongs to another model"
        )
    return Pair(a, b)
