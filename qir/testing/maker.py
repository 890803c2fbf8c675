"""Graphs of single ops in formats that a contract allows, brought from stage `typed` to `fixed` as legalize does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import PassError
from qir.fixed_point import Rounding, floor_log2
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.levels import CODEBOOK_GRID, nearest_levels
from qir.ops.float_nn import Conv
from qir.pass_manager import PassContext, Pipeline
from qir.passes.accumulation import largest_sum, sum_scale
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.legalize import Legalize
from qir.passes.lowering.context import NoIntegerForm
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.widths.storage import bias_storage, default_widths, weight_storage
from qir.rewrite import GraphBuilder, map_values
from qir.target import Granularity, Scales, Scheme, Target, WeightFormat
from qir.types import (
    BATCH,
    AffineType,
    Dim,
    FixedPointType,
    IntegerType,
    QuantizedType,
    TensorType,
    affine,
    fixed_point,
    of_levels,
    scale_array,
    zero_array,
)

Tensor = npt.NDArray[Any]
Feeds = Mapping[str, Tensor]
Biases = Callable[[npt.NDArray[np.float64], int], Tensor]

#: Scales are these times a power of two where they may be real: ties show on the first, float32 rounding on the rest.
_MANTISSAS: Final = (1.0, 1.5, 1.0, 1.2345679)
_FEW: Final = 3


@dataclass(frozen=True)
class Case:
    """A proved graph at stage `fixed` and feeds for it, the most adversarial first."""

    graph: Graph
    feeds: tuple[Feeds, ...]


#: What cases are of, and what makes each; it raises NoForm where the contract has no integer form.
Cases = list[tuple[str, Callable[[], Case]]]


@dataclass(frozen=True)
class Widths:
    """Bits of the weights and of the activations, and the format of the weights."""

    weights: int
    activations: int
    format: WeightFormat = WeightFormat.UNIFORM

    def __str__(self) -> str:
        pair = f"{self.weights}x{self.activations}"
        return pair if self.format is WeightFormat.UNIFORM else f"{pair} {self.format}"


def width_pairs(target: Target) -> list[Widths]:
    """All pairs of few widths; of many, the pairs of the narrowest and the widest. The default pair is the first."""
    default = default_widths(target)
    chosen = (
        bits if len(bits) <= _FEW else (min(bits), max(bits)) for bits in (target.weights.bits, target.activations.bits)
    )
    return [Widths(w, a) for w, a in dict.fromkeys((default, *itertools.product(*chosen)))]


def format_widths(target: Target) -> list[Widths]:
    """The widest weights of each format that is not uniform, with activations of the default width."""
    activations = default_widths(target)[1]
    return [
        Widths(max(target.weights.widths(item)), activations, item)
        for item in WeightFormat
        if item is not WeightFormat.UNIFORM and target.weights.widths(item)
    ]


def _weight_storage(target: Target, widths: Widths, random: np.random.Generator) -> IntegerType:
    """The storage of weights; a codebook has the ends of its grid, what is next to 0, and others at random."""
    if widths.format is not WeightFormat.CODEBOOK:
        return weight_storage(target, widths.weights, widths.format)
    grid = np.arange(CODEBOOK_GRID.lo, CODEBOOK_GRID.hi + 1)
    levels = [CODEBOOK_GRID.lo, CODEBOOK_GRID.hi, 0, 1][: 1 << widths.weights]
    others = random.choice(np.setdiff1d(grid, levels), (1 << widths.weights) - len(levels), replace=False)
    return of_levels(sorted([*levels, *others.tolist()]))


class Maker(GraphBuilder):
    """Builds a typed graph whose formats are those of a contract, at given widths."""

    def __init__(self, target: Target, widths: Widths, random: np.random.Generator) -> None:
        super().__init__("conformance", Stage.TYPED)
        self.target = target
        self.random = random
        self.storage = target.activations.storage(widths.activations)
        self.weight_storage = _weight_storage(target, widths, random)
        self.outputs: list[Value] = []
        self._ranges: dict[Value, Interval] = {}
        self._mantissas = itertools.cycle(_MANTISSAS)
        lo, hi = self.storage.lo, self.storage.hi
        self._zeros = itertools.cycle(dict.fromkeys((hi - (hi - lo) // 3, lo, hi, (lo + hi) // 2)))

    def format(self, exponent: int, storage: IntegerType | None = None) -> QuantizedType:
        """An activation's format, whose scale lies near `2**exponent`; zero points come by turns, ends among them."""
        storage = storage or self.storage
        if self.target.activations.scales is Scales.POWER_OF_TWO:
            return fixed_point(storage, exponent)
        zero = next(self._zeros) if self.target.activations.scheme is Scheme.AFFINE else 0
        return affine(storage, np.ldexp(next(self._mantissas), exponent), zero)

    def source(self, *shape: Dim, exponent: int = 0, element: QuantizedType | None = None) -> Value:
        """An input of a batch."""
        name = f"x{len(self.inputs)}"
        return self.input(name, TensorType((BATCH, *shape), element or self.format(exponent)))

    def real_constant(self, integers: Tensor, element: QuantizedType) -> Value:
        """The reals that integers of a format stand for."""
        zero, axis = zero_array(element), element.axis
        along = [-1 if i == axis else 1 for i in range(integers.ndim)] if axis is not None else []
        scale = scale_array(element).reshape(along)
        zeros = zero.reshape(along) if zero.ndim else zero
        reals = ((integers.astype(np.float64) - zeros) * scale).astype(np.float32)
        return self.constant(Array(reals), TensorType(reals.shape, element), "k")

    def weights(self, integers: Tensor, op_class: type[Op], exponent: int = 0) -> Value:
        """Weights [O, C / groups, ...] or [K, O]; scales of channels differ by up to 8 where each may have its own.

        Integers that are no levels of the weights become those next to them.
        """
        if self.weight_storage.levels is not None:
            integers = nearest_levels(integers, self.weight_storage.levels, Rounding.HALF_AWAY)
        is_conv = op_class is Conv
        contract, axis = self.target.weights, 0 if is_conv else integers.ndim - 1
        granularity = contract.conv if is_conv else contract.matmul
        element: QuantizedType
        exponents: Any = np.asarray(exponent)
        chosen = None
        if granularity is Granularity.PER_CHANNEL:
            exponents, chosen = exponent + np.arange(integers.shape[axis]) % 4, axis
        if contract.scales is Scales.POWER_OF_TWO:
            element = fixed_point(self.weight_storage, exponents, chosen)
        else:
            ends = (self.weight_storage.lo, self.weight_storage.hi, 1)
            zero = np.resize(ends, exponents.shape) if contract.scheme is Scheme.AFFINE else 0
            element = affine(self.weight_storage, np.ldexp(1.0, exponents), zero, chosen)
        return self.real_constant(integers, element)

    def layer(
        self,
        op_class: type[Op],
        x: Value,
        integers: Tensor,
        bias: Tensor | Biases | None = None,
        *,
        right: int,
        drop: int = 0,
        is_clipped: bool = False,
        **attributes: Any,
    ) -> Value:
        """A convolution or matrix product whose output unit is `2**right` units of its coarsest sums.

        `bias` holds integers of the accumulator, cut to what a bias can be, or makes them. Where sums may keep fewer
        fraction bits, they drop `drop` of them.
        """
        weight = self.weights(integers, op_class)
        interval, steps = self._sums(x, weight, drop)
        result = self.format(int(floor_log2(steps.max(initial=0))) + right)
        operands = [x, weight]
        if bias is not None:
            chosen = bias(steps / scale_array(result), int(zero_array(result))) if callable(bias) else bias
            operands.append(self._bias(chosen, steps))
        clip = (0.0, float(scale_array(result)) * (result.storage.hi // 2 + 1)) if is_clipped else None
        return self.result(op_class, operands, result, interval=interval, clip=clip, **attributes)

    def _sums(self, x: Value, weight: Value, drop: int) -> tuple[Interval, npt.NDArray[np.float64]]:
        """A calibrated range for which sums drop so many bits, and what their units then stand for."""
        element = weight.type.element
        assert isinstance(element, AffineType | FixedPointType)
        scale, scales = float(scale_of(x)), scale_array(element)
        step = sum_scale(self.target, scale, scales, None).step
        reach = 0.75 * float(step.min(initial=np.inf if step.size else 1.0)) * largest_sum(self.target) * 2.0**drop
        interval = Interval(-reach, reach)
        return interval, np.asarray(sum_scale(self.target, scale, scales, interval).step)

    def _bias(self, integers: Tensor, steps: npt.NDArray[np.float64]) -> Value:
        storage, axis = bias_storage(self.target), 0 if steps.ndim else None
        element: QuantizedType
        if self.target.weights.scales is Scales.POWER_OF_TWO:
            element = fixed_point(storage, floor_log2(steps), axis)
        else:
            element = affine(storage, steps.astype(np.float32), 0, axis)
        return self.real_constant(np.clip(integers, storage.lo, storage.hi), element)

    def result(
        self,
        op_class: type[Op],
        operands: Sequence[Value],
        element: QuantizedType | IntegerType,
        *,
        interval: Interval | None = None,
        clip: tuple[float, ...] | None = None,
        **attributes: Any,
    ) -> Value:
        """An op whose result is an output of the graph."""
        if clip is not None:
            attributes["clip"] = clip
        value = self.emit(op_class, operands, elements=[element], name=f"y{len(self.outputs)}", **attributes)
        if interval is not None:
            self._ranges[value] = interval
        self.outputs.append(value)
        return value

    def case(self, feeds: Mapping[Value, Tensor]) -> Case:
        """The proved graph that the passes make of this one, fed with these integers, with one sample and with none.

        Raises NoForm where the contract has no integer form for an op.
        """
        typed = self.finish(self.outputs, [v.name for v in self.outputs])
        typed = map_values(typed, lambda v: {"range": self._ranges.get(v, Interval(-1.0, 1.0))})
        return Case(legalized(typed, self.target), batches({v.name: stored(q, v) for v, q in feeds.items()}))


class NoForm(Exception):
    """An op has no integer form on the target, which has no floating point either; the text says why."""


def legalized(typed: Graph, target: Target) -> Graph:
    """A typed graph as the default pipeline leaves it. Raises NoForm, and PassError for what else fails."""
    try:
        return proved(Legalize().run(typed, PassContext(target)), target)
    except PassError as fault:
        if isinstance(fault.__cause__, NoIntegerForm):
            raise NoForm(str(fault.__cause__)) from fault
        raise


def proved(graph: Graph, target: Target) -> Graph:
    """A graph at stage `fixed` with ranges, and without the overflow handling that they show idle."""
    return Pipeline([RangeAnalysis(), InsertSaturation()]).run(graph, PassContext(target))


def scale_of(value: Value) -> np.float32:
    """The scale of a value whose format is one for the whole tensor."""
    element = value.type.element
    assert isinstance(element, AffineType | FixedPointType)
    return np.float32(scale_array(element))


def exponent_of(value: Value) -> int:
    """The exponent of the largest power of two that its scale reaches."""
    return int(floor_log2(scale_of(value)))


def zero_of(value: Value) -> int:
    """Its zero point."""
    return int(zero_array(value.type.element))


def stored(integers: Tensor, value: Value) -> Tensor:
    """Integers in the dtype of a value's storage."""
    element = value.type.element
    storage = element if isinstance(element, IntegerType) else getattr(element, "storage", None)
    assert isinstance(storage, IntegerType)
    return integers.astype(storage.dtype)


def batches(feeds: Feeds) -> tuple[Feeds, ...]:
    """The feeds, then a batch of one sample, then an empty one."""
    return feeds, {k: v[:1] for k, v in feeds.items()}, {k: v[:0] for k, v in feeds.items()}
