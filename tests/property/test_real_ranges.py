"""Float results lie inside the interval that the op derives from the intervals of its operands."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qir.interval import Interval
from qir.ir import Op, as_float32
from qir.ops.float_elementwise import (
    Add,
    Cast,
    Clip,
    HardSigmoid,
    HardSwish,
    LeakyRelu,
    Mul,
    PRelu,
    Relu,
    Sigmoid,
    Sub,
    Tanh,
)
from qir.ops.float_pool import ArgMax, AveragePool, MaxPool, ReduceMean, Softmax
from qir.rewrite import GraphBuilder
from qir.types import S8, TensorType

SHAPE = (2, 3, 5, 5)
WINDOW: dict[str, Any] = {"strides": (1, 1), "dilations": (1, 1), "kernel": (3, 3)}

numbers = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, -3.0, 3.0, -1.5, 1.0, -1.0, 6.0, as_float32(0.1), 1e-40, -1e-40, 1e-44]).map(as_float32),
)
intervals = st.tuples(numbers, numbers).map(lambda ends: Interval(min(ends), max(ends)))


def _op(op_class: type[Op], operands: int, **attributes: Any) -> Op:
    builder = GraphBuilder("one")
    values = [builder.input(f"x{i}", TensorType(SHAPE)) for i in range(operands)]
    builder.emit(op_class, values, **attributes)
    return builder.ops[0]


OPS = [
    _op(Add, 2),
    _op(Add, 2, clip=(0.0, 6.0)),
    _op(Add, 2, clip=(0.0, math.inf)),
    _op(Sub, 2),
    _op(Mul, 2),
    _op(Mul, 2, clip=(-1.0, 1.0)),
    _op(Relu, 1),
    _op(Clip, 1, minimum=-1.0, maximum=6.0),
    _op(Clip, 1, minimum=2.0, maximum=1.0),
    _op(LeakyRelu, 1, alpha=0.01),
    _op(LeakyRelu, 1, alpha=-0.5),
    _op(PRelu, 2),
    _op(HardSwish, 1),
    _op(HardSigmoid, 1, alpha=0.2, beta=0.5),
    _op(Sigmoid, 1),
    _op(Tanh, 1),
    _op(Softmax, 1, axis=1),
    _op(ArgMax, 1, axis=1, keepdims=True),
    _op(ReduceMean, 1, axes=(2, 3), keepdims=False),
    _op(MaxPool, 1, pads=(1, 1, 1, 1), **WINDOW),
    _op(AveragePool, 1, pads=(1, 1, 1, 1), **WINDOW),
    _op(AveragePool, 1, pads=(1, 1, 1, 1), count_include_pad=True, **WINDOW),
    _op(Cast, 1, to=S8),
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.mnemonic}-{OPS.index(op)}")
@given(st.data())
def test_results_lie_in_the_range(op: Op, data: st.DataObject) -> None:
    given_ranges = [data.draw(intervals) for _ in op.operands]
    found = op.real_range(given_ranges)
    assert found is not None
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = []
    for interval in given_ranges:
        inside = rng.uniform(interval.lo, interval.hi, SHAPE).astype(np.float32)
        ends = rng.choice(np.array([interval.lo, interval.hi, inside[0, 0, 0, 0]], np.float32), SHAPE)
        kind = data.draw(st.sampled_from(["inside", "ends", "lo", "hi"]))
        chosen = {"inside": inside, "ends": ends, "lo": np.full(SHAPE, interval.lo), "hi": np.full(SHAPE, interval.hi)}
        arrays.append(np.clip(chosen[kind].astype(np.float32), np.float32(interval.lo), np.float32(interval.hi)))
    (result,) = op.eval_float(*arrays)  # type: ignore[attr-defined]
    assert found[0].lo <= float(result.min())
    assert float(result.max()) <= found[0].hi


def test_a_bound_of_zero_stays_zero() -> None:
    positive = Interval(0.0, 2.0)
    for op in OPS:
        if op.mnemonic in ("Add", "Mul", "Relu", "AveragePool", "MaxPool", "ReduceMean", "HardSwish", "PRelu"):
            found = op.real_range([positive] * len(op.operands))
            assert found is not None
            assert found[0].lo >= 0, op.mnemonic


def test_an_infinite_range_is_no_range() -> None:
    huge = Interval(-3e38, 3e38)
    assert _op(Add, 2).real_range([huge, huge]) is None
    assert _op(Mul, 2).real_range([huge, huge]) is None
    assert _op(Add, 2, clip=(0.0, 6.0)).real_range([huge, huge]) == (Interval(0.0, 6.0),)
