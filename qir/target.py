"""A target: what a chip computes, as data, loaded from TOML and validated field by field."""

from __future__ import annotations

import dataclasses
import enum
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qir.errors import QirError, TargetError
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.ops.accumulate import Order
from qir.ops.fixed_rescale import QuantizeRule
from qir.types import IntegerType, integer


class Scheme(enum.StrEnum):
    """Whether a zero point may differ from 0."""

    AFFINE = "affine"
    SYMMETRIC = "symmetric"


class Granularity(enum.StrEnum):
    """Whether each output channel of the weights has a scale of its own."""

    PER_CHANNEL = "per_channel"
    PER_TENSOR = "per_tensor"


@dataclass(frozen=True)
class Activations:
    """Integers between layers: widths that the chip has, cheapest preferred by the cost table."""

    bits: tuple[int, ...]
    signed: bool
    scheme: Scheme

    def storage(self, bits: int) -> IntegerType:
        """The integer type of this width."""
        return integer(bits, self.signed)


@dataclass(frozen=True)
class Weights:
    """Constant operands of convolutions and matrix products. `narrow_range` leaves out the least value."""

    bits: tuple[int, ...]
    narrow_range: bool
    conv: Granularity
    matmul: Granularity

    def storage(self, bits: int) -> IntegerType:
        """The integer type of this width: signed and symmetric."""
        kind = integer(bits)
        return kind.narrowed(-kind.hi, kind.hi) if self.narrow_range else kind


@dataclass(frozen=True)
class Accumulator:
    """The register that sums products: its width, what a step does on overflow, the order of the products."""

    bits: int
    overflow: Overflow
    order: Order


@dataclass(frozen=True)
class Requantization:
    """How an accumulator is brought to the scale of its output."""

    form: RequantizeForm


@dataclass(frozen=True)
class InputQuantization:
    """How real inputs become integers at the border of the program."""

    rule: QuantizeRule
    rounding: Rounding


@dataclass(frozen=True)
class Costs:
    """Relative costs: `mac` maps bits of weight and activation, such as `"8x8"`, to that of a multiply-accumulate."""

    mac: Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """The executable arithmetic contract of a chip.

    `floating_point` says whether ops without an integer form may stay as float islands.
    """

    name: str
    description: str
    floating_point: bool
    activations: Activations
    weights: Weights
    accumulator: Accumulator
    requantization: Requantization
    input: InputQuantization
    costs: Costs

    def __post_init__(self) -> None:
        if not self.activations.bits or not self.weights.bits:
            raise QirError("activations.bits and weights.bits must list at least one width")
        for group, widths in (("activations", self.activations.bits), ("weights", self.weights.bits)):
            for bits in widths:
                if not 2 <= bits <= 16:
                    raise QirError(f"{group}.bits lists {bits}; widths of 2 to 16 bits are supported")
        if self.accumulator.overflow not in (Overflow.WRAP, Overflow.SATURATE):
            raise QirError(f"accumulator.overflow must be wrap or saturate, not {self.accumulator.overflow}")
        integer_forms = (RequantizeForm.DOUBLE_ROUND, RequantizeForm.SINGLE_ROUND, RequantizeForm.NEON)
        if self.requantization.form not in integer_forms:
            raise QirError(f"requantization.form must be one of {', '.join(integer_forms)}")
        for a in self.activations.bits:
            for w in self.weights.bits:
                if f"{w}x{a}" not in self.costs.mac:
                    raise QirError(
                        f'costs.mac lacks "{w}x{a}", the cost of a {w}-bit weight times a {a}-bit activation'
                    )

    @property
    def accumulator_type(self) -> IntegerType:
        """The integer type of the accumulator, of biases and of other intermediate sums."""
        return integer(self.accumulator.bits)

    def __str__(self) -> str:
        lines: list[str] = []
        _print_fields(self, "", lines)
        return "\n".join([*lines, ""])


def _print_fields(item: Any, section: str, lines: list[str]) -> None:
    """TOML text of a dataclass: plain fields first, then its sections."""
    nested: list[tuple[str, Any]] = []
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            nested.append((field.name, value))
        else:
            lines.append(f"{field.name} = {_toml(value)}")
    for name, value in nested:
        lines += ["", f"[{section}{name}]"]
        if isinstance(value, Mapping):
            lines += [f"{_toml(k)} = {_toml(v)}" for k, v in value.items()]
        else:
            _print_fields(value, f"{section}{name}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def read_target(path: str | Path) -> Target:
    """The target that a TOML file describes. Raises TargetError with file and line, the reason and the mend."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise TargetError(f"cannot read target {path}: {reason}") from fault
    return parse_target(text, str(path))


def parse_target(text: str, source: str = "<text>") -> Target:
    """The target that TOML text describes; see `read_target`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise TargetError(f"{source}: not TOML: {fault}") from fault
    loader = _Loader(text, source)
    target = loader.build(Target, data, ())
    assert isinstance(target, Target)
    return target


class _Loader:
    def __init__(self, text: str, source: str) -> None:
        self.lines = text.splitlines()
        self.source = source

    def fail(self, path: tuple[str, ...], message: str) -> typing.NoReturn:
        raise TargetError(f"{self.source}:{self.line(path)}: {'.'.join(path) or 'target'}: {message}")

    def line(self, path: tuple[str, ...]) -> int:
        """The line of a key, or of its section where the key is absent; 1 where neither stands in the text."""
        section, best = "", 1
        wanted, key = ".".join(path[:-1]), path[-1] if path else ""
        for number, line in enumerate(self.lines, 1):
            header = re.match(r"\s*\[\s*([^\]]+?)\s*\]", line)
            if header:
                section = header[1]
                if section in (wanted, ".".join(path)):
                    best = number
            elif section == wanted and re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", line):
                return number
        return best

    def build(self, kind: type, data: Mapping[str, Any], path: tuple[str, ...]) -> object:
        """A dataclass from a table: every field once, nothing unknown."""
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        for key in data:
            if key not in names:
                self.fail((*path, key), f"unknown field; the fields here are {', '.join(names)}")
        for name in names:
            if name not in data:
                self.fail((*path, name), "this field is missing")
        values = {name: self.value(hints[name], data[name], (*path, name)) for name in names}
        try:
            return kind(**values)
        except QirError as fault:
            self.fail(path, str(fault))

    def value(self, kind: Any, value: Any, path: tuple[str, ...]) -> Any:
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
            if not isinstance(value, dict):
                self.fail(path, "expected a table")
            item = typing.get_args(kind)[1]
            return types.MappingProxyType({k: self.value(item, v, (*path, k)) for k, v in value.items()})
        if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
            if value not in set(kind):
                self.fail(path, f"{value!r} is not one of {', '.join(kind)}")
            return kind(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            self.fail(path, f"expected {kind.__name__}, found {value!r}")
        return value
