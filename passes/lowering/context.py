"""What a lowering rule works with: the graph being built, the layout of every value, requantization, constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import FLOAT_FORMS, Overflow, RequantizeForm, Rounding
from qir.interval import Bounds, bits_of_interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize, quantize_array
from qir.ops.movement import FixedReshape, FixedTranspose
from qir.passes.lowering.factors import Factor, factor
from qir.rewrite import Rewriter
from qir.target import Product, Requantizer, Target, Width
from qir.types import (
    AffineType,
    Dim,
    ElementType,
    FixedPointType,
    IntegerType,
    QuantizedType,
    Shape,
    TensorType,
    integer,
    is_quantized,
    scale_array,
    storage_of,
    zero_array,
)

_WIDEST: Final = 64
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
        self._data: dict[Value, Array] = {}
        self.vanished: dict[str, QuantizedType] = {}
        """Constants, biases apart, of which nothing but zeros is left in their types."""

    # Values and layouts

    def define(self, old: Value, new: Value, last: bool = False) -> None:
        """`new` stands for `old`, with channels last where so stated."""
        self._layouts[old, last] = new

    @property
    def layouts(self) -> Mapping[tuple[Value, bool], Value]:
        """What stands for each old value, with channels last or not: first the layout that was defined first."""
        return MappingProxyType(self._layouts)

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

    def format_of(self, old: Value) -> QuantizedType:
        """The quantized type of an old value. Raises NoIntegerForm when it has none for the whole tensor."""
        element = old.type.element
        if not isinstance(element, AffineType | FixedPointType) or element.axis is not None:
            raise NoIntegerForm(f"%{old.name} has no quantized type for the whole tensor")
        return element

    def scale(self, old: Value) -> np.float32:
        """The scale of an old value."""
        return scale_of(self.format_of(old))

    def zero(self, old: Value) -> int:
        """The zero point of an old value."""
        return int(zero_array(self.format_of(old)))

    def clipped(self, old: Value, clip: tuple[float, ...] | None) -> QuantizedType:
        """The type of a result whose storage bounds are narrowed to a fused activation."""
        element = self.format_of(old)
        if clip is None:
            return element
        lo, hi = quantize_array(np.array(clip, np.float32), element, QuantizeRule.DIVIDE, self.target.input.rounding)
        return element.with_storage(element.storage.narrowed(int(lo), int(hi)))

    # Emission

    def result_of(self, op: Op, new: Value, last: bool = False) -> None:
        """`new` stands for the op's result."""
        self.define(op.result, new, last and op.result.type.rank > 2)

    def constant(self, data: Array, kind: TensorType, name: str = "") -> Value:
        """A constant, whose data proofs of widths may use."""
        value = super().constant(data, kind, name)
        self._data[value] = data
        return value

    def sum_of(
        self,
        op_class: type[Accumulating],
        operands: Sequence[Value],
        shift: int,
        *,
        name: str,
        location: str,
        product: Product | None = None,
        **more: Any,
    ) -> Value:
        """An accumulating op by the contract, read out of its guard bits; what `product` narrows enters at `shift`."""
        contract, product = self.target.accumulator, product or self.target.product
        attributes: dict[str, Any] = {"overflow": contract.overflow, "order": contract.order, **more}
        if contract.guard_bits:
            attributes["overflow"] = Overflow.WRAP
        if shift:
            attributes |= {"product_shift": shift, "rounding": contract.rounding if shift < 0 else None}
        if isinstance(contract.bits, Width):
            bits = self._proved_bits(op_class, operands, attributes)
            read = register = integer(bits)
        else:
            register, read = integer(contract.bits + contract.guard_bits), integer(contract.bits)
        if product.bits is not Width.EXACT:
            kind = register if isinstance(product.bits, Width) else integer(product.bits)
            overflow = contract.overflow if isinstance(product.bits, Width) else product.overflow
            attributes |= {"product": kind, "product_overflow": overflow}
        inner = f"{name}.guarded" if contract.guard_bits else name
        total = self.emit(op_class, operands, accumulator=register, name=inner, location=location, **attributes)
        if not contract.guard_bits:
            return total
        # the same integers in a narrower type: nothing is rounded
        rounding, overflow = Rounding.FLOOR, contract.overflow
        return self.shifted(total, 0, read, rounding=rounding, overflow=overflow, name=name, location=location)

    def _proved_bits(
        self, op_class: type[Accumulating], operands: Sequence[Value], attributes: Mapping[str, Any]
    ) -> int:
        """The width that holds every partial sum, from the weights and the types of the other operands."""
        trial = op_class(operands=tuple(operands), accumulator=integer(_WIDEST), **attributes)
        found = trial.bounds([self._bounds(v) for v in operands])
        assert found is not None
        assert found.partial is not None
        bits = bits_of_interval(found.partial)
        if bits > _WIDEST:
            raise NoIntegerForm(f"its sums take {bits} bits, and {_WIDEST} is the most there is")
        return max(bits, 2)

    def _bounds(self, value: Value) -> Bounds:
        if value in self._data:
            found = Const(value=self._data[value], results=(value,)).bounds(())
            return found.results[0]
        storage = storage_of(value.type.element)
        assert storage is not None
        return Bounds.of(storage.lo, storage.hi)

    def shifted(
        self,
        value: Value,
        shift: int,
        element: ElementType,
        *,
        name: str,
        location: str,
        rounding: Rounding | None = None,
        overflow: Overflow = Overflow.SATURATE,
    ) -> Value:
        """`value * 2**shift`, rounded as the contract rescales, and saturated where nothing else is said."""
        rounding = rounding or self.target.requantization.of("rescale").rounding or Rounding.FLOOR
        factor = Factor(np.array(1, np.int64), np.array(shift, np.int64))
        return self.emit(
            Requantize,
            [value],
            elements=[element],
            overflow=overflow,
            **_formula(Requantizer(RequantizeForm.SHIFT, rounding), factor, name),
            name=name,
            location=location,
        )

    def requantize(
        self,
        value: Value,
        factor: Factor,
        element: ElementType,
        *,
        kind: str,
        name: str,
        location: str,
        input_shift: int = 0,
    ) -> Value:
        """A requantize in the form that the target has for this kind of op.

        Where results overflow by another mode than saturation, a fused activation comes first, as a step of its own.
        """
        rule, overflow = self.target.requantization.of(kind), self.target.requantization.overflow
        attributes = {**_formula(rule, factor, name), "input_shift": input_shift}
        storage = storage_of(element)
        assert storage is not None
        if not isinstance(element, AffineType | FixedPointType):
            overflow = Overflow.SATURATE  # an intermediate result
        elif overflow is not Overflow.SATURATE and storage != self.target.activations.storage(storage.bits):
            return self._activated(value, element, attributes, name=name, location=location)
        return self.emit(
            Requantize, [value], elements=[element], **attributes, overflow=overflow, name=name, location=location
        )

    def _activated(
        self, value: Value, element: QuantizedType, attributes: Mapping[str, Any], *, name: str, location: str
    ) -> Value:
        """A requantize with a fused activation: clipped in a register that holds every result, then narrowed."""
        storage, zero = element.storage, int(zero_array(element))
        whole = self.target.activations.storage(storage.bits)
        wide = self._register(value, attributes, storage.bits + 1)
        low, high = (
            wide_end if end == whole_end else end - zero
            for end, whole_end, wide_end in (
                (storage.lo, whole.lo, wide.lo),
                (storage.hi, whole.hi, wide.hi),
            )
        )
        step: dict[str, Any] = {"elements": [wide.narrowed(low, high)], "overflow": Overflow.SATURATE}
        clipped = self.emit(Requantize, [value], **attributes, **step, name=f"{name}.clipped", location=location)
        if wide.lo < low and high < wide.hi:
            return self.shifted(clipped, 0, element, name=name, location=location)
        overflow = self.target.requantization.overflow
        kept = element.with_storage(whole)
        narrowed = self.shifted(clipped, 0, kept, overflow=overflow, name=f"{name}.whole", location=location)
        return self.shifted(narrowed, 0, element, name=name, location=location)

    def _register(self, value: Value, attributes: Mapping[str, Any], least: int) -> IntegerType:
        """Integers of `least` bits or more that hold all results of a requantize, zero point apart; at most 64."""
        storage = storage_of(value.type.element)
        assert storage is not None
        if attributes["form"] in FLOAT_FORMS:
            return integer(_WIDEST)
        left = attributes["input_shift"] + max(int(attributes["shift"].data.max(initial=0)), 0)
        return integer(min(max(storage.bits + 1 + left, least), _WIDEST))

    def rescaled(self, value: Value, factor: Factor, element: QuantizedType, *, name: str, location: str) -> Value:
        """A change of scale that saturates, whatever becomes of results of layers that do not fit."""
        rule = self.target.requantization.of("rescale")
        return self.emit(
            Requantize,
            [value],
            elements=[element],
            **_formula(rule, factor, name),
            overflow=Overflow.SATURATE,
            name=name,
            location=location,
        )

    def number(self, value: int, kind: IntegerType, *, name: str) -> Value:
        """A scalar constant of plain integers."""
        array = Array(np.asarray(value, kind.dtype), name)
        return self.constant(array, TensorType((), kind), name=name)

    def factor(
        self, kind: str, scales: Sequence[IntArray | np.float32], output: QuantizedType, count: int = 1
    ) -> Factor:
        """The factor from sums at the product of these scales to an output, in the form for this kind of op."""
        return factor(self.target.requantization.of(kind), scales, scale_of(output), count)

    def converted(self, value: Value, element: QuantizedType, *, name: str, location: str) -> Value:
        """`value` in another per-tensor format; itself where its integers already mean the same and fit."""
        source = value.type.element
        assert isinstance(source, AffineType | FixedPointType)
        fits = element.storage.lo <= source.storage.lo and source.storage.hi <= element.storage.hi
        same_container = source.storage.base_name == element.storage.base_name
        same_reals = scale_of(source) == scale_of(element) and int(zero_array(source)) == int(zero_array(element))
        if fits and same_container and same_reals:
            return value
        found = self.factor("rescale", [scale_of(source)], element)
        return self.requantize(value, found, element, kind="rescale", name=name, location=location)

    def integers(self, old: Value, rounding: Rounding = Rounding.HALF_AWAY) -> IntArray:
        """The integers of a constant under its quantized type, in the smallest dtype.

        Raises NoIntegerForm when it has none.
        """
        element = old.type.element
        if not isinstance(element, AffineType | FixedPointType):
            raise NoIntegerForm(f"%{old.name} has no quantized type")
        data = self.graph.constants[old].data.astype(np.float32)
        found = quantize_array(data, element, QuantizeRule.DIVIDE, rounding)
        zeros = quantize_array(np.zeros_like(data), element, QuantizeRule.DIVIDE, rounding)
        has_zero = element.storage.levels is None or 0 in element.storage.levels
        if data.ndim != 1 and data.any() and has_zero and np.array_equal(found, zeros):
            self.vanished[old.name] = element
        return found.astype(element.storage.dtype)

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

    def island(self, op: Op, given: Mapping[Value, Value] | None = None) -> None:
        """Keep a float op between dequantize and quantize, in ONNX's layout; `given` are reals for some operands."""
        operands = []
        for old in op.operands:
            if given and old in given:
                operands.append(given[old])
            elif old in self.graph.constants and self.graph.constants[old].data.dtype.kind == "f":
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
            # Only the border has the zero point inside the rounding: PyTorch's ops add it afterwards.
            is_fused = rule.rule is QuantizeRule.RECIPROCAL_FUSED
            new = self.emit(
                Quantize,
                [new],
                elements=[result.type.element],
                rule=QuantizeRule.RECIPROCAL if is_fused else rule.rule,
                rounding=rule.rounding,
                name=self.claim(result),
                location=op.location,
            )
        self.define(result, new)


def spatial_rank_4(shape: Shape) -> tuple[Dim, ...]:
    """(N, L, C) as (N, 1, L, C); NHWC as it is."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def scale_of(element: QuantizedType) -> np.float32:
    """The scale of a per-tensor type; float32 holds powers of two too."""
    return np.float32(scale_array(element))


def _formula(rule: Requantizer, factor: Factor, name: str) -> dict[str, Any]:
    """The attributes of a requantize that say what is computed."""
    return {
        "multiplier": Array(factor.multiplier, f"{name}.multiplier"),
        "shift": Array(factor.shift, f"{name}.shift"),
        "form": rule.form,
        "rounding": rule.rounding,
    }
