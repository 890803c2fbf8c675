"""Whole layers of the fixed-point targets, as the contract writes them, against the ITU operators and ap_fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx_models import model, random
from oracle.ap_fixed import ApFixed, FixedType, dense
from oracle.test_itu import dot_operands, vectors

import qir
from qir.arrays import Array
from qir.backend import load_target
from qir.fixed_point import Overflow, Rounding
from qir.interpreter import interpret
from qir.ir import Graph, Stage
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_linear import Conv2d
from qir.ops.fixed_rescale import Requantize
from qir.pass_manager import PassContext
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.lowering.context import Lowering
from qir.passes.lowering.factors import Factor
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program
from qir.types import BATCH, S16, S32, FixedPointType, TensorType, fixed_point, storage_of

Tensor = npt.NDArray[Any]


def itu_layer(target: str, left: Tensor) -> Graph:
    """One output for each row of the vectors: a convolution of as many groups, by the contract of a target.

    `left` is the L_shl of each output before its round_fx.
    """
    x, w, bias = dot_operands()
    count, depth = x.shape
    b = Lowering(Graph("layer", Stage.TYPED, (), (), (), ()), load_target(target))
    q15 = fixed_point(S16, -15)
    value = b.input("x", TensorType((BATCH, 1, 1, count * depth), q15))
    weight = b.constant(Array(w.astype(np.int16).reshape(count, 1, 1, depth)), TensorType((count, 1, 1, depth), q15))
    start = b.constant(Array(bias.astype(np.int32)), TensorType((count,), S32))
    shift = b.target.product.shift
    window: dict[str, Any] = {"pads": (0, 0, 0, 0), "strides": (1, 1), "dilations": (1, 1), "groups": count}
    total = b.sum_of(Conv2d, [value, weight, start], shift, name="acc", location="", **window)
    factor = Factor(np.ones(count, np.int64), left.astype(np.int64) - 16)
    result = b.requantize(total, factor, q15, kind="conv", name="y", location="")
    context = PassContext()
    return InsertSaturation().run(RangeAnalysis().run(b.finish([total, result], ["acc", "y"]), context), context)


@pytest.mark.parametrize(
    ("target", "acc", "out", "kernel"),
    [
        ("dsp16", "dot_acc", "dot_out", "conv2d_ordered_s16s16s32"),
        ("dsp16-acc40", "dot40_acc", "dot40_out", "pointwise_s16s64s64+requantize_shift"),
    ],
)
def test_layers_of_the_dsp_are_those_of_the_itu_operators(target: str, acc: str, out: str, kernel: str) -> None:
    """The vectors shift before rounding on the 32-bit accumulator only."""
    v = vectors()
    left = v["dot_shift"] if target == "dsp16" else np.zeros_like(v["dot_shift"])
    graph = itu_layer(target, left)
    program = Program(graph)
    assert kernel in {step.kernel for step in program.plan().steps}
    feeds = {"x": v["dot_x"].reshape(1, 1, 1, -1)}
    for found in (interpret(graph, feeds), interpret(graph, feeds, unbounded=True), program.run_integer(feeds)):
        assert int((found["acc"].reshape(-1) != v[acc]).sum()) == 0
        assert int((found["y"].reshape(-1) != v[out]).sum()) == 0


# ap_fixed

_DEPTH, _COLUMNS = 24, 6
_ROUNDINGS = [
    (Rounding.FLOOR, Overflow.SATURATE_SYMMETRIC, Rounding.HALF_EVEN),
    (Rounding.HALF_EVEN, Overflow.WRAP, Rounding.FLOOR),
    (Rounding.HALF_UP, Overflow.SATURATE, Rounding.HALF_AWAY),
    (Rounding.TOWARD_ZERO, Overflow.SATURATE_ZERO, Rounding.HALF_UP),
    (Rounding.HALF_AWAY, Overflow.SATURATE, Rounding.TOWARD_ZERO),
    (Rounding.HALF_DOWN, Overflow.WRAP, Rounding.HALF_TOWARD_ZERO),
    (Rounding.HALF_TOWARD_ZERO, Overflow.SATURATE, Rounding.HALF_DOWN),
]
_CONTRACTS = {
    "fpga": "",
    "fpga, 12 x 5 bits": "[activations]\ndefault = 12\n[weights]\ndefault = 5\n",
    **{
        f"asic, {bits} bits, {step}, {mode}, products cast: {casts}": (
            f'[accumulator]\nbits = {bits}\noverflow = "{mode}"\nrounding = "{step}"\n'
            f'[requantization]\nrounding = "{out}"\noverflow = "{mode}"\n'
            + ('[product]\nbits = "accumulator"\n' if casts else "")
        )
        for bits in (11, 14)
        for step, mode, out in _ROUNDINGS
        for casts in (False, True)
    },
}


def compiled_layer(name: str, folder: Path) -> Graph:
    """A dense layer of a model, compiled for a contract of the user's own that inherits from a shipped one."""
    parent = name.split(",")[0]
    path = folder / "target.toml"
    path.write_text(
        f'name = "own"\ndescription = "{name}"\ninherits = "{parent}"\n'
        f'{_CONTRACTS[name]}{"" if "[weights]" in _CONTRACTS[name] else "[weights]"}\nmatmul = "per_tensor"\n'
    )
    text = f"g (float[N, {_DEPTH}] x) => (float[N, {_COLUMNS}] y) {{ y = Gemm(x, w, b) }}"
    weights = random(_DEPTH, _COLUMNS, seed=1)
    graph = qir.import_onnx(model(text, w=weights, b=random(_COLUMNS, seed=2)))
    return qir.compile(graph, path, [{"x": random(64, _DEPTH, seed=3)}]).graph


