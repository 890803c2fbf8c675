"""Random float graphs through the whole default pipeline for arm-neon.

Every stage is legal and reads back from its text, every value lies in its proved range, kernels equal the interpreter,
and the results are as near the float model as rounding lets them be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from property.float_graphs import STEPS, GraphMaker

from qir.arrays import Array
from qir.backend import load_target
from qir.fixed_point import Rounding
from qir.interpreter import evaluate_op, interpret, trace
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import QuantizeRule, dequantize_array, quantize_array
from qir.ops.float_elementwise import Add, HardSwish, LeakyRelu, Mul, PRelu, Sigmoid, Sub, Tanh
from qir.ops.float_nn import MatMul
from qir.ops.float_pool import ArgMax, AveragePool, MaxPool, ReduceMean, Softmax
from qir.ops.movement import Concat, Gather, Reshape, Transpose
from qir.parser import parse
from qir.pass_manager import Pass, PassContext, PassRecord, Verifier, integer_feeds
from qir.passes.pipelines import default_pipeline
from qir.printer import print_graph, resources
from qir.program import Program
from qir.types import is_quantized, storage_of

Tensor = npt.NDArray[Any]

TARGET = load_target("arm-neon")


class _Maker(GraphMaker):
    """Further steps, for what only the later passes treat."""

    def of_two(self, op_class: type[Op], **attributes: Any) -> None:
        """An op on two activations: this one, and an earlier one of its shape or itself."""
        partners = [v for v in self.earlier if v.type == self.value.type]
        self.emit(op_class, self.value, partners[self.random.integers(len(partners))], **attributes)

    def gate(self) -> None:
        """Squeeze and excite: each channel times a number between 0 and 1 that its mean gives."""
        x = self.value
        self.emit(ReduceMean, x, axes=(2, 3), keepdims=True)
        self.conv(bias=True)
        self.emit(Sigmoid, self.value)
        if self.value.type.shape[1] == x.type.shape[1]:
            self.emit(Mul, x, self.value)
        else:
            self.value = x

    def attention(self) -> None:
        """The pixels, weighted by how alike their channels are."""
        c, h, w = self.sizes
        self.emit(Reshape, self.value, shape=(c, h * w))
        rows = self.value
        self.emit(Transpose, rows, perm=(0, 2, 1))
        self.emit(MatMul, rows, self.value)
        self.emit(Softmax, self.value, axis=2)
        self.emit(MatMul, self.value, rows)
        self.emit(Reshape, self.value, shape=(c, h, w))

    def slopes(self) -> None:
        self.emit(PRelu, self.value, self.constant(self.channels, 1, 1, low=-0.5, high=0.9))

    def gather(self) -> None:
        chosen = self.random.integers(0, self.channels, self.random.integers(1, 4))
        self.emit(Gather, self.value, indices=Array(chosen.astype(np.int64)), axis=1)

    def average(self) -> None:
        counted = bool(self.random.integers(2))
        window: dict[str, Any] = {"kernel": (2, 2), "strides": (1, 1), "pads": (0, 1, 1, 0), "dilations": (1, 1)}
        self.emit(AveragePool, self.value, count_include_pad=counted, **window)

    def strided_pool(self) -> None:
        if min(self.sizes[1:]) > 1:
            self.emit(MaxPool, self.value, kernel=(2, 2), strides=(2, 2), pads=(0,) * 4, dilations=(1, 1))

    def finish(self, second: int) -> Graph:
        """As the base does; with every other seed also the greatest channel of the last map, an integer."""
        outputs, names = [self.value, self.earlier[second % len(self.earlier)]], ["y", "other"]
        if second % 2:
            outputs.append(self.builder.emit(ArgMax, [self.value], axis=1, keepdims=False))
            names.append("index")
        return self.builder.finish(outputs, names)


MORE_STEPS: dict[str, Callable[[_Maker], None]] = {
    "average": _Maker.average,
    "attention": _Maker.attention,
    "concat": lambda m: m.of_two(Concat, axis=1),
    "difference": lambda m: m.of_two(Sub),
    "gate": _Maker.gate,
    "gather": _Maker.gather,
    "leaky relu": lambda m: m.emit(LeakyRelu, m.value, alpha=0.1),
    "product": lambda m: m.of_two(Mul),
    "sigmoid": lambda m: m.emit(Sigmoid, m.value),
    "slopes": _Maker.slopes,
    "softmax": lambda m: m.emit(Softmax, m.value, axis=int(m.random.integers(1, 4))),
    "strided pool": _Maker.strided_pool,
    "sum": lambda m: m.of_two(Add, clip=(0.0, 6.0)),
    "swish": lambda m: m.emit(HardSwish, m.value),
    "tanh": lambda m: m.emit(Tanh, m.value),
}


@dataclass(frozen=True)
class Case:
    """A float graph, what calibrates it, and a batch of the same distribution."""

    graph: Graph
    calibration: Tensor
    x: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A graph of up to eight steps, with a classifier behind it or not."""
    maker = _Maker(draw(st.integers(0, 2**32 - 1)))
    steps: dict[str, Callable[[Any], None]] = {**STEPS, **MORE_STEPS}
    for step in draw(st.lists(st.sampled_from(sorted(steps)), min_size=1, max_size=8)):
        steps[step](maker)
    if draw(st.booleans()):
        maker.head()
    calibration = maker.random.uniform(-2, 2, (8, 2, 6, 5)).astype(np.float32)
    return Case(maker.finish(draw(st.integers(0, 40))), calibration, calibration[:2])


