"""Training settings from TOML or JSON, laid over a dataclass's defaults: a misspelt key is an error, never ignored."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from turbojax.errors import UserError

SHIPPED = Path(__file__).parent / "configs"


def read_config(name: str | Path) -> dict[str, Any]:
    """The settings in a .toml or .json file, or in a shipped one by its bare name. Raises UserError."""
    path = Path(name)
    if not path.is_file():
        shipped = {p.stem: p for p in SHIPPED.glob("*.toml")}
        if str(name) not in shipped:
            hint = _nearest(str(name), shipped)
            raise UserError(f"--config {name}: no such file{hint}; shipped: {', '.join(sorted(shipped))}")
        path = shipped[str(name)]
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings must be a table of names and values")
    return settings


def overlay[T](default: T, settings: Mapping[str, Any], where: str = "") -> T:
    """`default`, a dataclass, with `settings` in place of some fields; tables reach into nested dataclasses.

    Where a field may be one of several dataclasses, the names in its table say which. Raises UserError naming the
    setting that is unknown or of the wrong type.
    """
    hints = typing.get_type_hints(type(default))
    fields = [f.name for f in dataclasses.fields(default)]  # pyright: ignore[reportArgumentType]
    changes = {}
    for name, value in settings.items():
        full = f"{where}{name}"
        if name not in fields:
            raise unknown_setting(full, [where + field for field in fields])
        changes[name] = _value(hints[name], getattr(default, name), value, full)
    return dataclasses.replace(default, **changes)  # pyright: ignore[reportArgumentType, reportReturnType]


def unknown_setting(name: str, known: Collection[str]) -> UserError:
    return UserError(f"unknown setting {name!r}{_nearest(name, known)}; known: {', '.join(known)}")


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON would hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def remember(path: Path, settings: Mapping[str, Any]) -> None:
    """Keep what a run was started with; the same run started again must be the same.

    Raises UserError naming the first setting that differs from what `path` holds.
    """
    if path.exists():
        before = json.loads(path.read_text())
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise UserError(
                    f"{path.parent} holds a run with {name} = {json.dumps(before.get(name))}, not "
                    f"{json.dumps(settings.get(name))}: give the same command again, or choose another --out"
                )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(partial, path)


def _value(hint: Any, default: Any, value: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, Mapping):
        classes: list[Any] = [option for option in options if dataclasses.is_dataclass(option)]
        if dataclasses.is_dataclass(default) and value.keys() <= {f.name for f in dataclasses.fields(default)}:
            return overlay(default, value, f"{name}.")
        for cls in classes:
            if _fills(cls, value):
                hints = typing.get_type_hints(cls)
                return cls(**{key: _value(hints[key], None, item, f"{name}.{key}") for key, item in value.items()})
        if len(classes) == 1 and dataclasses.is_dataclass(default):
            return overlay(default, value, f"{name}.")  # names the unknown key
        known = " or ".join("{" + ", ".join(f.name for f in dataclasses.fields(c)) + "}" for c in classes)
        raise UserError(f"{name} cannot be {dict(value)}" + (f"; a table of {known}" if known else ": not a table"))
    for option in options:
        try:
            return _scalar(option, value)
        except TypeError:
            continue
    expected = " or ".join(_spelt(option) for option in options)
    raise UserError(f"{name} must be {expected}, not {value!r}")


def _fills(cls: Any, value: Mapping[str, Any]) -> bool:
    """Whether `value` names fields of the dataclass only, and all that it must be told."""
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    return needed <= value.keys() <= {f.name for f in fields}


def _scalar(hint: Any, value: Any) -> Any:
    """`value` as `hint` wants it; TypeError if it is not of that kind."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is ...:
            return tuple(_scalar(inner[0], x) for x in value)
        if len(inner) == len(value):
            return tuple(_scalar(i, x) for i, x in zip(inner, value, strict=True))
    elif hint in (None, type(None)):
        if value is None or value == "none":
            return None
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError


def _spelt(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "'none'"
    return {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}.get(
        hint, str(hint)
    )


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
