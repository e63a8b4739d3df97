"""A Hugging Face model folder as our parameters: checked whole before a tensor is read, then streamed.

1. `open_source` reads config.json and the headers: every tensor is accounted for, or refused by name.
2. `read_params` goes through the files once, in the order of their bytes; a tensor is in host memory only
   until its parts lie on their shards. Beside the parameters, memory holds the largest tensor.
3. `differences` compares parameters with the files again, bit for bit.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.checkpoint import names
from llm_jax.checkpoint.fingerprint import named_leaves
from llm_jax.checkpoint.name_table import HEADS
from llm_jax.checkpoint.record import RECORD
from llm_jax.checkpoint.run_folder import CHECKPOINTS
from llm_jax.checkpoint.safetensors_files import (
    Stored,
    find_file,
    open_folder,
    read_json,
    read_tensor,
)
from llm_jax.checkpoint.shard_pieces import (
    PIECE_BYTES,
    Filled,
    HostFilled,
    filled,
    is_on_host,
    same,
)
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.model import ModelConfig, Params, abstract_params, families

MAX_CONFIG = 16 << 20
MAX_PARAMS = 1 << 43  # 8.8e12; a config beyond is nonsense, and shapes of it would overflow
FLOATS = ("float16", "bfloat16", "float32")
PARAM_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A folder that can be imported: each tensor has its place, and the files are sound."""

    folder: Path
    family: str
    hf_config: Mapping[str, Any]
    config: ModelConfig
    tensors: tuple[tuple[names.Tensor, Stored], ...]  # in the order of the files' bytes
    listed: tuple[str, ...]  # tensors that are there and not used

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the tensors used."""
        return tuple(sorted({str(stored.dtype) for _, stored in self.tensors}))

    @property
    def rounded(self) -> bool:
        """Whether the parameters cannot hold every stored value exactly."""
        return self.config.param_dtype == "bfloat16" and self.dtypes != ("bfloat16",)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(stored.nbytes for _, stored in self.tensors)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted({stored.file for _, stored in self.tensors})


def open_source(folder: str | os.PathLike[str], param_dtype: str = "") -> Source:
    """Checks a folder without reading a tensor, but for a head that should be the embedding.

    Args:
      folder: with config.json and safetensors.
      param_dtype: of the parameters; empty: as stored where that is exact, so bfloat16 if every tensor is
        and float32 otherwise (float16 has bits that bfloat16 lacks).

    Raises:
      CheckpointError: files are missing, unsound, or hold other tensors than config.json asks for.
      ConfigError: the model is not one that the decoder covers.
    """
    folder = Path(folder)
    hf_config = _read_config(folder)
    try:
        family, config = families.read(hf_config)
    except ConfigError as error:
        remedy = "" if ";" in str(error) else "; get the config.json that belongs to the model"
        raise ConfigError(f"{folder}: {error}{remedy}") from None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{folder}/config.json: a field has no sensible value: {error}; get the one that belongs to "
            "the model"
        ) from None
    check_sizes(config, folder)
    stored = open_folder(folder)
    tensors, listed = _match(folder, family, config, stored)
    _check_heads(folder, tensors, {name: stored[name] for name in listed if name in HEADS})
    kinds = {str(found.dtype) for _, found in tensors}
    exact = "bfloat16" if kinds == {"bfloat16"} else "float32"
    if param_dtype and param_dtype not in PARAM_DTYPES:
        raise ConfigError(f"param_dtype={param_dtype!r} must be one of {', '.join(PARAM_DTYPES)}")
    chosen: Any = param_dtype or exact
    config = dataclasses.replace(config, param_dtype=chosen, dtype=chosen)
    return Source(
        folder=folder,
        family=family,
        hf_config=hf_config,
        config=config,
        tensors=tensors,
        listed=listed,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {kind}; give a Hugging Face model folder")
    if any((folder / name).exists() for name in (RECORD, CHECKPOINTS)):
        raise CheckpointError(
            f"{folder}: is a model or a run of llm-jax already; use it as it is, as in llm-jax generate {folder}"
        )
    path = find_file(folder, "config.json")
    if path is None:
        raise CheckpointError(
            f"{folder}: has no config.json; give the folder of a Hugging Face model"
        )
    return read_json(path, MAX_CONFIG)


def check_sizes(config: ModelConfig, folder: Path) -> None:
    """Refuses sizes that no file could hold before anything of that size is made."""
    widest = config.embed_dim * max(
        config.vocab_size,
        config.mlp_dim,
        config.num_heads * config.head_dim,
        config.max_seq_len if config.position == "learned" else 1,
    )
    if widest * config.num_layers > MAX_PARAMS:
        raise ConfigError(
            f"{folder}/config.json: layers={config.num_layers}, width={config.embed_dim}, "
            f"vocab_size={config.vocab_size} make more than {MAX_PARAMS:.1e} parameters; that is no model"
        )


def _match(
    folder: Path, family: str, config: ModelConfig, stored: Mapping[str, Stored]
) -> tuple[tuple[tuple[names.Tensor, Stored], ...], tuple[str, ...]]:
    """Every tensor the model needs with its place in the files, and what is there besides."""
    wanted = {tensor.name: tensor for tensor in names.tensors(family, config)}
    found = {name: name for name in stored}
    prefix = names.base_prefix(family)
    if not any(name.startswith(prefix) for name in stored):  # a save of the model without its head
        found = {name if name in wanted else prefix + name: name for name in stored}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: {_some(missing)} of a {family} model as config.json describes it is missing from "
            "the safetensors files; get the whole model, or the config.json that belongs to it"
        )
    patterns = [re.compile(pattern) for pattern in names.ignored(family)]
    besides = [name for name in found if name not in wanted]
    extra = sorted(n for n in besides if not any(p.fullmatch(n) for p in patterns))
    if extra:
        raise CheckpointError(
            f"{folder}: {_some(extra)} is in the safetensors files, but not part of a {family} model as "
            "config.json describes it; nothing is dropped silently: fix the config, or remove the tensor"
        )
    for name, tensor in wanted.items():
        there = stored[found[name]]
        if there.shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(there.shape)}, config.json asks for "
                f"{list(tensor.shape)}; the config belongs to another model"
            )
        if str(there.dtype) not in FLOATS:
            raise CheckpointError(
                f"{folder}: {name} is {there.dtype}; weights must be {', '.join(FLOATS)}: convert the "
                "model (dequantise it) first"
            )
    order = {name: at for at, name in enumerate(stored)}
    used = sorted(wanted, key=lambda name: order[found[name]])
    return tuple((wanted[name], stored[found[name]]) for name in used), tuple(sorted(besides))


def _check_heads(
    folder: Path, tensors: tuple[tuple[names.Tensor, Stored], ...], heads: Mapping[str, Stored]
) -> None:
    """A head that is not used must be the bits of the matrix that is: dropping another is another model."""
    used = {tensor.slots[0].path: (tensor.name, stored) for tensor, stored in tensors}
    for name, stored in heads.items():
        instead, there = used["head" if "head" in used else "embedding"]
        if _same_bytes(stored, there):
            continue
        remedy = "remove the one that is not the head"
        if "head" not in used:
            remedy = (
                "config.json asks for one matrix as both (tie_word_embeddings): set tie_word_embeddings to "
                "false to keep the head, or remove the tensor"
            )
        raise CheckpointError(f"{folder}: {name} differs from {instead}; {remedy}")


def _same_bytes(first: Stored, second: Stored) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for at in range(0, first.nbytes, PIECE_BYTES):
        size = min(PIECE_BYTES, first.nbytes - at)
        one, other = (
            read_tensor(
                Stored(file=s.file, start=s.start + at, dtype=np.dtype(np.uint8), shape=(size,))
            )
            for s in (first, second)
        )
        if not np.array_equal(one, other):
            return False
    return True


def not_finite(source: Source) -> list[str]:
    """Names of tensors with a NaN or an infinite value; reads the files."""
    return [
        tensor.name
        for (tensor, _), value in _read_ahead(source, reuse=True)
        if not np.isfinite(value).all()
    ]


def _some(found: list[str]) -> str:
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def read_params(source: Source, shardings: Any = None) -> Params:
    """The parameters, each tensor read once and put straight on its shards.

    Args:
      source: from `open_source`.
      shardings: tree of `jax.sharding.Sharding` like the parameters; None: the default device.
    """
    abstract = abstract_params(source.config)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = {} if shardings is None else named_leaves(shardings)
    leaves = named_leaves(abstract)
    filling: dict[str, Filled | HostFilled] = {}
    left: dict[str, int] = dict.fromkeys(leaves, 0)
    for tensor, _ in source.tensors:
        for slot in tensor.slots:
            left[slot.path] += 1
    done: dict[str, jax.Array] = {}
    waiting = 0
    on_host = all(map(is_on_host, places.values() or [one]))
    for (tensor, stored), value in _read_ahead(source, reuse=on_host):
        parts = tensor.split(value)
        del value
        waiting += stored.nbytes
        for slot, part in zip(tensor.slots, parts, strict=True):
            path = slot.path
            if path not in filling:
                filling[path] = filled(leaves[path], places.get(path, one))
            filling[path].put(lead(slot), part)
        # dispatch is asynchronous: without waiting, many tensors would be in memory at once
        if waiting > PIECE_BYTES:
            for slot in tensor.slots:
                filling[slot.path].wait()
            waiting = 0
        del parts
        for slot in tensor.slots:
            left[slot.path] -= 1
            if not left[slot.path]:
                done[slot.path] = filling.pop(slot.path).array()
    jax.block_until_ready(list(done.values()))
    return jax.tree.unflatten(jax.tree.structure(abstract), [done[path] for path in leaves])


def _read_ahead(
    source: Source, *, reuse: bool
) -> Iterator[tuple[tuple[names.Tensor, Stored], np.ndarray]]:
    """Every tensor with its values; the next small one is read while this one is used.

    `reuse`: a value lasts until the next is asked for, and small ones share two pieces of memory. Getting new
    memory from the system took as long as reading.
    """
    small = [s.nbytes for _, s in source.tensors if s.nbytes <= PIECE_BYTES]
    places = [np.empty(max(small), np.uint8) for _ in range(2)] if reuse and small else [None, None]

    def read(at: int) -> np.ndarray:
        stored = source.tensors[at][1]
        return read_tensor(stored, places[at % 2] if stored.nbytes <= PIECE_BYTES else None)

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for at, pair in enumerate(source.tensors):
            value = ahead.result() if ahead else read(at)
            following = source.tensors[at + 1 : at + 2]
            begin = following and following[0][1].nbytes <= PIECE_BYTES
            ahead = pool.submit(read, at + 1) if begin else None
            yield pair, value
            del value


def differences(source: Source, params: Params, *, to_file: bool = False) -> Iterator[str]:
    """Names of tensors whose bits are not those of the parameters; reads the files again.

    Values are compared in the dtype of the parameters; with `to_file`, in that of each tensor, which is
    right for files that were written from the parameters. Parameters may have more rows than the files.
    """
    leaves = named_leaves(params)
    for (tensor, stored), value in _read_ahead(source, reuse=True):
        dtype = stored.dtype if to_file else np.dtype(source.config.param_dtype)
        parts = tensor.split(value)
        if not all(
            same(leaves[slot.path], lead(slot), part, dtype)
            for slot, part in zip(tensor.slots, parts, strict=True)
        ):
            yield tensor.name


def lead(slot: names.Slot) -> tuple[int, ...]:
    """The leading indices of a slot in its parameter."""
    return tuple(at for at in (slot.layer, slot.head) if at is not None)


def digests(files: list[Path]) -> dict[str, str]:
    """sha256 of each file by name, on as many threads as there are files, up to four."""

    def one(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((path.name for path in files), pool.map(one, files), strict=True))
