"""What a lowering rule works with: the graph being built, the layout of every value, requantization, constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import Overflow, Rounding
from qir.integer_functions import Multiplier, rescale_multiplier
from qir.ir import Graph, Op, Stage, Value
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize, quantize_array
from qir.ops.movement import FixedReshape, FixedTranspose
from qir.rewrite import Rewriter
from qir.target import Target
from qir.types import AffineType, Dim, ElementType, IntegerType, Shape, TensorType, is_quantized

IntArray = npt.NDArray[Any]


class NoIntegerForm(Exception):
    """Raised by a rule: the op as it stands has no integer form on the target; the text says why."""


Rule = Callable[["Lowering", Op], None]


def channels_last(rank: int) -> tuple[int, ...]:
    """The permutation from ONNX's layout (N, C, spatial) to (N, spatial, C)."""
    return (0, *range(2, rank), 1)


def channels_first(rank: int) -> tuple[int, ...]:
    """The inverse of `channels_last`."""
    return (0, rank - 1, *range(1, rank - 1))


def last_axis(axis: int, rank: int) -> int:
    """Where an axis of ONNX's layout stands with channels last."""
    return axis if axis == 0 or rank < 3 else rank - 1 if axis == 1 else axis - 1


class Lowering(Rewriter):
    """A rewriter that knows each old value in one or both layouts: ONNX's, and channels last for ranks above 2.

    Rules ask for the layout that they want; a transpose is written when it is not there yet.
    """

    def __init__(self, graph: Graph, target: Target) -> None:
        super().__init__(graph, Stage.FIXED)
        self.target = target
        self._layouts: dict[tuple[Value, bool], Value] = {}
        self._reshaped: dict[Value, Value] = {}

    # Values and layouts

    def define(self, old: Value, new: Value, last: bool = False) -> None:
        """`new` stands for `old`, with channels last where so stated."""
        self._layouts[old, last] = new

    def has(self, old: Value, last: bool) -> bool:
        """Whether the old value is there in this layout without another transpose."""
        return (old, last) in self._layouts

    def read(self, old: Value, last: bool = False) -> Value:
        """What stands for an old value, in ONNX's layout or with channels last."""
        last = last and old.type.rank > 2
        found = self._layouts.get((old, last))
        if found is None:
            if old in self.graph.constants:
                found = self.constant_operand(old, last=last)
            else:
                perm = channels_last(old.type.rank) if last else channels_first(old.type.rank)
                found = self.transpose(self._layouts[old, not last], perm, name=old.name)
            self._layouts[old, last] = found
        return found

    def transpose(self, value: Value, perm: tuple[int, ...], name: str = "") -> Value:
        """A transpose, written as a reshape where only dimensions of size 1 move."""
        moved = [p for p in perm if value.type.shape[p] != 1]
        if moved == sorted(moved):
            return self.reshape(value, tuple(value.type.shape[p] for p in perm), name=name)
        return self.emit(FixedTranspose, [value], perm=perm, name=name)

    def channels_last(self, value: Value) -> Value:
        """A transpose of `value` from ONNX's layout to channels last."""
        return self.transpose(value, channels_last(value.type.rank))

    def reshape(self, value: Value, shape: Shape, name: str = "") -> Value:
        """A reshape to the full shape, N included; none where the shape is there already."""
        source = self._reshaped.get(value, value)
        for present in (value, source):
            if present.type.shape == shape:
                return present
        sizes = tuple(d for d in shape if isinstance(d, int))
        result = self.emit(FixedReshape, [source], shape=sizes, name=name)
        self._reshaped[result] = source
        return result

    # Types

    def affine_of(self, old: Value) -> AffineType:
        """The quantized type of an old value. Raises NoIntegerForm when it has none."""
        element = old.type.element
        if not isinstance(element, AffineType) or element.axis is not None:
            raise NoIntegerForm(f"%{old.name} has no per-tensor affine type")
        return element

    def scale(self, old: Value) -> np.float32:
        """The scale of an old value."""
        return np.float32(self.affine_of(old).scale.data)

    def zero(self, old: Value) -> int:
        """The zero point of an old value."""
        return int(self.affine_of(old).zero_point.data)

    def clipped(self, old: Value, clip: tuple[float, ...] | None) -> AffineType:
        """The type of a result whose storage bounds are narrowed to a fused activation."""
        element = self.affine_of(old)
        if clip is None:
            return element
        lo, hi = quantize_array(np.array(clip, np.float32), element, QuantizeRule.DIVIDE, Rounding.HALF_AWAY)
        return element.with_storage(element.storage.narrowed(int(lo), int(hi)))

    @property
    def accumulator(self) -> IntegerType:
        """The target's accumulator."""
        return self.target.accumulator_type

    @property
    def accumulation(self) -> dict[str, Any]:
        """The attributes that every accumulating op gets from the target."""
        contract = self.target.accumulator
        return {"accumulator": self.accumulator, "overflow": contract.overflow, "order": contract.order}

    # Emission

    def result_of(self, op: Op, new: Value, last: bool = False) -> None:
        """`new` stands for the op's result."""
        self.define(op.result, new, last and op.result.type.rank > 2)

    def requantize(
        self,
        value: Value,
        factors: Multiplier | Sequence[Multiplier],
        element: ElementType,
        *,
        name: str,
        location: str,
        input_shift: int = 0,
    ) -> Value:
        """A saturating requantize in the target's form; several factors run along the last axis."""
        single = isinstance(factors, Multiplier)
        pairs = np.array([factors] if single else list(factors), np.int64).reshape(-1, 2)
        multiplier, shift = (pairs[0, i] if single else pairs[:, i] for i in (0, 1))
        return self.emit(
            Requantize,
            [value],
            elements=[element],
            multiplier=Array(np.asarray(multiplier), f"{name}.multiplier"),
            shift=Array(np.asarray(shift), f"{name}.shift"),
            form=self.target.requantization.form,
            input_shift=input_shift,
            overflow=Overflow.SATURATE,
            name=name,
            location=location,
        )

    def converted(self, value: Value, element: AffineType, *, name: str, location: str) -> Value:
        """`value` in another per-tensor format; itself where its integers already mean the same and fit."""
        source = value.type.element
        assert isinstance(source, AffineType)
        fits = element.storage.lo <= source.storage.lo and source.storage.hi <= element.storage.hi
        same_container = source.storage.base_name == element.storage.base_name
        if fits and same_container and (source.scale, source.zero_point) == (element.scale, element.zero_point):
            return value
        factor = rescale_multiplier(np.float32(source.scale.data), np.float32(element.scale.data))
        return self.requantize(value, factor, element, name=name, location=location)

    def integers(self, old: Value, rounding: Rounding = Rounding.HALF_AWAY) -> IntArray:
        """The integers of a constant under its quantized type, in the smallest dtype.

        Raises NoIntegerForm when it has none.
        """
        element = old.type.element
        if not isinstance(element, AffineType):
            raise NoIntegerForm(f"%{old.name} has no affine type")
        data = self.graph.constants[old].data.astype(np.float32)
        return quantize_array(data, element, QuantizeRule.DIVIDE, rounding).astype(element.storage.dtype)

    def constant_operand(self, old: Value, *, last: bool = False, rank: int | None = None) -> Value:
        """A constant quantized by its type; optionally with leading 1s up to `rank`, channels last."""
        data = self.graph.constants[old].data
        element = old.type.element
        if is_quantized(element):
            data = self.integers(old)
        if rank is not None and rank > data.ndim:
            data = data.reshape((1,) * (rank - data.ndim) + data.shape)
        if last and data.ndim > 2:
            data = data.transpose(channels_last(data.ndim))
        array = Array(np.ascontiguousarray(data), self.graph.constants[old].name or old.name)
        return self.constant(array, TensorType(array.shape, element), name=old.name)

    def island(self, op: Op) -> None:
        """Keep a float op between dequantize and quantize, in ONNX's layout."""
        operands = []
        for old in op.operands:
            if old in self.graph.constants and self.graph.constants[old].data.dtype.kind == "f":
                operands.append(self.constant(self.graph.constants[old], TensorType(old.type.shape), name=old.name))
            elif is_quantized(old.type.element):
                operands.append(self.emit(Dequantize, [self.read(old)], name=f"{old.name}.real", location=op.location))
            else:
                operands.append(self.read(old))
        result = op.result
        quantized = is_quantized(result.type.element)
        island = op.with_changes(
            operands=tuple(operands),
            results=(Value(self.fresh(f"{result.name}.real"), TensorType(result.type.shape)),)
            if quantized
            else (Value(self.fresh(self.claim(result)), result.type),),
        )
        self.ops.append(island)
        new = island.result
        if quantized:
            rule = self.target.input
            new = self.emit(
                Quantize,
                [new],
                elements=[result.type.element],
                rule=rule.rule,
                rounding=rule.rounding,
                name=self.claim(result),
                location=op.location,
            )
        self.define(result, new)


def spatial_rank_4(shape: Shape) -> tuple[Dim, ...]:
    """(N, L, C) as (N, 1, L, C); NHWC as it is."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape
