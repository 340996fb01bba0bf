"""Frozen dataclasses from TOML, with dotted overrides: every key and type is checked before anything is computed."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from regiongpt.errors import ConfigError

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable TOML file, got: {error}") from error


def override(values: dict[str, Any], words: Sequence[str]) -> None:
    """Puts values from the command line in the places of those from the file.

    Args:
        values: Tables, changed in place.
        words: ``--stage2.lr 5e-4`` or ``--stage2.lr=5e-4``, by dotted field name.

    Raises:
        ConfigError: A word is no such pair, or goes through a value as if it were a table.
    """
    for name, text in _pairs(words):
        target = values
        *parents, leaf = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--{name}: '{parent}' is a value, not a table")
        target[leaf] = _Text(text)


def dotted(values: Mapping[str, Any], where: str = "") -> list[str]:
    """Dotted names of all values, in order: ``["seed", "stage2.lr"]``."""
    names: list[str] = []
    for key, value in values.items():
        names += dotted(value, f"{where}{key}.") if isinstance(value, Mapping) else [f"{where}{key}"]
    return names


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds one dataclass from plain values, checking every key and type.

    Args:
        kind: Its fields are of the types ``str``, ``int``, ``float``, ``bool``, another such dataclass, a tuple of one
            of these, or a dictionary of strings to one.
        values: Of its fields.
        where: What stands before a key in a message.

    Raises:
        ConfigError: A key is unknown (the message names the nearest one) or missing; a value is of another type or
            out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ConfigError(f"unknown configuration key '{name}'; {nearest(key, fields, where)}")
        made[key] = _convert(hints[key], value, name)
    for name, each in fields.items():
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise ConfigError(f"{where}{name}: expected a value, got none")
    return kind(**made)


def nearest(key: str, known: Iterable[str], where: str = "") -> str:
    """What to say to someone who wrote a name that there is not: the nearest one, or all where none is near.

    Args:
        key: What was written.
        known: The names there are.
        where: What stands before a name in the message.
    """
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean '{where}{near[0]}'?" if near else f"known keys: {', '.join(names)}"


class _Text(str):
    """A value from the command line: text whose type the field decides."""


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"expected an override such as '--stage2.lr 5e-4', got '{word}'")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name}: expected a value after it, got nothing")
            value = rest.pop(0)
        pairs.append((name, value))
    return pairs


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected a table, got {value!r}")
        return build(typing.cast(type[Any], hint), value, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        from_text = isinstance(value, _Text)
        items = [_Text(v) for v in value.split(",") if v] if from_text else value
        if not isinstance(items, list):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{name}[{number}]") for number, item in enumerate(items, 1))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected a table, got {value!r}")
        return {k: _convert(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, _Text):
        return _parse(hint, value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}")
    return value


def _parse(hint: Any, text: str, name: str) -> Any:
    if hint is str:
        return str(text)
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{name}: expected true or false, got '{text}'")
    try:
        return hint(text)
    except ValueError:
        raise ConfigError(f"{name}: expected {hint.__name__}, got '{text}'") from None
