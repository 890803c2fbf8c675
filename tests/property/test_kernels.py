"""Kernels against the interpreter, value by value, at the extremes of every type, on ties and where registers wrap."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import MAKERS, cases, proved

from qir.arrays import Array
from qir.fixed_point import FLOAT_FORMS, INT32_MAX, INT32_MIN, Overflow, RequantizeForm, Rounding, round_shift
from qir.interpreter import interpret, trace
from qir.interval import Interval
from qir.ir import Graph, Stage
from qir.ops import FIXED_OPS
from qir.ops.accumulate import STEPWISE, centre
from qir.ops.fixed_linear import Conv2d
from qir.ops.fixed_rescale import Requantize
from qir.parser import parse
from qir.printer import print_graph, resources
from qir.program import Program
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S8, S32, IntegerType, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]
Feeds = dict[str, Tensor]

_EXAMPLES = settings().max_examples // 2  # of each kind, in the profile that runs


def assert_equal(graph: Graph, feeds: Feeds) -> None:
    """The kernels give every value that the interpreter gives, in its dtype, fused or not."""
    program = Program(graph)
    expected, found = trace(graph, feeds), program.trace(feeds)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, name, strict=True)
    outputs, fused = interpret(graph, feeds), program.run_integer(feeds)
    for name, array in outputs.items():
        np.testing.assert_array_equal(fused[name], array, name, strict=True)


def test_there_is_a_maker_for_every_fixed_op() -> None:
    assert {op.mnemonic for op in FIXED_OPS} | {"layer"} == MAKERS.keys()


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(max_examples=_EXAMPLES)
def test_kernels_equal_the_interpreter(kind: str, data: st.DataObject) -> None:
    graph, feeds = data.draw(cases(kind))
    assert_equal(graph, feeds)
    assert parse(print_graph(graph), resources(graph)) == graph
    held = trace(graph, feeds, unbounded=True)
    for value in graph.values():
        array = held[value.name]
        if storage_of(value.type.element) is not None and array.size:
            assert value.range is not None
            assert value.range.lo <= array.min(), value.name
            assert value.range.hi >= array.max(), value.name


# Every kind of op, in the form that legalize gives it, has a kernel; what has none shows in the plan.

_COMMON = """
graph @common stage=fixed (%x: Nx6x6x4 x s8<0.5, zero=3>, %n: Nx3 x s4, %r: Nx2x3 x s8, %l: Nx3x2 x s8) {
  %w = const {value=s8 2x1x1x4 [1, 2, 3, 4, -5, -6, -7, 127]} : 2x1x1x4 x s8[-127, 127]<[0.5, 0.25], axis=0>
  %d = const {value=s8 4x1x2x1 [1, 2, 3, 4, -5, -6, -7, 127]} : 4x1x2x1 x s8[-127, 127]
  %m = const {value=s8 4x2 [1, 2, 3, 4, -5, -6, -7, 127]} : 4x2 x s8[-127, 127]
  %b = const {value=s32 2 [70000, -70000]} : 2 x s32
  %t = const {value=s8 16 [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]} : 16 x s8
  %conv = conv2d %x, %w, %b {accumulator=s32, overflow=wrap, order=khwc, pads=[0, 1, 1, 0], strides=[2, 1], dilations=[1, 1], groups=1} : Nx4x7x2 x s32
  %depth = conv2d %x, %d {accumulator=s32, overflow=wrap, order=khwc, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=4} : Nx6x5x4 x s32
  %dense = matmul %x, %m, %b {accumulator=s32, overflow=wrap, order=khwc} : Nx6x6x2 x s32
  %both = matmul %l, %r {accumulator=s32, overflow=wrap, order=khwc} : Nx3x3 x s32
  %sum = reduce_sum %x {accumulator=s32, overflow=wrap, order=khwc, axes=[1, 2], keepdims=true} : Nx1x1x4 x s32
  %twice = requantize %conv {multiplier=s64 2 [1073741824, 2147483647], shift=s64 2 [-8, 1], form=double_round, input_shift=0, overflow=saturate} : Nx4x7x2 x s8<1, zero=-3>
  %neon = requantize %conv {multiplier=s64 [1073741824], shift=s64 [-8], form=neon, input_shift=0, overflow=saturate} : Nx4x7x2 x s8
  %once = requantize %conv {multiplier=s64 [1073741824], shift=s64 [-8], form=single_round, input_shift=0, overflow=saturate} : Nx4x7x2 x s8
  %reduced = requantize %conv {multiplier=s64 [1073741824], shift=s64 [-8], form=reduced_16, input_shift=0, overflow=saturate} : Nx4x7x2 x s8
  %shift = requantize %conv {multiplier=s64 [1], shift=s64 [-8], form=shift, input_shift=0, rounding=half_even, overflow=saturate} : Nx4x7x2 x s8
  %single = requantize %conv {multiplier=f32 [0.01], shift=s64 [0], form=float32, input_shift=0, overflow=saturate} : Nx4x7x2 x s8
  %double = requantize %conv {multiplier=f64 [0.01], shift=s64 [0], form=double_away, input_shift=0, overflow=saturate} : Nx4x7x2 x s8
  %back = dequantize %twice : Nx4x7x2 x f32
  %again = quantize %back {rule=divide, rounding=half_away, overflow=saturate} : Nx4x7x2 x s8<0.5>
  %four = const {value=u8 3 [16, 50, 132]} : 3 x u8
  %scale = const {value=f32 3x1 [0.5, 1.0, 2.0]} : 3x1 x f32
  %blocks = dequantize_blocks %four, %scale {shape=[3, 2], axis=1, block=2, packing=low_first} : 3x2 x f32
  %add = add %x, %x {overflow=saturate} : Nx6x6x4 x s8
  %sub = sub %x, %sum {overflow=saturate} : Nx6x6x4 x s32
  %mul = mul %x, %x {overflow=saturate} : Nx6x6x4 x s32
  %div = div %x, %x {overflow=saturate, multiplier=1073741824, shift=4} : Nx6x6x4 x s8
  %table = table %n, %t : Nx3 x s8
  %softmax = softmax %x {multiplier=1374389504, left_shift=20, diff_min=-1984} : Nx6x6x4 x s8<0.00390625, zero=-128>
  %argmax = argmax %x {axis=3, keepdims=false, select_last_index=false} : Nx6x6 x s64
  %max = max_pool2d %x {kernel=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0], dilations=[1, 1]} : Nx3x3x4 x s8<0.5, zero=3>
  %mean = average_pool2d %x {kernel=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1], dilations=[1, 1], rounding=half_away} : Nx6x6x4 x s8<0.5, zero=3>
  %reshape = reshape %x {shape=[144]} : Nx144 x s8<0.5, zero=3>
  %transpose = transpose %x {perm=[0, 3, 1, 2]} : Nx4x6x6 x s8<0.5, zero=3>
  %concat = concat %x, %x {axis=3} : Nx6x6x8 x s8<0.5, zero=3>
  %slice = slice %x {starts=[1], ends=[6], axes=[1], steps=[2]} : Nx3x6x4 x s8<0.5, zero=3>
  %gather = gather %x {indices=s64 2 [3, 0], axis=3} : Nx6x6x2 x s8<0.5, zero=3>
  %pad = pad %x {pads=[0, 1, 1, 0, 0, 0, 0, 0], value=3} : Nx7x7x4 x s8<0.5, zero=3>
  return %x
}"""  # noqa: E501


def test_every_op_has_a_kernel_in_its_common_form() -> None:
    graph = proved(parse(_COMMON))
    steps = Program(graph).plan().steps
    computed = {op.mnemonic for op in graph.ops} - {"const"}
    assert computed == {op.mnemonic for op in FIXED_OPS}
    assert len(steps) == sum(op.mnemonic != "const" for op in graph.ops)
    assert not [(s.output, s.kernel) for s in steps if s.kernel in ("interpreter", "island")]
    names = {s.output: s.kernel for s in steps}
    assert (names["conv"], names["depth"], names["dense"]) == (
        "pointwise_s8s8s32",
        "depthwise_s8s8s32",
        "matmul_s8s8s32",
    )
    assert names["reshape"] == "view"
    random = np.random.default_rng(0)
    feeds = {v.name: random.integers(-8, 8, v.type.concrete(3), np.int8) for v in graph.inputs}
    assert_equal(graph, feeds)


def test_a_sum_and_the_only_requantize_that_reads_it_run_as_one() -> None:
    text = """
    graph @fused stage=fixed (%x: Nx4 x s8) {
      %w = const {value=s8 4x2 [1, 2, 3, 4, -5, -6, -7, 127]} : 4x2 x s8
      %acc = matmul %x, %w {accumulator=s32, overflow=wrap, order=khwc} : Nx2 x s32
      %y = requantize %acc {multiplier=s64 [1073741824], shift=s64 [-4], form=double_round, input_shift=0, overflow=saturate} : Nx2 x s8
      return RETURNED
    }"""  # noqa: E501
    for returned, count in (("%y", 1), ("%y, %acc", 2)):
        program = Program(proved(parse(text.replace("RETURNED", returned))))
        assert [len(s.ops) for s in program.plan().steps] == [3 - count] * count


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("add %x, %x {overflow=saturate_zero} : Nx4 x s8", "an overflow mode that is no clamp"),
    ],
)
def test_what_no_kernel_computes_is_interpreted_and_says_so(op: str, reason: str) -> None:
    graph = proved(
        parse(f"""
        graph @slow stage=fixed (%x: Nx4 x s8) {{
          %w = const {{value=s8 4x2 [127, 127, 127, 127, -127, -127, -127, 127]}} : 4x2 x s8
          %y = {op}
          return %y
        }}""")
    )
    plan = Program(graph).plan()
    assert [s.kernel for s in plan.steps] == ["interpreter"], reason
    assert "interpreter" in str(plan)
    assert_equal(graph, {"x": np.array([[-128] * 4, [127] * 4, [127, 127, -128, 127]], np.int8)})


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ("overflow=saturate", "matmul_ordered_s8s8s32+s16"),
        ("overflow=saturate, product_shift=1, product=s16, product_overflow=saturate", "matmul_ordered_s8s8s32+s16"),
        ("overflow=saturate_zero", "matmul_stepwise_s8s8s32+s16"),
        ("overflow=wrap, product_shift=-3, rounding=half_even", "matmul_stepwise_s8s8s32+s16"),
        ("overflow=saturate, product=s15, product_overflow=wrap", "matmul_stepwise_s8s8s32+s16"),
        ("overflow=wrap, product_shift=1, product=s32, product_overflow=saturate", "matmul_s8s16s32+s16"),
    ],
)
def test_what_order_a_sum_needs_is_read_from_its_steps(attributes: str, kernel: str) -> None:
    graph = proved(
        parse(f"""
        graph @sums stage=fixed (%x: Nx4 x s8) {{
          %w = const {{value=s8 4x2 [127, 127, 127, 127, -127, -127, -128, 127]}} : 4x2 x s8
          %y = matmul %x, %w {{accumulator=s16, order=khwc, {attributes}}} : Nx2 x s16
          return %y
        }}""")
    )
    assert [s.kernel for s in Program(graph).plan().steps] == [kernel]
    assert_equal(graph, {"x": np.array([[-128] * 4, [127] * 4, [127, 127, -128, 127], [0, 1, -1, 3]], np.int8)})


# Where rounding and overflow bite


def _requantized(storage: IntegerType, shift: int, form: RequantizeForm, rounding: Rounding | None) -> Graph:
    """A graph that multiplies by 2**shift."""
    builder = GraphBuilder("ties", Stage.FIXED)
    value = builder.input("x", TensorType((BATCH, 1), S32))
    is_float = form in FLOAT_FORMS
    multiplier = np.array(2.0**shift) if is_float else np.array(1 << 30)
    shifts = np.array(shift if form is RequantizeForm.SHIFT else shift + 1)
    result = builder.emit(
        Requantize,
        [value],
        elements=[storage],
        multiplier=Array(multiplier),
        shift=Array(shifts),
        form=form,
        rounding=rounding,
        overflow=Overflow.SATURATE,
    )
    return proved(builder.finish([result], ["y"]))


_FORMS: list[tuple[RequantizeForm, Rounding | None]] = [
    (f, None) for f in RequantizeForm if f is not RequantizeForm.SHIFT
]
_FORMS += [(RequantizeForm.SHIFT, r) for r in Rounding]


@pytest.mark.parametrize(("form", "rounding"), _FORMS)
@pytest.mark.parametrize("shift", [-31, -8, -1, 0, 1, 7])
def test_requantize_on_ties_and_ends(form: RequantizeForm, rounding: Rounding | None, shift: int) -> None:
    around = np.arange(-1030, 1031) << max(-shift - 2, 0)
    ends = [INT32_MIN, INT32_MIN + 1, INT32_MAX - 1, INT32_MAX, -(1 << 30), 1 << 30]
    x = np.concatenate([np.clip(around, INT32_MIN, INT32_MAX), ends]).astype(np.int32)[:, None]
    for storage in (S8, S32):
        graph = _requantized(storage, shift, form, rounding)
        kernels = [s.kernel for s in Program(graph).plan().steps]
        assert kernels == [f"requantize_{form}"]
        assert_equal(graph, {"x": x})


def _by_hand(op: Conv2d, x: Tensor, weights: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """The least and the greatest partial sum of a convolution, product by product in Python ints."""
    window, reached = op.window, [0]
    zero, zeros = int(zero_array(op.operands[0].type.element)), centre(weights.astype(np.int64), op.operands[1].type)
    outputs = window.output(x.shape[1:3])
    per_group, group_outputs = weights.shape[3], weights.shape[0] // op.groups
    for n, i, j, o in np.ndindex(len(x), *outputs, weights.shape[0]):
        total = int(bias[o]) if bias is not None and op.order.bias_first else 0
        reached.append(total)
        for r, s, c in sorted(np.ndindex(*window.kernel, per_group), key=lambda at: at[2] * op.order.channels_outside):
            y = i * op.strides[0] + r * op.dilations[0] - op.pads[0]
            z = j * op.strides[1] + s * op.dilations[1] - op.pads[1]
            if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                pixel = int(x[n, y, z, o // group_outputs * per_group + c]) - zero
                term, dropped = int(op.entering(np.array(pixel * int(zeros[o, r, s, c]), object))), op.dropped_bits
                total = round_shift((total << dropped) + term, dropped, op.rounding or Rounding.FLOOR)
                reached.append(total)
        reached.append(total + (int(bias[o]) if bias is not None and not op.order.bias_first else 0))
    return min(reached), max(reached)


@given(case=cases("conv2d"))
@settings(max_examples=_EXAMPLES)
def test_partial_sums_stay_in_what_is_proved(case: tuple[Graph, Feeds]) -> None:
    graph, feeds = case
    op = graph.producers[graph.outputs[0]]
    assert isinstance(op, Conv2d)
    assert op.partial is not None
    data = {v: a.data for v, a in graph.constants.items()}
    bias = data[op.operands[2]] if len(op.operands) > 2 else None
    lo, hi = _by_hand(op, feeds["x0"], data[op.operands[1]], bias)
    if op.overflow not in STEPWISE:  # else partial sums are those of a chain that is clamped on its way
        assert op.partial.contains(Interval(lo, hi))
    assert op.overflow is not Overflow.NONE or op.accumulator.lo <= lo <= hi <= op.accumulator.hi


def test_a_partial_sum_may_exceed_every_result() -> None:
    graph = proved(
        parse("""
        graph @swing stage=fixed (%x: Nx1x1x2 x u8[255, 255]) {
          %w = const {value=s8 1x1x1x2 [127, -127]} : 1x1x1x2 x s8
          %y = conv2d %x, %w {accumulator=s16, overflow=wrap, order=khwc, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1} : Nx1x1x1 x s16
          return %y
        }""")  # noqa: E501
    )
    op = graph.producers[graph.outputs[0]]
    assert isinstance(op, Conv2d)
    assert (op.partial, op.result.range, op.overflow) == (Interval(0, 32385), Interval(0, 0), Overflow.NONE)
    assert_equal(graph, {"x": np.full((2, 1, 1, 2), 255, np.uint8)})
