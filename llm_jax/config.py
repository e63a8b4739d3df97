"""Typed dataclasses <-> JSON, and overrides from the command line. Defines no setting itself.

Settings live in frozen keyword-only dataclasses beside the code that reads them. A config *file* is
either a Python file with a function `config()` that returns one, or the `config.json` a run saved.

Why not a library: tyro needs typeguard>=4 (which breaks tokamax), and none of the ready ones gives
one-line errors with the nearest name for files and command line alike (DESIGN.md, ecosystem anchor).
"""

import dataclasses
import difflib
import json
import math
import os
import runpy
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from llm_jax.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Sequence[str]) -> str:
    """A remedy for a mistyped name: the closest known one, or all of them when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f", ... ({len(known)} in all)" if len(known) > 20 else ""
    return f"known: {', '.join(sorted(known)[:20])}{more}"


def to_dict(config: Any) -> Any:
    """Dataclasses to plain JSON values, recursively; tuples become lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Builds the dataclass `cls` from JSON values.

    Raises:
      ConfigError: unknown key, wrong type or forbidden value, named by its dotted path. Missing
        keys take the field's default, so old files keep loading when a setting is added.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path or cls.__name__}={data!r} must be an object with fields of {cls.__name__}"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown setting {_join(path, key)!r}; {nearest(key, list(fields))}")
    values = {key: _value(hints[key], value, _join(path, key)) for key, value in data.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"{_join(path, name)} is missing; it has no default")
    return cls(**values)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _value(hint: Any, value: Any, path: str) -> Any:
    """Checks one JSON value against its type hint and returns the Python value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is Literal:
        if value not in args:
            remedy = nearest(value, [str(a) for a in args]) if isinstance(value, str) else ""
            raise ConfigError(
                f"{path}={value!r} must be one of {', '.join(map(repr, args))}; {remedy}".rstrip(
                    "; "
                )
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r} must be a list")
        return tuple(_value(args[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{path}: union types are not supported in configs; use a Literal switch")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            f"{path}={value!r} must be of type {hint.__name__}, not {type(value).__name__}"
        )
    if hint is float and not math.isfinite(value):  # it would pass every check of a range
        raise ConfigError(f"{path}={value!r} must be a finite number")
    return value


def override(config: T, arguments: Sequence[str]) -> T:
    """Applies `--model.num-layers 8` or `--model.num-layers=8` style overrides, left to right.

    Example: `override(cfg, ["--train.steps", "10", "--data.sources.0.weight=0.5"])`.
    """
    data = to_dict(config)
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"unexpected argument {word!r}; overrides look like --model.num-layers 8"
            )
        name, equals, text = word[2:].partition("=")
        keys = name.replace("-", "_").split(".")
        if keys[0] not in data:
            raise ConfigError(
                f"unknown setting --{name}: no {keys[0]!r}; {nearest(keys[0], list(data))}"
            )
        if not equals:
            if not words:
                raise ConfigError(f"--{name} needs a value, as in --{name} VALUE")
            text = words.pop(0)
        _set(data, type(config), keys, text, name)
    return from_dict(type(config), data)


def _set(data: Any, hint: Any, keys: list[str], text: str, name: str) -> None:
    """Puts the value written as `text` at `keys` inside the nested JSON `data` of type `hint`."""
    key: Any = keys[0]
    rest = keys[1:]
    if isinstance(data, list):
        if not key.isdigit() or int(key) >= len(data):
            raise ConfigError(f"--{name}: {key!r} must be an index below {len(data)}")
        key, child = int(key), typing.get_args(hint)[0]
    else:
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if key not in hints:
            raise ConfigError(f"unknown setting --{name}: no {key!r}; {nearest(key, list(hints))}")
        child = hints[key]
    if rest and not (dataclasses.is_dataclass(child) or typing.get_origin(child) is tuple):
        raise ConfigError(f"unknown setting --{name}: {key!r} has no fields")
    if rest:
        _set(data[key], child, rest, text, name)
    else:
        data[key] = _parse(child, text, name)


def _parse(hint: Any, text: str, name: str) -> Any:
    """Reads a command-line word as the type the field has."""
    if hint is str or (typing.get_origin(hint) is Literal and text in typing.get_args(hint)):
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            number = float(text.replace("_", ""))
        except ValueError:
            raise ConfigError(
                f"--{name}={text!r} must be a number of type {hint.__name__}"
            ) from None
        if not math.isfinite(number):
            raise ConfigError(f"--{name}={text!r} must be a finite number")
        if hint is int and number != int(number):
            raise ConfigError(f"--{name}={text!r} must be a whole number")
        return (
            int(text.replace("_", "")) if hint is int and "e" not in text.lower() else hint(number)
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted name -> (old, new) of every setting that differs between two `to_dict` results."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key), new.get(key), _join(path, key))
    elif old != new:
        yield path, (old, new)


def dumps(config: Any) -> str:
    """The config as JSON text with its class name under `config`, as saved in `config.json`."""
    return (
        json.dumps(
            {"config": type(config).__name__, **to_dict(config)}, indent=2, ensure_ascii=False
        )
        + "\n"
    )


def loads(text: str, cls: type[T] | tuple[type[T], ...], where: str = "config.json") -> T:
    """The inverse of `dumps`. Raises ConfigError naming `where` on broken JSON or another class."""
    classes = cls if isinstance(cls, tuple) else (cls,)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not a config: JSON nested too deep") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must hold a JSON object")
    kind = data.pop("config", classes[0].__name__)
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: is not a saved config: config={str(kind)[:20]}... is no name")
    for one in classes:
        if kind == one.__name__:
            return from_dict(one, data)
    raise ConfigError(f"{where}: holds a {kind}, but this command needs {_some(classes)}")


def _some(classes: Sequence[type]) -> str:
    return " or ".join(f"a {one.__name__}" for one in classes)


def load(
    path: str | os.PathLike[str],
    cls: type[T] | tuple[type[T], ...],
    overrides: Sequence[str] = (),
) -> T:
    """Reads a config file (`.py` with `config()`, or a saved `.json`) of a class, or one of several.

    Then applies overrides.
    """
    classes = cls if isinstance(cls, tuple) else (cls,)
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path!r} does not exist; see configs/ for the ready ones")
    if path.endswith(".json"):
        return override(loads(_read(path), classes, path), overrides)
    if not path.endswith(".py"):
        raise ConfigError(f"config file {path!r} must end in .py or .json")
    try:
        namespace = runpy.run_path(path)
        if "config" not in namespace:
            raise ConfigError(
                f"{path}: must define a function config() that returns {_some(classes)}"
            )
        config = namespace["config"]()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        told = " ".join(str(error).split())
        raise ConfigError(f"{where}: {type(error).__name__}: {told}") from error
    if not isinstance(config, classes):
        raise ConfigError(
            f"{path}: config() returned a {type(config).__name__}, but this command needs {_some(classes)}"
        )
    return override(config, overrides)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"config file {path!r} cannot be read: {error.strerror}") from None