def _point(kind: qir.TensorType) -> int:
    assert isinstance(kind.element, FixedPointType)
    return int(kind.element.exponent.data)


def cpp_layer(graph: Graph, target: qir.Target, ap_fixed: ApFixed, x: Tensor) -> Tensor:
    """The same layer in C++: its types are read off the program."""
    total, requantize = (next(op for op in graph.ops if isinstance(op, kind)) for kind in (Accumulating, Requantize))
    assert isinstance(total, Accumulating)
    assert isinstance(requantize, Requantize)
    operand, weight, bias = total.operands
    points = _point(operand.type), _point(weight.type)
    point = sum(points) - total.shift  # the sum has as many fraction bits less as it drops
    out = storage_of(requantize.result.type.element)
    stored = storage_of(operand.type.element), storage_of(weight.type.element), storage_of(bias.type.element)
    assert out is not None
    assert all(s is not None for s in stored)
    x_bits, w_bits, bias_bits = (s.bits for s in stored if s is not None)
    acc_overflow, acc_rounding = target.accumulator.overflow, total.rounding or Rounding.FLOOR
    layer = dense(
        FixedType(x_bits, x_bits + points[0]),
        FixedType(w_bits, w_bits + points[1]),
        FixedType(bias_bits, bias_bits + point),
        FixedType(total.accumulator.bits, total.accumulator.bits + point, True, acc_rounding, acc_overflow),
        FixedType(
            out.bits,
            out.bits + _point(requantize.result.type),
            True,
            target.requantization.rounding or Rounding.FLOOR,
            target.requantization.overflow,
        ),
        cast_products=total.product is not None,
    )
    data = [graph.constants[v].data.astype(np.int64) for v in (weight, bias)]
    return ap_fixed.dense(layer, x.astype(np.int64), *data)


@pytest.mark.parametrize("name", _CONTRACTS)
def test_dense_layers_are_those_of_the_ap_fixed_headers(name: str, ap_fixed: ApFixed, tmp_path: Path) -> None:
    """Compiled for a contract, on inputs at both extremes, alternating and random: every output bit."""
    graph = compiled_layer(name, tmp_path)
    storage = storage_of(graph.inputs[0].type.element)
    assert storage is not None
    rng = np.random.default_rng(5)
    rows = [np.full(_DEPTH, storage.lo), np.full(_DEPTH, storage.hi), np.resize([storage.lo, storage.hi], _DEPTH)]
    signs = np.sign(graph.constants[graph.ops[0].result].data.astype(np.int64)).T
    rows += [np.where(s > 0, storage.hi, storage.lo) for sign in signs for s in (sign, -sign)]
    x = np.concatenate([rows, rng.integers(storage.lo, storage.hi, (2000, _DEPTH), endpoint=True)])
    total = next(op for op in graph.ops if isinstance(op, Accumulating))
    assert total.partial is not None
    if name.startswith("asic"):  # steps do drop bits, and sums do leave the accumulator
        assert total.shift < 0
        assert total.partial.hi > total.accumulator.hi
    expected = cpp_layer(graph, load_target(tmp_path / "target.toml"), ap_fixed, x)
    for found in (interpret(graph, {"x": x})["y"], Program(graph).run_integer({"x": x})["y"]):
        assert int((found != expected).sum()) == 0
