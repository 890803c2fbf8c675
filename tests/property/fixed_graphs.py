"""Random fixed-stage graphs of one op, or of a few as legalize strings them; data at the extremes of their types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from qir.arrays import Array
from qir.fixed_point import FLOAT_FORMS, Overflow, RequantizeForm, Rounding
from qir.integer_functions import prepare_softmax
from qir.ir import Graph, Op, Stage, Value
from qir.levels import power_of_two_levels
from qir.ops.accumulate import Order
from qir.ops.dequantize_blocks import DequantizeBlocks, Packing
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize
from qir.ops.float_elementwise import Add, Relu
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.pass_manager import PassContext, Pipeline
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.range_analysis import RangeAnalysis
from qir.rewrite import GraphBuilder
from qir.types import (
    BATCH,
    BINARY,
    F32,
    S8,
    S16,
    S32,
    S64,
    U8,
    ElementType,
    IntegerType,
    Shape,
    TensorType,
    affine,
    container_bounds,
    fixed_point,
    integer,
    of_levels,
    storage_of,
)

Tensor = npt.NDArray[Any]

S4 = integer(4)
#: What activations are stored as: whole containers, odd widths, and bounds that leave out zero or an end.
STORAGES = (
    S8,
    U8,
    S16,
    S4,
    integer(1, signed=False),
    S8.narrowed(-127, 127),
    S8.narrowed(3, 17),
    integer(5).narrowed(-9, 11),
)
_ODD_WIDTHS = (integer(1), integer(2), integer(3), integer(6), integer(12), integer(1, signed=False))
_LEVELS = (BINARY, *map(power_of_two_levels, (2, 3, 4, 5)), of_levels((-128, -3, 1, 90)), of_levels((3, 5)))
WEIGHT_STORAGES = (S8.narrowed(-127, 127), S8, S4, S16, U8, *_ODD_WIDTHS, *_LEVELS)
ACCUMULATORS = (S32, S32, S32, S16, integer(13), integer(24), integer(40), S64)
BATCHES = (0, 1, 3)
_POWERS = tuple(1 << p for p in range(31))


class FixedMaker:
    """Builds a graph step by step: hypothesis draws its structure, a seed its numbers."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.builder = GraphBuilder("random", Stage.FIXED)
        self.lead: Shape = draw(st.sampled_from([(BATCH,), (BATCH,), (1,), (2,)]))
        self.emitted: list[Value] = []

    def pick(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def size(self, least: int = 1, most: int = 4) -> int:
        return self.draw(st.integers(least, most))

    def extent(self) -> int:
        """A dimension that may be empty."""
        return int(self.pick([1, 1, 2, 3, 4, 5, 7, 0]))

    def element(self, storages: Sequence[IntegerType] = STORAGES) -> ElementType:
        """Affine with the zero point somewhere in the container, often at an end of it; fixed point; or plain."""
        storage = self.pick(storages)
        kind = self.pick(["affine", "affine", "fixed point", "plain"])
        if kind == "affine":
            low, high = container_bounds(storage.bits, storage.signed)
            return affine(storage, 0.5, self.pick([0, storage.lo, storage.hi, low, high, (storage.lo + high) // 2]))
        return fixed_point(storage, -3) if kind == "fixed point" else storage

    def numbers(self, storage: IntegerType, shape: tuple[int, ...]) -> Tensor:
        """Integers of a storage: random ones, all of one bound, or either bound."""
        lo, hi = storage.lo, storage.hi
        ends = np.array([lo, hi]).astype(storage.dtype)
        match self.pick(["random", "random", "low", "high", "ends"]):
            case "low":
                return np.full(shape, lo, storage.dtype)
            case "high":
                return np.full(shape, hi, storage.dtype)
            case "ends":
                return self.random.choice(ends, shape)
        if storage.levels is not None:
            return self.random.choice(np.array(storage.levels, storage.dtype), shape)
        return self.random.integers(lo, hi, shape, storage.dtype, endpoint=True)

    def input(
        self, *shape: int, storages: Sequence[IntegerType] = STORAGES, element: ElementType | None = None
    ) -> Value:
        name = f"x{len(self.builder.inputs)}"
        kind = self.element(storages) if element is None else element
        return self.builder.input(name, TensorType((*self.lead, *shape), kind))

    def constant(self, data: Tensor, element: ElementType) -> Value:
        return self.builder.constant(Array(data), TensorType(data.shape, element), "k")

    def emit(self, op_class: type[Op], operands: Sequence[Value], **attributes: Any) -> Value:
        value = self.builder.emit(op_class, operands, **attributes)
        self.emitted.append(value)
        return value

    def bias(self, outputs: int, accumulator: IntegerType) -> list[Value]:
        """None, small, or so large that it drives the accumulator."""
        if self.flag():
            return []
        kind = accumulator if accumulator.bits < 32 else S32
        small = kind.narrowed(-1000, 1000)
        return [self.constant(self.numbers(self.pick([kind, small]), (outputs,)), kind)]

    def accumulator(self) -> dict[str, Any]:
        """An accumulator; at times one that takes products one by one, shifted, narrowed or rounded at each step."""
        accumulator = self.pick(ACCUMULATORS)
        modes = [Overflow.WRAP, Overflow.WRAP, Overflow.SATURATE, Overflow.SATURATE]
        attributes: dict[str, Any] = {
            "accumulator": accumulator,
            "overflow": self.pick([*modes, Overflow.SATURATE_SYMMETRIC, Overflow.SATURATE_ZERO]),
            "order": self.pick(list(Order)),
        }
        if self.flag():
            return attributes
        shift = self.pick([None, 1, 1, 3, -1, -4, -9])
        if shift is not None:
            attributes["product_shift"] = shift
            attributes["rounding"] = self.pick(list(Rounding)) if shift < 0 else None
        if self.flag():
            attributes["product"] = self.pick([S16, integer(12), integer(18), S32, accumulator])
            attributes["product_overflow"] = self.overflow(attributes["product"])
        return attributes

    def overflow(self, kept: IntegerType) -> Overflow:
        """How values are narrowed to this storage: mostly by saturation, else by any mode that it allows."""
        modes = [Overflow.SATURATE] * 5 + ([Overflow.SATURATE_SYMMETRIC] if kept.hi >= 0 else [])
        modes += [Overflow.SATURATE_ZERO] if kept.lo <= 0 <= kept.hi else []
        return Overflow(self.pick(modes if kept.is_narrowed else [*modes, Overflow.WRAP]))

    # One op each, of an input of its own or of a value of the graph

    def conv(self, x: Value | None = None, keeps_shape: bool = False, **accumulator: Any) -> Value:
        if x is None:
            groups, per_group, multiple = self.pick(
                [(1, 3, 5), (1, 1, 1), (1, 4, 2), (2, 3, 2), (3, 1, 1), (5, 1, 1), (2, 1, 3)]
            )
            x = self.input(self.size(1, 5), self.size(1, 5), groups * per_group)
        else:
            channels = int(x.type.shape[3])
            groups = self.pick([g for g in range(1, channels + 1) if channels % g == 0])
            per_group = channels // groups
            multiple = per_group if keeps_shape else self.size(1, 3)
        height, width = (int(d) for d in x.type.shape[1:3])
        kernel = tuple(self.pick([(1, 1), (2, 1), (3, 3), (1, 3), (2, 2)]))
        dilations = (self.size(1, 2), self.size(1, 2))
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        if keeps_shape:
            begin = [self.size(0, e - 1) for e in extent]
            pads, strides = (*begin, *(e - 1 - b for e, b in zip(extent, begin, strict=True))), (1, 1)
        else:
            need = [max(0, e - s) for e, s in zip(extent, (height, width), strict=True)]
            pads = (self.size(0, 2), self.size(0, 2), need[0] + self.size(0, 2), need[1] + self.size(0, 2))
            strides = (self.size(1, 3), self.size(1, 3))
        storage = self.pick(WEIGHT_STORAGES)
        shape = (groups * multiple, *kernel, per_group)
        has_zero = storage.levels is None and self.flag()
        zero = self.random.integers(storage.lo, storage.hi, shape[0], endpoint=True) if has_zero else 0
        element = affine(storage, np.full(shape[0], 0.25), zero, 0) if self.flag() else storage
        weight = self.constant(self.numbers(storage, shape), element)
        accumulator = accumulator or self.accumulator()
        return self.emit(
            Conv2d,
            [x, weight, *self.bias(shape[0], accumulator["accumulator"])],
            pads=pads,
            strides=strides,
            dilations=dilations,
            groups=groups,
            **accumulator,
        )

    def matmul(self, x: Value | None = None, outputs: int | None = None, **accumulator: Any) -> Value:
        """A fully connected layer, or one whose rows have more dimensions."""
        x = self.input(*self.pick([(), (3,), (2, 3)]), self.extent()) if x is None else x
        outputs = self.extent() if outputs is None else outputs
        length = int(x.type.shape[-1])
        storage = self.pick(WEIGHT_STORAGES)
        zero = self.random.integers(storage.lo, storage.hi, endpoint=True) if storage.levels is None else 0
        element = affine(storage, 0.25, int(zero)) if self.flag() else storage
        weight = self.constant(self.numbers(storage, (length, outputs)), element)
        accumulator = accumulator or self.accumulator()
        bias = self.bias(outputs, accumulator["accumulator"])
        return self.emit(FixedMatMul, [x, weight, *bias], **accumulator)

    def batched_matmul(self, factors: tuple[Value, Value] | None = None) -> Value:
        """Two activations, whose leading dimensions broadcast."""
        if factors is None:
            rows, length, columns, heads = (self.extent() for _ in range(4))
            factors = self.input(heads, rows, length), self.input(self.pick([1, heads]), length, columns)
        left, right = factors
        columns = int(right.type.shape[-1])
        accumulator = self.accumulator()
        bias = self.bias(columns, accumulator["accumulator"]) if self.pick([False, False, True]) else []
        return self.emit(FixedMatMul, [left, right, *bias], **accumulator)

    def reduce_sum(self) -> Value:
        axes = self.pick([(1,), (2,), (1, 2), (2, 1), (3,), (1, 2, 3)])
        x = self.input(self.extent(), self.extent(), self.extent())
        return self.emit(ReduceSum, [x], axes=axes, keepdims=self.flag(), **self.accumulator())

    def requantize(self) -> Value:
        storages = (S32, S32, S16, S8, U8, integer(24), S32.narrowed(-5000, 5000))
        return self.rescale(self.input(self.extent(), self.extent(), storages=storages))

    def rescale(self, x: Value, result: ElementType | None = None, about: int | None = None) -> Value:
        """A requantize of any form, by `about` a power of two where that is given.

        Multipliers are often powers of two, so that many values are ties.
        """
        storage = storage_of(x.type.element)
        assert storage is not None
        forms = list(RequantizeForm)
        form = self.pick(forms if storage.bits <= 60 else [f for f in forms if f not in FLOAT_FORMS])
        input_shift = self.pick([0, 0, 7]) if storage.bits <= 24 else 0
        count = () if self.flag() else (int(x.type.shape[-1]),)
        if about is not None:
            shift = np.clip(about - input_shift + self.random.integers(-1, 2, count), -31, 15)
        else:
            shift = self.random.integers(-31, 16, count) if self.flag() else self.random.integers(-9, 2, count)
        multipliers = np.array([1 << 30, 3 << 29, (1 << 31) - 1, self.random.integers(1 << 30, 1 << 31)])
        multiplier = self.random.choice(multipliers, count)
        if form in FLOAT_FORMS:
            multiplier = np.ldexp(self.random.choice(np.array([1.0, 1.5, self.random.uniform(1, 2)]), count), shift)
        result = self.element((*STORAGES, *STORAGES, S32, integer(40))) if result is None else result
        kept = storage_of(result)
        assert kept is not None
        return self.emit(
            Requantize,
            [x],
            elements=[result],
            multiplier=Array(np.asarray(multiplier)),
            shift=Array(np.asarray(shift, np.int64)),
            form=form,
            rounding=self.pick(list(Rounding)) if form is RequantizeForm.SHIFT else None,
            input_shift=input_shift,
            overflow=self.overflow(kept),
        )

    def arithmetic(self, op_class: type[Op]) -> Value:
        """Two operands of shapes that broadcast, of which one may be constant."""
        shape = (self.extent(), self.extent(), self.extent())
        small = tuple(self.pick([1, d]) for d in shape)
        left = self.input(*shape)
        if self.flag():
            element = self.element()
            storage = storage_of(element)
            assert storage is not None
            right = self.constant(self.numbers(storage, small[self.size(0, 2) :]), element)
        elif self.flag():
            right = self.input(*small)
        else:
            right = self.builder.input("same for all samples", TensorType(small, self.element()))
        return self.combine(op_class, [left, right] if self.flag() else [right, left])

    def combine(self, op_class: type[Op], operands: Sequence[Value]) -> Value:
        result = self.element((*STORAGES, S32))
        kept = storage_of(result)
        assert kept is not None
        attributes: dict[str, Any] = {"overflow": self.overflow(kept)}
        if op_class is FixedDiv:
            attributes["overflow"] = Overflow.SATURATE
            attributes["multiplier"] = self.pick([*_POWERS[28:], (1 << 31) - 1, 0x5A5A5A5A])
            attributes["shift"] = self.pick([0, -3, 4, 31])
        return self.emit(op_class, operands, elements=[result], **attributes)

    def table(self, x: Value | None = None) -> Value:
        if x is None:
            x = self.input(self.extent(), self.extent(), storages=(S8, U8, S4, S8.narrowed(3, 17)))
        storage = storage_of(x.type.element)
        assert storage is not None
        entries = (1 << storage.bits,)
        shape = entries if self.flag() else (int(x.type.shape[-1]), *entries)
        kept = self.pick([S8, S16, S8.narrowed(-100, 3)])
        table = self.constant(self.numbers(kept, shape), kept)
        return self.emit(Table, [x, table], elements=[affine(kept, 0.125, 3)])

    def softmax(self, x: Value | None = None) -> Value:
        multiplier, left_shift, diff_min = prepare_softmax(self.pick([0.01, 0.1, 0.25, 0.5, 1.0]))
        if x is None:
            x = self.input(*self.pick([(), (3,), (0,)]), self.size(1, 11), element=affine(S8, 0.1, 7))
        result = affine(S8, 1 / 256, -128)
        return self.emit(
            FixedSoftmax, [x], elements=[result], multiplier=multiplier, left_shift=left_shift, diff_min=diff_min
        )

    def argmax(self, x: Value | None = None) -> Value:
        x = self.input(self.size(), self.size(), self.size()) if x is None else x
        attributes = {"axis": self.size(1, 3), "keepdims": self.flag(), "select_last_index": self.flag()}
        return self.emit(FixedArgMax, [x], elements=[self.pick([S64, S32])], **attributes)

    def pool(self, op_class: type[Op], x: Value | None = None) -> Value:
        x = self.input(self.size(3, 5), self.size(3, 5), self.size()) if x is None else x
        room = [min(3, int(d)) for d in x.type.shape[1:3]]
        kernel = (self.size(1, room[0]), self.size(1, room[1]))
        dilations = tuple(1 if k == r else self.size(1, 2) for k, r in zip(kernel, room, strict=True))
        pads = tuple(self.size(0, k - 1) if k < 3 else self.size(0, 1) for k in (*kernel, *kernel))
        if any(d > 1 for d in dilations):
            pads = (0, 0, 0, 0)
        attributes: dict[str, Any] = {"kernel": kernel, "dilations": dilations, "pads": pads}
        if op_class is FixedAveragePool:
            attributes["rounding"] = self.pick([Rounding.HALF_AWAY] * 3 + list(Rounding))
        return self.emit(op_class, [x], strides=(self.size(1, 3), self.size(1, 2)), **attributes)

    def movement(self, op_class: type[Op]) -> Value:
        h, w, c = self.extent(), self.size(), self.extent()
        x = self.input(h, w, c)
        storage = storage_of(x.type.element)
        assert storage is not None
        if op_class is FixedConcat:
            axis = self.size(1, 3)
            shape = [h, w, c]
            shape[axis - 1] = self.extent()
            return self.emit(op_class, [x, self.input(*shape, element=x.type.element), x], axis=axis)
        if op_class is FixedReshape:
            lead = () if self.lead == (BATCH,) else self.lead
            attributes: dict[str, Any] = {"shape": (*lead, *self.pick([(h * w * c,), (w, h, c), (h, 1, w * c)]))}
        elif op_class is FixedTranspose:
            attributes = {"perm": (0, *self.draw(st.permutations([1, 2, 3])))}
        elif op_class is FixedSlice:
            attributes = self.pick(
                [
                    {"starts": (0,), "ends": (h,), "axes": (1,), "steps": (2,)},
                    {"starts": (w - 1, 0), "ends": (-1, c), "axes": (2, 3), "steps": (-1, 1)},
                    {"starts": (c,), "ends": (c,), "axes": (3,), "steps": (1,)},
                ]
            )
        elif op_class is FixedGather:
            indices = self.random.integers(0, w, self.pick([(), (3,), (2, 2), (0,)]))
            attributes = {"indices": Array(np.asarray(indices, np.int64)), "axis": 2}
        else:
            widths = [self.size(0, 2) for _ in range(6)]
            value = self.pick([storage.lo, storage.hi])
            attributes = {"pads": (0, *widths[:3], 0, *widths[3:]), "value": value}
        return self.emit(op_class, [x], **attributes)

    def quantize(self, x: Value | None = None) -> Value:
        """From integers to reals and back, with a float op between: an island."""
        if x is None:
            x = self.input(self.extent(), self.extent(), element=affine(self.pick(STORAGES), 0.3, 1))
        return self.quantized(self.emit(Add, [self.emit(Relu, [self.emit(Dequantize, [x])]), self.real_constant()]))

    def real_constant(self) -> Value:
        return self.constant(self.random.normal(0, 3, ()).astype(np.float32), F32)

    def quantized(self, x: Value) -> Value:
        storage = self.pick(STORAGES)
        channels = int(x.type.shape[-1])
        element = affine(storage, 0.5, storage.hi)
        if self.flag():
            element = affine(storage, self.random.uniform(0.1, 1, channels), 1, x.type.rank - 1)
        rule, rounding = self.pick(list(QuantizeRule)), self.pick(list(Rounding))
        return self.emit(Quantize, [x], elements=[element], rule=rule, rounding=rounding)

    def dequantize(self) -> Value:
        """Reals out of the program, of a type with a scale a channel."""
        channels = self.extent()
        zeros = self.random.integers(-128, 127, channels, endpoint=True)
        return self.emit(Dequantize, [self.input(channels, element=affine(S8, np.full(channels, 0.3), zeros, 1))])

    def dequantize_blocks(self) -> Value:
        """Weights of 4 bits, of which the last block may be short, and the last byte half used."""
        self.input(2)
        shape, axis, block = (self.size(0), self.size(), self.size(1, 5)), self.size(0, 2), self.size(1, 5)
        count = int(np.prod(shape))
        data = self.random.integers(0, 256, -(-count // 2)).astype(np.uint8)
        blocks = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
        scale = self.constant(self.random.uniform(0.1, 1, blocks).astype(np.float32), F32)
        attributes = {"shape": shape, "axis": axis, "block": block, "packing": self.pick(list(Packing))}
        return self.emit(DequantizeBlocks, [self.constant(data, U8), scale], **attributes)

    # A few

    def layer(self) -> Value:
        """What legalize makes of a convolution or fully connected layer, and more behind it."""
        accumulator = {"accumulator": S32, "overflow": Overflow.WRAP, "order": self.pick(list(Order))}
        acc = self.conv(**accumulator) if self.flag() else self.matmul(**accumulator)
        value = self.rescale(acc)
        for _ in range(self.size(0, 2)):
            match self.pick(["add", "transpose", "max", "requantize", "again"]):
                case "add":
                    value = self.emit(FixedAdd, [value, value], elements=[S32], overflow=Overflow.SATURATE)
                case "transpose":
                    value = self.emit(FixedTranspose, [value], perm=(0, *range(value.type.rank - 1, 0, -1)))
                case "max" if value.type.rank == 4 and value.type.sample_size:
                    value = self.emit(
                        FixedMaxPool, [value], kernel=(1, 1), strides=(1, 1), pads=(0,) * 4, dilations=(1, 1)
                    )
                case "again":
                    value = self.rescale(acc)
                case _:
                    value = self.rescale(value)
        return value

    def finish(self) -> Graph:
        """The graph with its last value, and perhaps another one, as outputs; then ranges and proved overflow modes."""
        outputs = [self.emitted[-1]]
        if self.flag():
            outputs.append(self.pick([*self.emitted, *self.builder.inputs]))
        return proved(self.builder.finish(outputs, ["y", "other"][: len(outputs)]))


def proved(graph: Graph) -> Graph:
    """The graph as a program takes it: with ranges, and without the overflow handling that they show idle."""
    return Pipeline([RangeAnalysis(), InsertSaturation()]).run(graph, PassContext())


#: What makes one op of each class, under the op's mnemonic; "layer" makes a few.
MAKERS: dict[str, Callable[[FixedMaker], Value]] = {
    "conv2d": FixedMaker.conv,
    "matmul": lambda m: m.batched_matmul() if m.flag() else m.matmul(),
    "reduce_sum": FixedMaker.reduce_sum,
    "requantize": FixedMaker.requantize,
    "quantize": FixedMaker.quantize,
    "dequantize": FixedMaker.dequantize,
    "dequantize_blocks": FixedMaker.dequantize_blocks,
    "add": lambda m: m.arithmetic(FixedAdd),
    "sub": lambda m: m.arithmetic(FixedSub),
    "mul": lambda m: m.arithmetic(FixedMul),
    "div": lambda m: m.arithmetic(FixedDiv),
    "table": FixedMaker.table,
    "softmax": FixedMaker.softmax,
    "argmax": FixedMaker.argmax,
    "max_pool2d": lambda m: m.pool(FixedMaxPool),
    "average_pool2d": lambda m: m.pool(FixedAveragePool),
    "reshape": lambda m: m.movement(FixedReshape),
    "transpose": lambda m: m.movement(FixedTranspose),
    "concat": lambda m: m.movement(FixedConcat),
    "slice": lambda m: m.movement(FixedSlice),
    "gather": lambda m: m.movement(FixedGather),
    "pad": lambda m: m.movement(FixedPad),
    "layer": FixedMaker.layer,
}


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[Graph, dict[str, Tensor]]:
    """A proved graph made by one of MAKERS, and feeds for it."""
    maker = FixedMaker(draw)
    MAKERS[kind](maker)
    graph = maker.finish()
    batch = draw(st.sampled_from(BATCHES))
    feeds: dict[str, Tensor] = {}
    for value in graph.inputs:
        storage = storage_of(value.type.element)
        assert storage is not None
        feeds[value.name] = maker.numbers(storage, value.type.concrete(batch))
    return graph, feeds
