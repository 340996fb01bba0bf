"""Settings: frozen pydantic models that are read from TOML and typed as command-line options."""

import argparse
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from regiongpt.errors import ConfigError, short

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

T = TypeVar("T", bound="Settings")


class _OwnErrors(ModelMetaclass):
    """ConfigError for whoever builds settings; pydantic's own inside of others, for the place in front."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise ConfigError(explain(typing.cast(type[BaseModel], cls), error)) from None


class Settings(BaseModel, metaclass=_OwnErrors):
    """Base of every settings class: immutable, unknown keys are errors, numbers are finite, paths are not empty.

    A docstring below a field is its help on the command line. A validator raises ValueError; whoever builds or loads
    settings gets ConfigError, with the place in front.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
        """Read a TOML file, with those that its ``extends`` names, and apply overrides such as ``--stage2.lr 5e-4``.

        ConfigError where the file is no TOML, a key is unknown (names the nearest one), or a value cannot be used.
        """
        return cls(**override(read_toml(Path(path)) if path else {}, overrides))

    def replace(self: T, **values: Any) -> T:
        """A copy with other values, validated like any."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Split the lists of the command line at commas, and reject what pydantic would take in silence."""
        hint = cls.model_fields[str(info.field_name)].annotation
        kinds, inner = plain_types(hint), set().union(*map(plain_types, typing.get_args(hint)))
        if isinstance(value, str) and tuple in kinds and str not in kinds:
            return [part.strip() for part in value.split(",") if part.strip()]
        several = value if isinstance(value, list | tuple) else [value]
        if Path in kinds | inner and not all(str(each).strip() and "\0" not in str(each) for each in several):
            raise ValueError("give a path")
        if isinstance(value, bool) and bool not in kinds and {int, float} & kinds:
            raise ValueError("give a number")
        return value


def read_toml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a TOML file, merged over those of the files that it ``extends``; ConfigError where it is none."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself; leave out one of the files")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from None
    bases = values.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: give a list of files, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, read_toml(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, values)


def override(values: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The values with those of command-line words such as ``--stage2.lr 5e-4`` in their places."""
    merged, rest = _merge({}, values), list(words)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise ConfigError(f"{name}: not an override; write --name.of.field value, such as --stage2.lr 5e-4")
        if not (equals or rest):
            raise ConfigError(f"{name}: give a value after it")
        *tables, leaf = name[2:].split(".")
        inner = merged
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{name}: '{table}' is a value, not a table")
        inner[leaf] = text if equals else rest.pop(0)
    return merged


def nearest(name: str, known: Iterable[str], where: str = "") -> str:
    """What to suggest for a misspelt name: the nearest known one, with ``where`` before it, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{where}{near[0]}'?" if near else f"known: {', '.join(names)}"


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first mistake in one line: where, what is wrong, what to do."""
    found = error.errors(include_url=False)
    # A misspelt name is unknown, and then the right one may be missing.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    where, given = ".".join(map(str, first["loc"])), first["input"]
    if first["type"] == "extra_forbidden":
        *tables, leaf = first["loc"]
        inner: Any = kind
        for table in tables:  # a number is a place in a list of tables
            fields = getattr(inner, "model_fields", {})
            hint = inner if isinstance(table, int) else getattr(fields.get(table), "annotation", None)
            inner = typing.get_args(hint)[0] if isinstance(table, int) else hint
        known = getattr(inner, "model_fields", {})
        return f"unknown setting '{where}'; {nearest(str(leaf), known, ''.join(f'{table}.' for table in tables))}"
    if first["type"] == "missing":
        return f"{where}: give a value"
    if first["type"] == "value_error" and not isinstance(given, str | int | float):  # about several fields
        return f"{where}: {first['ctx']['error']}".removeprefix(": ")
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {short(given)}".removeprefix(": ")


def add_options(
    parser: argparse.ArgumentParser, kind: type[Settings], title: str = "options", required: bool = True
) -> None:
    """Add one option per field: ``image_grid`` becomes ``--image-grid``, its docstring the help.

    The values stay text, or absent where not typed: :func:`read_options` validates them. With ``required``, fields
    without a default have to be typed.
    """
    group: Any = parser if title == "options" else parser.add_argument_group(title)
    for name, field in kind.model_fields.items():
        kinds = plain_types(field.annotation)
        text = " ".join((field.description or "").split()).replace("%", "%%").replace("``", "")
        if field.default_factory is None and not field.is_required() and field.default not in (None, "", (), False):
            text += f" (default: {field.default})"
        given: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if bool in kinds:  # what is off by default needs no --no-...
            given["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        else:
            inner = plain_types(typing.get_args(field.annotation)[0]) if kinds == {tuple} else kinds
            folder = name in ("data", "images", "model", "baseline", "out")
            names = {int: "N", float: "X", Path: "DIR" if folder else "FILE"}
            named = next((metavar for each, metavar in names.items() if each in inner), "TEXT")
            choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
            given["metavar"] = "|".join(map(str, choices)) or named
            if tuple in kinds:
                given["nargs"] = "+"
        group.add_argument(f"--{name.replace('_', '-')}", required=required and field.is_required(), **given)


def read_options(kind: type[T], options: argparse.Namespace) -> T:
    """The settings that were typed; a ConfigError names the option whose value cannot be used."""
    given = {name: getattr(options, name) for name in kind.model_fields if hasattr(options, name)}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        name, colon, rest = explain(kind, error).partition(":")
        is_option = bool(colon) and name.split(".")[0] in kind.model_fields
        raise ConfigError(f"--{name.replace('_', '-')}:{rest}" if is_option else f"{name}{colon}{rest}") from None


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def plain_types(hint: Any) -> set[Any]:
    """The plain types in an annotation: ``{Path, NoneType}`` of ``Path | None``, ``{tuple}`` of any tuple."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(plain_types, inner))
    if origin is typing.Annotated:
        return plain_types(inner[0])
    return set(map(type, inner)) if origin is typing.Literal else {origin or hint}
