"""Vectors for changes of scale: boundaries between outputs, both ends, left shifts; two operands at all edges."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.ir import Graph, Op, Stage, Value
from qir.ops.float_elementwise import Add, Clip, Div, Mul, Relu, Sub
from qir.passes.lowering.context import Lowering
from qir.target import ProductRule, Scales, SumRule, Target
from qir.testing.maker import Case, Cases, Maker, Widths, batches, exponent_of, proved, scale_of, stored, zero_of
from qir.testing.numbers import boundaries, columns, edges, every_value, in_rows, pairs, steps_of_outputs
from qir.types import BATCH, S32, IntegerType, QuantizedType, TensorType, integer, scale_array, zero_array

Tensor = npt.NDArray[Any]
New = Callable[[], Maker]

_STEPS: Final = 90
_COLUMNS: Final = 5
#: Exponents of the scales of both operands, and of the result over what would just hold it.
_EXPONENTS: Final = ((0, 0, 0), (0, 3, 2), (-5, 1, 0), (0, -9, -1), (1, 1, -2))


def requantize_cases(target: Target, widths: Widths, random: np.random.Generator) -> Cases:
    """Accumulators around every boundary between two outputs, for each kind of op that has a formula of its own."""
    bits = target.accumulator.bits
    register = integer(bits if isinstance(bits, int) else S32.bits)
    product = S32 if 2 * widths.activations <= S32.bits else integer(64)
    sources = {"conv": register, "matmul": register, "mean": register, "mul": product, "add": S32}
    if target.addition.rule in (SumRule.FLOAT32, SumRule.MULTIPLIERS):
        del sources["add"]  # nothing is requantized
    if target.multiplication.rule is ProductRule.FLOAT32:
        del sources["mul"]
    return [
        (f"behind {kind}", partial(_requantized, target, widths, random, kind, source))
        for kind, source in sources.items()
    ]


def _requantized(target: Target, widths: Widths, random: np.random.Generator, kind: str, source: IntegerType) -> Case:
    """One formula over shifts from far right to left: a channel each where channels have factors of their own."""
    maker = Maker(target, widths, random)
    lowering = Lowering(Graph("requantize", Stage.TYPED, (), (), (), ()), target)
    element = maker.format(0)
    unit = float(scale_array(element))
    clipped = element.with_storage(element.storage.narrowed(min(0, element.storage.hi), element.storage.hi))
    deepest = max(source.bits - maker.storage.bits + 2, 5)
    exponents = np.array(sorted({*range(-deepest, 4, 1 + deepest // 12), -1, 0, 1}))
    count = 3 if kind == "mean" and target.weights.scales is Scales.REAL else 1
    outputs: list[Value] = []
    feeds: dict[str, Tensor] = {}
    for group in [exponents] if kind == "conv" else np.split(exponents, exponents.size):
        x = lowering.input(f"x{len(feeds)}", TensorType((BATCH, group.size), source))
        factors = _scales(maker, group, unit)
        given = factors if kind == "conv" else np.float32(factors[0])
        scales = [given] if kind in ("mean", "add") else [np.float32(1), given]
        for final in (element, clipped):
            factor = lowering.factor(kind, scales, final, count)
            name = f"y{len(outputs)}"
            outputs.append(lowering.requantize(x, factor, final, kind=kind, name=name, location=""))
        feeds[x.name] = stored(_around(maker, factors / (unit * count), element, source), x)
    rows = max(len(f) for f in feeds.values())
    whole = {k: np.resize(v, (rows, v.shape[1])) for k, v in feeds.items()}
    graph = lowering.finish(outputs, [v.name for v in outputs], target=target.name)
    return Case(proved(graph, target), batches(whole))


def _scales(maker: Maker, exponents: Tensor, unit: float) -> npt.NDArray[np.float32]:
    """Scales that make factors of these powers of two; where scales are real, of every other one a little less."""
    exact = np.ldexp(unit, exponents)
    if maker.target.weights.scales is Scales.POWER_OF_TWO:
        return exact.astype(np.float32)
    less = np.where(np.arange(exponents.size) % 2, 1.0, maker.random.uniform(0.6, 1.0, exponents.size))
    return (exact * less).astype(np.float32)


def _around(maker: Maker, ratios: Tensor, element: QuantizedType, source: IntegerType) -> Tensor:
    """A column of integers for each factor: its boundaries and the edges of the source."""
    zero = int(zero_array(element))
    steps = steps_of_outputs(element.storage, maker.random, _STEPS)
    near = [boundaries(Fraction(float(r)), steps, zero, source) for r in ratios]
    return columns([np.concatenate([edges(source, 0, maker.random), n]) for n in near])


def arithmetic_cases(target: Target, widths: Widths, random: np.random.Generator) -> Cases:
    """Add, Sub, Mul and Div of two inputs at all pairs of edges, and with a constant for each channel."""

    def new() -> Maker:
        return Maker(target, widths, random)

    cases: Cases = []
    for kind in (Add, Sub, Mul, Div):
        name = kind.mnemonic
        cases += [(f"{name} at 2 to {scales}", partial(_of_two, new, kind, scales)) for scales in _EXPONENTS]
        cases.append((f"{name} with a constant", partial(_with_constant, new, kind)))
    return cases


def _of_two(new: New, op_class: type[Op], exponents: tuple[int, int, int]) -> Case:
    maker = new()
    a, b = (maker.source(_COLUMNS, exponent=e) for e in exponents[:2])
    for operands in ((a, b), (b, a)):
        result = maker.format(_natural(op_class, maker, *operands) + exponents[2])
        clip = (0.0, float(scale_array(result)) * (result.storage.hi // 2 + 1)) if operands[0] is b else None
        maker.result(op_class, operands, result, clip=clip)
    left, right = pairs(*(edges(maker.storage, zero_of(v), maker.random, 10) for v in (a, b)))
    return maker.case({a: in_rows(left, _COLUMNS), b: in_rows(right, _COLUMNS)})


def _natural(op_class: type[Op], maker: Maker, a: Value, b: Value) -> int:
    """The exponent of an output scale that results fill."""
    first, second = exponent_of(a), exponent_of(b)
    if op_class is Mul:
        return first + second + maker.storage.bits - 2
    return first - second - maker.storage.bits + 3 if op_class is Div else max(first, second)


def _with_constant(new: New, op_class: type[Op]) -> Case:
    maker = new()
    x, element = maker.source(3, 4, 5), maker.format(0)
    ends = [maker.storage.lo, int(zero_array(element)) + 1, maker.storage.hi]
    values = np.clip(np.array(ends), maker.storage.lo, maker.storage.hi)
    constant = maker.real_constant(values.reshape(3, 1, 1), element)
    for operands in ((x, constant), (constant, x)):
        maker.result(op_class, operands, maker.format(_natural(op_class, maker, *operands)))
    return maker.case({x: in_rows(edges(maker.storage, zero_of(x), maker.random, 100), 60).reshape(-1, 3, 4, 5)})


def activation_cases(target: Target, widths: Widths, random: np.random.Generator) -> Cases:
    """Relu and Clip that stand alone, over every value: changes of scale without a sum before them."""

    def case() -> Case:
        maker = Maker(target, widths, random)
        x = maker.source(_COLUMNS)
        reach = float(scale_of(x)) * max(maker.storage.hi, 1) / 2
        for change in range(-4, 6):
            maker.result(Relu, [x], maker.format(exponent_of(x) + change))
            maker.result(Clip, [x], maker.format(exponent_of(x) + change), minimum=-reach / 2, maximum=reach)
        return maker.case({x: in_rows(every_value(maker.storage), _COLUMNS)})

    return [("Relu and Clip", case)]
