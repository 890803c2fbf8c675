"""Target files: TOML text to a `Target`, every field validated, with inheritance from another target."""

from __future__ import annotations

import dataclasses
import enum
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from qir.errors import ContractError, QirError, TargetError
from qir.target import Target

#: The key that names the target whose fields a file starts from.
INHERITS: Final = "inherits"
#: The word that takes an inherited field away which need not be there, or a row of a table of numbers.
ABSENT: Final = "none"

Parents = Callable[[str, Path], Path]


def read_target(path: str | Path, parents: Parents) -> Target:
    """The target that a TOML file describes; `parents(name, path)` finds the file of a target that it inherits from.

    Raises TargetError with file and line, the reason and the mend.
    """
    path = Path(path)
    text = _text(path)
    return _Loader(text, str(path)).target(_merged(text, path, parents, ()))


def parse_target(text: str, source: str = "<text>") -> Target:
    """The target that TOML text describes, which inherits nothing; see `read_target`."""
    return _Loader(text, source).target(_table(text, source))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise TargetError(f"cannot read target {path}: {reason}") from fault


def _table(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise TargetError(f"{source}: not TOML: {fault}") from fault


def _merged(text: str, path: Path, parents: Parents, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The fields of a file over those of the targets that it inherits from."""
    own = _table(text, str(path))
    parent = own.pop(INHERITS, None)
    if parent is None:
        return own
    loader = _Loader(text, str(path))
    if not isinstance(parent, str):
        loader.fail((INHERITS,), "expected the name of a target, or the path of a .toml file")
    for name in ("name", "description"):
        if name not in own:
            loader.fail((INHERITS,), f"a target that inherits needs a {name} of its own")
    try:
        file = parents(parent, path)
        inherited = _text(file)
    except TargetError as fault:
        loader.fail((INHERITS,), str(fault))
    if file.resolve() in (path.resolve(), *seen):
        loader.fail((INHERITS,), f"{parent!r} inherits from this target in turn")
    base = _merged(inherited, file, parents, (*seen, path.resolve()))
    _Loader(inherited, str(file)).target(base)  # a fault of the parent is reported where it stands
    return _over(base, own)


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key; everything else is replaced."""
    merged = dict(base)
    for key, value in own.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


_BARE = r"""[\w-]+|"[^"]*"|'[^']*'"""
_HEADER: Final = re.compile(rf"\s*\[\[?\s*((?:{_BARE})(?:\s*\.\s*(?:{_BARE}))*)\s*\]")
_KEY: Final = re.compile(rf"\s*((?:{_BARE})(?:\s*\.\s*(?:{_BARE}))*)\s*=")


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_BARE, dotted))


class _Loader:
    """Builds dataclasses from tables; faults name the line of the file."""

    def __init__(self, text: str, source: str) -> None:
        self.lines = text.splitlines()
        self.source = source

    def target(self, data: Mapping[str, Any]) -> Target:
        target = self.build(Target, data, ())
        assert isinstance(target, Target)
        return target

    def fail(self, path: tuple[str, ...], message: str) -> typing.NoReturn:
        raise TargetError(f"{self.source}:{self.line(path)}: {'.'.join(path) or 'target'}: {message}")

    def line(self, path: tuple[str, ...]) -> int:
        """The line of a key, or of the nearest table around it; else of what is inherited, or 1."""
        section: tuple[str, ...] = ()
        best, depth = 1, 0
        for number, line in enumerate(self.lines, 1):
            if header := _HEADER.match(line):
                found = section = _parts(header[1])
            elif key := _KEY.match(line):
                found = (*section, *_parts(key[1]))
            else:
                continue
            if path[: len(found)] == found and len(found) > depth:
                best, depth = number, len(found)
            elif found == (INHERITS,) and not depth:
                best = number
        return best

    def build(self, kind: type, data: Mapping[str, Any], path: tuple[str, ...]) -> object:
        """A dataclass from a table: every field that has no default, nothing unknown."""
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for key in data:
            if key not in fields:
                self.fail((*path, key), f"unknown field; the fields here are {', '.join(fields)}")
        for name, item in fields.items():
            optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
            if name not in data and not optional:
                self.fail((*path, name), "this field is missing")
        values = {name: self.value(hints[name], value, (*path, name)) for name, value in data.items()}
        try:
            return kind(**values)
        except ContractError as fault:
            self.fail((*path, *fault.key.split(".")), str(fault))
        except QirError as fault:
            self.fail(path, str(fault))

    def value(self, kind: Any, value: Any, path: tuple[str, ...]) -> Any:
        """A value of the declared kind."""
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kinds = typing.get_args(kind)
            if value == ABSENT and type(None) in kinds:
                return None
            return self.alternative([k for k in kinds if k is not type(None)], value, path)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, dict):
                self.fail(path, "expected a table")
            return self.build(kind, value, path)
        origin = typing.get_origin(kind)
        if origin is tuple:
            if not isinstance(value, list):
                self.fail(path, "expected a list")
            return tuple(self.value(typing.get_args(kind)[0], v, path) for v in value)
        if origin is not None and issubclass(origin, Mapping):
            value = {} if value == ABSENT else value
            if not isinstance(value, dict):
                self.fail(path, "expected a table")
            item = typing.get_args(kind)[1]
            stated = {k: v for k, v in value.items() if v != ABSENT}
            return types.MappingProxyType({k: self.value(item, v, (*path, k)) for k, v in stated.items()})
        if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
            if not isinstance(value, str) or value not in set(kind):
                self.fail(path, f"{value!r} is not one of {', '.join(kind)}")
            return kind(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            self.fail(path, f"expected {kind.__name__}, found {value!r}")
        return value

    def alternative(self, kinds: list[Any], value: Any, path: tuple[str, ...]) -> Any:
        """A number or one of the words of an enum, where a field takes either; else the only kind."""
        words = next((k for k in kinds if isinstance(k, type) and issubclass(k, enum.StrEnum)), None)
        if words is None or len(kinds) == 1:
            return self.value(kinds[0], value, path)
        if isinstance(value, str):
            if value not in set(words):
                self.fail(path, f"{value!r} is neither a number nor one of {', '.join(words)}")
            return words(value)
        return self.value(next(k for k in kinds if k is not words), value, path)
