"""Every tensor of a Hugging Face checkpoint and where it lives among our parameters: a table.

A row is the tensor's name, our names, and a pattern: its axes -> ours. `(K [G,1,1] H) D -> D h H` says
that the first axis is K groups of G + 1 + 1 rows of H, that the members of a group go to three
parameters of ours (queries, key, value), each as [D, heads, H], where `h` counts K times the members.
So a layout fused per head, by group or packed is a pattern, not code.

Letters: V D N K H F P as in `llm_jax.model`, P positions, G = N / K. A row is there when our
parameters are, and when its condition holds.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from llm_jax.checkpoint.name_table import IGNORED, PREFIX, ROWS, Row
from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig, abstract_params

Shape = tuple[int, ...]


class Slot(NamedTuple):
    """A place among our parameters."""

    path: str  # "layers/attention/query"
    layer: int | None  # index on the first axis, of stacked layers; None: the parameter has no such
    head: int | None = None  # index on the axis after it: one head of many (StableLM's norms)


class Tensor(NamedTuple):
    """A tensor of theirs and the parameters of ours that it holds."""

    name: str
    shape: Shape
    slots: tuple[Slot, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # one array per slot, views of it
    join: Callable[..., np.ndarray]  # its inverse: one array per slot in, bit for bit theirs out


class Layout(NamedTuple):
    """A pattern with its sizes filled in."""

    shape: Shape  # theirs
    axes: Shape  # theirs with every group of axes taken apart
    cut: int | None  # the axis that is cut, of those
    members: tuple[int, ...]  # how many entries of it each part has
    order: tuple[int, ...]  # our axes as indices into the part's, after heads were counted together


def tensors(family: str, config: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor that a transformers save of this model holds, each once.

    Raises:
      ConfigError: the family is unknown, or a parameter of ours has no name in it.
    """
    if family not in ROWS:
        raise ConfigError(f"family={family!r} has no table of names; known: {', '.join(ROWS)}")
    shapes = parameter_shapes(config)
    found: list[Tensor] = []
    used: set[str] = set()
    for row in ROWS[family]:
        if not all(path in shapes for path in row.paths) or not row.when(config):
            continue
        found += _expand(row, config)
        used.update(row.paths)
    missing = sorted(shapes.keys() - used)
    if missing:
        raise ConfigError(
            f"a {family} model has no parameter {missing[0]!r}; it cannot hold this one"
        )
    return tuple(found)


def ignored(family: str) -> tuple[str, ...]:
    """Patterns of names that older saves hold besides: buffers, and the head where it is tied.

    `tensors` comes first: a name it lists is never ignored.
    """
    return (*IGNORED[""], *IGNORED.get(family, ()))


def base_prefix(family: str) -> str:
    """What saves of the model without its head leave out in front of every name (the hub's gpt2)."""
    return PREFIX.get(family, "model.")


@functools.lru_cache(maxsize=32)
def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our parameters: path -> shape, stacked layers and all."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}


def _expand(row: Row, config: ModelConfig) -> list[Tensor]:
    """The row once for every layer, or head of every layer."""
    layout = make_layout(row.pattern, config)
    split = functools.partial(split_theirs, layout)
    join = functools.partial(join_ours, layout)
    stacked = row.paths[0].startswith("layers/")
    heads = range(parameter_shapes(config)[row.paths[0]][1]) if "{h}" in row.name else (None,)
    return [
        Tensor(
            row.name.format(i=layer, h=head),
            layout.shape,
            tuple(Slot(path, layer, head) for path in row.paths),
            split,
            join,
        )
        for layer in (range(config.num_layers) if stacked else (None,))
        for head in heads
    ]


def make_layout(pattern: str, config: ModelConfig) -> Layout:
    """Reads a pattern; see the head of this file."""
    N, K = config.num_heads, config.num_kv_heads
    sizes = {
        "V": config.vocab_size, "D": config.embed_dim, "N": N, "K": K, "G": N // K,
        "H": config.head_dim, "F": config.mlp_dim, "P": config.max_seq_len, "1": 1,
    }  # fmt: skip
    theirs, ours = pattern.split(" -> ")
    names: list[str] = []
    axes: list[int] = []
    shape: list[int] = []
    members: tuple[int, ...] = ()
    for group in _groups(theirs):
        start = len(axes)
        for word in group:
            if word.startswith("["):
                members = tuple(sizes[letter] for letter in word[1:-1].split(","))
                axes.append(sum(members))
            else:
                axes.append(sizes[word])
            names.append(word)
        shape.append(math.prod(axes[start:]))
    cut = next((at for at, word in enumerate(names) if word.startswith("[")), None)
    if cut is not None:  # groups and members count heads together
        names[cut] = "h"
        if cut and names[cut - 1] in "NK":
            del names[cut - 1]
    order = tuple(names.index(word) for word in ours.split())
    return Layout(tuple(shape), tuple(axes), cut, members, order)


def _groups(pattern: str) -> list[list[str]]:
    """`(K [G,1,1] H) D` -> [[K, [G,1,1], H], [D]]."""
    groups: list[list[str]] = []
    inside = False
    for word in pattern.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _counted(layout: Layout) -> bool:
    """Whether an axis of groups stands before the one that is cut."""
    return len(layout.order) < len(layout.axes)


def split_theirs(layout: Layout, array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Their array as ours, one for each member; views of it."""
    array = array.reshape(layout.axes)
    if layout.cut is None:
        return (array.transpose(layout.order),)
    parts, start = [], 0
    for size in layout.members:
        at = (slice(None),) * layout.cut + (slice(start, start + size),)
        part, start = array[at], start + size
        if _counted(layout):
            before, after = part.shape[: layout.cut - 1], part.shape[layout.cut + 1 :]
            part = part.reshape(*before, -1, *after)
        parts.append(part.transpose(layout.order))
    return tuple(parts)


def join_ours(layout: Layout, *parts: np.ndarray) -> np.ndarray:
    """The inverse of `split_theirs`."""
    back = np.argsort(layout.order)
    if layout.cut is None:
        return np.ascontiguousarray(parts[0].transpose(back)).reshape(layout.shape)
    whole = []
    for part, size in zip(parts, layout.members, strict=True):
        part = part.transpose(back)
        axes = (*layout.axes[: layout.cut], size, *layout.axes[layout.cut + 1 :])
        whole.append(part.reshape(axes))
    return np.concatenate(whole, axis=layout.cut).reshape(layout.shape)
