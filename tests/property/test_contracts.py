"""Random float graphs on every target that ships and on random contracts.

Each compiles and is legal after every pass, or its op is refused by name; every value lies in its proved range; kernels
equal the interpreter. On the targets that ship the results are as near the float model as rounding lets them be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.contracts import contract
from property.test_pipeline import FACTOR, NOISE, TRIALS, Case, Keep, cases, on_grid

from qir.backend import load_target, shipped_backends
from qir.errors import PassError
from qir.interpreter import evaluate_op, interpret, trace
from qir.ir import Graph, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_elementwise import HardSigmoid, HardSwish, LeakyRelu, PRelu, Sigmoid, Tanh
from qir.ops.float_pool import Softmax
from qir.pass_manager import PassContext, Verifier, integer_feeds
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.pipelines import default_pipeline
from qir.program import Program
from qir.target import FunctionRule, Target, WeightFormat
from qir.target_file import parse_target
from qir.types import AffineType, FixedPointType, FloatType, is_quantized, scale_array, storage_of

Tensor = npt.NDArray[Any]

FUNCTIONS = Sigmoid | Tanh | HardSwish | LeakyRelu | PRelu


def lower(case: Case, target: Target, override: tuple[str, ...] = ()) -> dict[Stage, Graph]:
    """The last graph of every stage, from the whole pipeline with its verifier."""
    keep = Keep()
    pipeline = default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=override))
    pipeline.run(case.graph, PassContext(target, [{"x": case.calibration}]), [Verifier(), keep])
    return keep.last


def check_kernels(fixed: Graph, x: Tensor, seed: int) -> Program:
    """The program, once its values are the interpreter's and in their ranges: on data, on anything, on the ends."""
    program = Program(fixed)
    (source,) = fixed.inputs
    storage = storage_of(source.type.element)
    assert storage is not None
    rng = np.random.default_rng(seed)
    real = integer_feeds(fixed, {"x": x})["x"]
    anything = rng.integers(storage.lo, storage.hi + 1, real.shape)
    ends = rng.choice([storage.lo, storage.hi], real.shape)
    feeds = {"x": np.concatenate([real, anything, ends]).astype(storage.dtype)}
    expected, found = trace(fixed, feeds), program.trace(feeds)
    for value in fixed.values():
        np.testing.assert_array_equal(found[value.name], expected[value.name], value.name, strict=True)
        if isinstance(value.type.element, FloatType):
            continue  # of an island
        assert value.range is not None
        if expected[value.name].size:
            assert value.range.lo <= int(expected[value.name].min()), value.name
            assert value.range.hi >= int(expected[value.name].max()), value.name
    integers = program.run_integer(feeds)
    for name, value in zip(fixed.output_names, fixed.outputs, strict=True):
        np.testing.assert_array_equal(integers[name], expected[value.name], name, strict=True)
    return program


def noisy_outputs(typed: Graph, target: Target, x: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """The typed graph with every value moved by up to `NOISE` steps, and the operand of a table by up to an index."""

    def moved(value: Value, array: Tensor, steps: float) -> Tensor:
        # Rounding down moves all elements one way.
        noise = rng.choice([-steps, steps]) if rng.integers(2) else rng.uniform(-steps, steps, array.shape)
        return np.asarray(array + noise * step_of(value), np.float32)

    found: dict[Value, Tensor] = {v: on_grid(v, x) for v in typed.inputs}
    for op in typed.ops:
        operands = [found[v] for v in op.operands]
        if isinstance(op, HardSigmoid) or (isinstance(op, FUNCTIONS) and target.functions.rule is FunctionRule.REAL):
            storage = storage_of(op.operands[0].type.element)
            assert storage is not None
            dropped = max(storage.bits - target.functions.index_bits, 0)
            operands[0] = moved(op.operands[0], operands[0], 2**dropped - 1)
        for value, array in zip(op.results, evaluate_op(op, operands), strict=True):
            is_computed = is_quantized(value.type.element) and not isinstance(op, Const)
            found[value] = on_grid(value, moved(value, array, NOISE) if is_computed else array)
    return {name: found[value] for name, value in zip(typed.output_names, typed.outputs, strict=True)}


def step_of(value: Value) -> float:
    """The scale of a value, or the largest of its scales."""
    element = value.type.element
    assert isinstance(element, AffineType | FixedPointType)
    return float(np.max(scale_array(element)))


@settings(max_examples=settings().max_examples // 4)
@pytest.mark.parametrize("name", shipped_backends())
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_every_target_that_ships(name: str, case: Case, seed: int) -> None:
    target = load_target(name)
    softmax = next((op for op in case.graph.ops if isinstance(op, Softmax)), None)
    if softmax is not None and target.functions.rule is FunctionRule.REAL and not target.floating_point:
        with pytest.raises(
            PassError, match=f"Softmax .* has no integer form on {name}: the target has no integer softm"
        ):
            lower(case, target)
        return
    stages = lower(case, target)
    typed = stages[Stage.TYPED]
    program = check_kernels(stages[Stage.FIXED], case.x, seed)
    real, found = interpret(case.graph, {"x": case.x}), program.run({"x": case.x})
    rng = np.random.default_rng(seed)
    trials = [noisy_outputs(typed, target, case.x, rng) for _ in range(TRIALS)]
    for output, value in zip(typed.output_names, typed.outputs, strict=True):
        if is_quantized(value.type.element):
            noise = max(float(np.abs(trial[output] - real[output]).max(initial=0)) for trial in trials)
            error = float(np.abs(found[output] - real[output]).max(initial=0))
            assert error <= FACTOR * noise + step_of(value), output


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_every_contract(case: Case, seed: int) -> None:
    target, stages, refusal = contract(seed), dict[Stage, Graph](), ""
    assert parse_target(str(target)) == target
    widths = [f"*:w{bits}/{item}" for item in WeightFormat for bits in target.weights.widths(item)]
    try:
        stages = lower(case, target, (widths[seed % len(widths)],))
    except PassError as fault:
        refusal = str(fault)
    if "matches no result" in refusal:  # nothing is left of the graph that has weights
        stages, refusal = lower(case, target), ""
    if refusal:
        assert not target.floating_point, refusal
        assert "has no integer form on random" in refusal
    else:
        check_kernels(stages[Stage.FIXED], case.x, seed)