class Keep:
    """Keeps the graph of every stage, each read back from its own text."""

    def __init__(self) -> None:
        self.last: dict[Stage, Graph] = {}

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        again = parse(print_graph(record.after), resources(record.after))
        assert again == record.after, record.name
        self.last[record.after.stage] = again


def lower(case: Case) -> dict[Stage, Graph]:
    """The last graph of every stage, from the whole pipeline with its verifier."""
    keep = Keep()
    default_pipeline().run(case.graph, PassContext(TARGET, [{"x": case.calibration}]), [Verifier(), keep])
    return keep.last


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_values_lie_in_their_proved_ranges_and_kernels_equal_the_interpreter(case: Case, seed: int) -> None:
    fixed = lower(case)[Stage.FIXED]
    assert not any(op.is_float and not isinstance(op, Const) for op in fixed.ops)
    program = Program(fixed)
    (source,) = fixed.inputs
    storage = storage_of(source.type.element)
    assert storage is not None
    rng = np.random.default_rng(seed)
    real = integer_feeds(fixed, {"x": case.x})["x"]
    anything = rng.integers(storage.lo, storage.hi + 1, real.shape)
    ends = rng.choice([storage.lo, storage.hi], real.shape)
    feeds = {"x": np.concatenate([real, anything, ends]).astype(storage.dtype)}

    expected, found = trace(fixed, feeds), program.trace(feeds)
    for value in fixed.values():
        np.testing.assert_array_equal(found[value.name], expected[value.name], value.name, strict=True)
        assert value.range is not None
        if expected[value.name].size:
            assert value.range.lo <= int(expected[value.name].min()), value.name
            assert value.range.hi >= int(expected[value.name].max()), value.name
    integers = program.run_integer(feeds)
    reals = program.run({"x": case.x})
    for name, value in zip(fixed.output_names, fixed.outputs, strict=True):
        np.testing.assert_array_equal(integers[name], expected[value.name], name, strict=True)
        first = integers[name][: len(case.x)]
        expected_real = dequantize_array(first, value.type.element) if is_quantized(value.type.element) else first
        np.testing.assert_array_equal(reals[name], expected_real, name, strict=True)


#: Steps of its grid by which the noise of a trial moves a value. An integer op is off by the half step of its rounding
#: and, where its algorithm approximates, by one or two more.
NOISE = 1.5
TRIALS = 8
#: The largest error that integers may make over the largest of the trials: these are random, not the worst case.
FACTOR = 2


def noisy_outputs(typed: Graph, x: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """The typed graph with every value moved by up to `NOISE` steps, then put on its grid."""
    found: dict[Value, Tensor] = {typed.inputs[0]: x}
    for value in typed.inputs:
        found[value] = on_grid(value, found[value])
    for op in typed.ops:
        for value, array in zip(op.results, evaluate_op(op, [found[v] for v in op.operands]), strict=True):
            if is_quantized(value.type.element) and not isinstance(op, Const):
                step = np.float32(value.type.element.scale.data)  # type: ignore[union-attr]
                array = array + rng.uniform(-NOISE, NOISE, array.shape).astype(np.float32) * step
            found[value] = on_grid(value, array)
    return {name: found[value] for name, value in zip(typed.output_names, typed.outputs, strict=True)}


def on_grid(value: Value, array: Tensor) -> Tensor:
    """Reals rounded and clamped to the grid of a value's type."""
    element = value.type.element
    if not is_quantized(element):
        return array
    return dequantize_array(quantize_array(array, element, QuantizeRule.DIVIDE, Rounding.HALF_AWAY), element)


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_integers_stray_from_the_float_model_no_further_than_rounding_takes_them(case: Case, seed: int) -> None:
    stages = lower(case)
    typed, program = stages[Stage.TYPED], Program(stages[Stage.FIXED])
    real, found = interpret(case.graph, {"x": case.x}), program.run({"x": case.x})
    rng = np.random.default_rng(seed)
    trials = [noisy_outputs(typed, case.x, rng) for _ in range(TRIALS)]
    for name, value in zip(typed.output_names, typed.outputs, strict=True):
        if not is_quantized(value.type.element):
            continue
        step = float(np.max(value.type.element.scale.data))  # type: ignore[union-attr]
        noise = max(float(np.abs(trial[name] - real[name]).max(initial=0)) for trial in trials)
        error = float(np.abs(found[name] - real[name]).max(initial=0))
        assert error <= FACTOR * noise + step, name
