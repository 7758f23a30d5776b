"""TOML as typed values: a table becomes the dataclass that its key is annotated with, or an error that names the key.

Strict: an unknown key names the nearest known one. Where an annotation stands for one of several dataclasses, the
table's `kind` picks it from a registry. Knows no key of any config: `config` says what there is to set.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollouts.tasks import nearest

Kinds = Mapping[Any, tuple[str, Mapping[str, type]]]  # by annotation: the default `kind`, and the dataclass of each


class ConfigError(ValueError):
    """A mistake in a config, with its remedy."""


def read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The tables of a TOML file after `key.path=value` overrides (values in TOML's syntax, or bare strings)."""
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: give the path of a TOML file, e.g. configs/quickstart.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give the path of a TOML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8: give the path of a TOML file") from None
    for override in overrides:
        put(tree, override)
    return tree


def put(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in nested tables."""
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no value: write --{path}=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {path}: {parent} is a value, not a table")
    tree[last] = value


def flat(tree: Any, where: str = "") -> dict[str, Any]:
    """The leaves of nested tables, by dotted key."""
    if not isinstance(tree, Mapping) or not tree:
        return {where: tree}
    return {key: leaf for name, each in tree.items() for key, leaf in flat(each, dotted(where, name)).items()}


def build(kind: Any, value: Any, kinds: Kinds, where: str = "") -> Any:
    """`value` as an instance of the annotated type `kind`. Raises ConfigError that names the key.

    Args:
        where: dotted key of the value; "" for a whole file.
    """
    if kind in kinds:
        default, registry = kinds[kind]
        table = dict(expect(value, Mapping, where))
        name = expect(table.pop("kind", default), str, dotted(where, "kind"))
        return build(_registered(name, registry, where), table, kinds, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, expect(value, Mapping, where), kinds, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(inner, value, kinds, where)
    if origin is typing.Literal:
        if value not in inner:
            raise ConfigError(f"{where} = {value!r} must be one of {', '.join(map(repr, inner))}")
        return value
    if origin is tuple:
        return tuple(build(inner[0], v, kinds, where) for v in expect(value, list, where))
    if origin is not None:  # Mapping[str, Any]: free keys
        return expect(value, origin, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if kind is Any else expect(value, kind, where)


def _registered(name: str, registry: Mapping[str, type], where: str) -> type:
    try:
        return registry[name]
    except KeyError:
        raise ConfigError(f"{where}.kind = {name!r} is unknown{nearest(name, registry)}") from None
    except ValueError as error:  # of a registry that looks further than its own names
        raise ConfigError(f"{where}.kind: {error}") from None


def _first_that_fits(options: Sequence[Any], value: Any, kinds: Kinds, where: str) -> Any:
    """`value` as one of several types; when it is none of them, the first one's complaint."""
    if value is None and type(None) in options:
        return None
    complaints = []
    for kind in options:
        try:
            return build(kind, value, kinds, where)
        except ConfigError as error:
            complaints.append(error)
    raise complaints[0]


def _dataclass(kind: type, table: Mapping[str, Any], kinds: Kinds, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    for key in table:
        if key not in names:
            raise ConfigError(f"{dotted(where, key)} is not a key of {kind.__name__}{nearest(key, names)}")
    values = {key: build(hints[key], value, kinds, dotted(where, key)) for key, value in table.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.init and f.name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{dotted(where, missing[0])} is missing: {kind.__name__} needs it")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where or 'config'}: {error}") from None


def expect(value: Any, kind: Any, where: str) -> Any:
    """`value` if it is of that type, and finite if it is a number; else ConfigError."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} = {value!r} is {_named(type(value))}, it must be {_named(kind)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value!r}: give a finite number")
    return value


def _named(kind: Any) -> str:
    name = "table" if kind in (Mapping, dict) else kind.__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
