"""Proved bounds: sound, and for a single layer attained by the worst input of each channel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from certified import certificate, faults_of
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import MAKERS, cases
from property.recorder import check_soundness

from qir.arrays import Array
from qir.fixed_point import FLOAT_FORMS, Overflow, RequantizeForm, Rounding
from qir.idle import is_idle, overflow_room
from qir.interpreter import interpret, trace
from qir.interval import Interval
from qir.ir import Graph, Stage, Value
from qir.ops.accumulate import Accumulating, Order
from qir.ops.fixed_elementwise import FixedAdd, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.ops.fixed_rescale import Requantize
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.insert_saturation import InsertSaturation
from qir.probes import some_inputs
from qir.proof import prove
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S8, S64, IntegerType, TensorType, affine, integer
from qir.verifier import find_faults

Tensor = npt.NDArray[Any]
#: A weight and the place in a sample that it multiplies.
Products = list[tuple[int, tuple[int, ...]]]


# The worst inputs of a layer


class Layer:
    """A convolution or matrix product of few small integers, with the input at its extremes."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.order = draw(st.sampled_from(Order))
        self.storage = draw(st.sampled_from([S8, S8.narrowed(-3, 100), integer(4, signed=False), integer(16)]))
        self.zero = draw(st.sampled_from([0, self.storage.lo, self.storage.hi]))
        self.builder = GraphBuilder("layer", Stage.FIXED)
        self.with_bias = draw(st.booleans())
        self.is_conv = draw(st.booleans())
        self.value = self.conv(draw) if self.is_conv else self.matmul(draw)
        self.graph = self.builder.finish([self.value], ["y"])

    def weights(self, *shape: int, channel_axis: int) -> tuple[Value, Tensor]:
        data = self.random.integers(-9, 9, shape, np.int8, endpoint=True)
        zeros = self.random.integers(-2, 2, shape[channel_axis], endpoint=True)
        kind = affine(S8, np.full(len(zeros), 0.5), zeros, channel_axis)
        self.centred = np.moveaxis(np.moveaxis(data.astype(np.int64), channel_axis, -1) - zeros, -1, channel_axis)
        return self.builder.constant(Array(data), TensorType(shape, kind), "w"), self.centred

    def rest(self, outputs: int) -> tuple[list[Value], dict[str, Any]]:
        self.bias = self.random.integers(-99, 99, outputs, np.int32) if self.with_bias else np.zeros(outputs, np.int32)
        made = [self.builder.constant(Array(self.bias), TensorType((outputs,), integer(32)), "b")]
        accumulator = {"accumulator": S64, "overflow": Overflow.WRAP, "order": self.order}
        return made if self.with_bias else [], accumulator

    def input(self, *shape: int) -> Value:
        return self.builder.input("x", TensorType((BATCH, *shape), affine(self.storage, 0.5, self.zero)))

    def matmul(self, draw: st.DrawFn) -> Value:
        length, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        weight, _ = self.weights(length, outputs, channel_axis=1)
        bias, attributes = self.rest(outputs)
        return self.builder.emit(FixedMatMul, [self.input(length), weight, *bias], **attributes)

    def conv(self, draw: st.DrawFn) -> Value:
        few = st.integers(1, 3)
        groups, per_group, multiple, rows, columns = (draw(few) for _ in range(5))
        dilations, strides = (draw(few), draw(few)), (draw(few), draw(few))
        pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
        size = [draw(st.integers(max(1, (k - 1) * d + 1 - a - b), 7)) for k, d, a, b in
                zip((rows, columns), dilations, pads[:2], pads[2:], strict=True)]  # fmt: skip
        weight, _ = self.weights(groups * multiple, rows, columns, per_group, channel_axis=0)
        bias, attributes = self.rest(groups * multiple)
        operands = [self.input(*size, groups * per_group), weight, *bias]
        return self.builder.emit(
            Conv2d, operands, pads=pads, strides=strides, dilations=dilations, groups=groups, **attributes
        )

    def terms(self) -> list[tuple[int, Products]]:
        """For each sum of a sample: its channel, and weight and place in x of each product, in order."""
        op = self.graph.ops[-1]
        if not isinstance(op, Conv2d):
            length, outputs = self.centred.shape
            return [(o, [(int(self.centred[k, o]), (k,)) for k in range(length)]) for o in range(outputs)]
        found: list[tuple[int, Products]] = []
        height, width = op.operands[0].type.concrete(1)[1:3]
        outputs, _, _, per_group = self.centred.shape
        for i, j, o in itertools.product(*map(range, self.value.type.concrete(1)[1:])):
            products: Products = []
            places = sorted(np.ndindex(*self.centred.shape[1:]), key=lambda at: at[2] * op.order.channels_outside)
            for r, s, c in places:
                y = i * op.strides[0] + r * op.dilations[0] - op.pads[0]
                x = j * op.strides[1] + s * op.dilations[1] - op.pads[1]
                if 0 <= y < height and 0 <= x < width:
                    channel = o // (outputs // op.groups) * per_group + c
                    products.append((int(self.centred[o, r, s, c]), (y, x, channel)))
            found.append((o, products))
        return found


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    return Layer(draw)


@settings(max_examples=max(150, settings().max_examples))
@given(data=st.data())
def test_the_bounds_of_a_layer_are_attained(data: st.DataObject) -> None:
    """Per channel and for every partial sum, in the order that the op states, at padded borders too."""
    layer = data.draw(layers())
    storage, zero = layer.storage, layer.zero
    terms = layer.terms()
    x = np.full((2 * len(terms), *layer.graph.inputs[0].type.concrete(1)[1:]), storage.lo)
    partial = {0}
    for place, ((channel, products), sign) in enumerate(itertools.product(terms, (1, -1))):
        total = int(layer.bias[channel]) if layer.order.bias_first else 0
        partial.add(total)
        for weight, where in products:
            x[(place, *where)] = storage.hi if weight * sign > 0 else storage.lo
            total += weight * (int(x[(place, *where)]) - zero)
            partial.add(total)
        partial.add(total + (0 if layer.order.bias_first else int(layer.bias[channel])))
    found = interpret(layer.graph, {"x": x})["y"].astype(np.int64)
    proof = prove(layer.graph)
    bounds = proof.bounds[layer.value]
    outputs = len(layer.bias)
    sums = found.reshape(-1, outputs)
    assert np.broadcast_to(bounds.lo, outputs).tolist() == sums.min(axis=0).tolist()
    assert np.broadcast_to(bounds.hi, outputs).tolist() == sums.max(axis=0).tolist()
    assert proof.steps[layer.graph.ops[-1]].partial == Interval(min(partial), max(partial))


# Soundness


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
def test_int64_and_unbounded_integers_agree_and_stay_in_their_bounds(kind: str, data: st.DataObject) -> None:
    graph, feeds = data.draw(cases(kind))
    found, unbounded = trace(graph, feeds), trace(graph, feeds, unbounded=True)
    proof = prove(graph)
    for value in graph.values():
        array = found[value.name]
        np.testing.assert_array_equal(array, unbounded[value.name], strict=True)
        if value in proof.bounds and array.size:
            bounds = proof.bounds[value]
            assert np.all(bounds.lo <= array.astype(object))  # per channel, where there are channels
            assert np.all(array.astype(object) <= bounds.hi)


@pytest.mark.parametrize(
    "overflow", [Overflow.SATURATE, Overflow.WRAP, Overflow.SATURATE_ZERO, Overflow.SATURATE_SYMMETRIC]
)
@pytest.mark.parametrize("op_class", [FixedAdd, FixedSub, FixedMul, FixedDiv])
def test_every_pair_of_small_integers(op_class: Any, overflow: Overflow) -> None:
    """Over all values of the operands; without overflow the bounds are attained."""
    if op_class is FixedDiv and overflow is not Overflow.SATURATE:
        return
    pairs = [(3, True), (2, False)]
    for (left, right), result in itertools.product(
        itertools.product(pairs, pairs), [integer(4), S8, S8.narrowed(-5, 6)]
    ):
        if overflow is Overflow.WRAP and result.is_narrowed:
            continue
        extra: dict[str, Any] = {"multiplier": 1 << 30, "shift": 2} if op_class is FixedDiv else {}
        for zeros in itertools.product((0, 1), (0, 1)):
            builder = GraphBuilder("pair", Stage.FIXED)
            kinds = [integer(*s) for s in (left, right)]
            operands = [
                builder.input(n, TensorType((BATCH,), affine(k, 1.0, z)))
                for n, k, z in zip("ab", kinds, zeros, strict=True)
            ]
            value = builder.emit(op_class, operands, elements=[result], overflow=overflow, **extra)
            graph = builder.finish([value], ["y"])
            grid = np.array(list(itertools.product(*(range(k.lo, k.hi + 1) for k in kinds))))
            found = interpret(graph, {"a": grid[:, 0], "b": grid[:, 1]})["y"]
            hull = prove(graph).interval(value)
            assert hull is not None
            assert hull.contains(Interval(int(found.min()), int(found.max())))
            if is_idle(graph.ops[-1], prove(graph).steps[graph.ops[-1]]) and op_class is not FixedDiv:
                assert hull == Interval(int(found.min()), int(found.max()))


@pytest.mark.parametrize("form", RequantizeForm)
@pytest.mark.parametrize("shift", [-9, -2, 0, 3])
def test_requantize_over_every_integer_of_ten_bits(form: RequantizeForm, shift: int) -> None:
    builder = GraphBuilder("requantize", Stage.FIXED)
    x = builder.input("x", TensorType((BATCH,), affine(integer(10), 1.0, 100)))
    is_float = form in FLOAT_FORMS
    value = builder.emit(
        Requantize,
        [x],
        elements=[affine(S64, 1.0, -3)],
        multiplier=Array(np.array(0.3 * 2.0**shift)) if is_float else Array(np.array(1288490189)),
        shift=Array(np.array(0 if is_float else shift)),
        form=form,
        rounding=Rounding.HALF_EVEN if form is RequantizeForm.SHIFT else None,
        overflow=Overflow.SATURATE,
    )
    graph = builder.finish([value], ["y"])
    found = interpret(graph, {"x": np.arange(-512, 512)})["y"]
    assert prove(graph).interval(value) == Interval(int(found.min()), int(found.max()))


def test_a_table_is_read_only_where_its_operand_can_be() -> None:
    builder = GraphBuilder("table", Stage.FIXED)
    x = builder.input("x", TensorType((BATCH, 2), integer(3).narrowed(-2, 1)))
    entries = np.array([[99, 99, 5, -7, 2, 3, 99, 99], [-99, -99, 0, 1, 2, 3, -99, -99]], np.int8)
    table = builder.constant(Array(entries), TensorType(entries.shape, S8), "t")
    graph = builder.finish([builder.emit(Table, [x, table], elements=[S8])], ["y"])
    bounds = prove(graph).bounds[graph.outputs[0]]
    assert (bounds.lo.tolist(), bounds.hi.tolist()) == ([-7, 0], [5, 3])


# What a proof is used for


def _one(op: str, kind: str = "s8") -> tuple[Graph, Accumulating | FixedAdd]:
    graph = parse(
        f"graph @g stage=fixed (%x: Nx2 x {kind}) {{\n"
        f"  %w = const {{value=s8 2x1 [1, 1]}} : 2x1 x s8\n  %y = {op}\n  return %y\n}}\n"
    )
    found = graph.ops[-1]
    assert isinstance(found, Accumulating | FixedAdd)
    return graph, found


@pytest.mark.parametrize(
    ("op", "room", "idle"),
    [
        ("add %x, %x {overflow=saturate} : Nx2 x s9", Interval(-256, 255), True),
        ("add %x, %x {overflow=saturate} : Nx2 x s9[-255, 255]", Interval(-255, 255), False),
        ("add %x, %x {overflow=saturate_symmetric} : Nx2 x s9", Interval(-255, 255), False),
        ("add %x, %x {overflow=saturate_symmetric} : Nx2 x s10", Interval(-511, 511), True),
        ("add %x, %x {overflow=wrap} : Nx2 x s8", Interval(-128, 127), False),
        ("matmul %x, %w {accumulator=s9, overflow=wrap, order=khwc} : Nx1 x s9", Interval(-256, 255), True),
        ("matmul %x, %w {accumulator=s8, overflow=saturate, order=khwc} : Nx1 x s8", Interval(-128, 127), False),
    ],
)
def test_idle_overflow(op: str, room: Interval, idle: bool) -> None:
    graph, found = _one(op)
    assert overflow_room(found) == room
    assert is_idle(found, prove(graph).steps[found]) == idle


def test_ops_without_overflow_have_no_room() -> None:
    graph, _ = _one("add %x, %x {overflow=saturate} : Nx2 x s9")
    assert overflow_room(graph.ops[0]) is None
    assert not is_idle(graph.ops[0], prove(graph).steps[graph.ops[0]])


def test_what_may_overflow_spans_its_whole_type() -> None:
    for op in (
        "add %x, %x {overflow=wrap} : Nx2 x s8",
        "matmul %x, %w {accumulator=s8, overflow=wrap, order=khwc} : Nx1 x s8",
    ):
        graph, _ = _one(op, "s8[0, 100]")
        assert prove(graph).interval(graph.outputs[0]) == Interval(-128, 127)


def test_an_op_without_a_rule_spans_its_whole_type_and_is_named() -> None:
    graph = parse(
        "graph @g stage=fixed (%x: Nx2 x u1, %t: 2 x s4) {\n"
        '  %y = table %x, %t : Nx2 x s8[-9, 9] loc("node")\n  return %y\n}\n'
    )
    proof = prove(graph)
    assert proof.interval(graph.outputs[0]) == Interval(-9, 9)
    assert [str(d) for d in proof.diagnostics] == [
        'warning: table %y (from node "node"): no range rule for these operands; its results are taken to span their '
        "whole type"
    ]


def test_reals_have_no_bounds() -> None:
    graph = parse(
        "graph @g stage=fixed (%x: N x s8<0.5>, %r: N x f32) {\n"
        "  %y = dequantize %x : N x f32\n  %z = Add %y, %r : N x f32 island\n"
        "  %q = quantize %z {rule=divide, rounding=half_even} : N x s8[-5, 6]<0.5>\n  return %q\n}\n"
    )
    proof = prove(graph)
    assert {v.name for v in proof.bounds} == {"x", "q"}
    assert proof.interval(graph.value("z")) is None
    assert proof.interval(graph.value("q")) == Interval(-5, 6)
    assert proof.diagnostics == ()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("slice %w {starts=[1], ends=[2], axes=[0], steps=[1]} : 1x2 x s8", [[3, 4]]),
        ("transpose %w {perm=[0, 1]} : 2x2 x s8", [[1, 2], [3, 4]]),
        ("gather %w {indices=s64 2 [1, 0], axis=0} : 2x2 x s8", [[3, 4], [1, 2]]),
        ("reshape %w {shape=[2, 2]} : 2x2 x s8", [[1, 2], [3, 4]]),
    ],
)
def test_what_is_moved_from_a_constant_is_not_taken_for_it(op: str, expected: list[list[int]]) -> None:
    """The product with the moved weights lies in its bounds, which those of the constant itself would not hold."""
    rows = len(expected)
    graph = parse(
        f"graph @moved stage=fixed (%x: Nx{rows} x s8) {{\n"
        f"  %w = const {{value=s8 2x2 [1, 2, 3, 4]}} : 2x2 x s8\n  %v = {op}\n"
        "  %y = matmul %x, %v {accumulator=s32, overflow=wrap, order=khwc} : Nx2 x s32\n  return %y\n}\n"
    )
    x = np.array([[-128] * rows, [127] * rows])
    found = interpret(graph, {"x": x})["y"]
    assert found.tolist() == (x @ np.array(expected)).tolist()
    hull = prove(graph).interval(graph.outputs[0])
    assert hull is not None
    assert hull.contains(Interval(int(found.min()), int(found.max())))


@pytest.mark.parametrize("bits", [61, 62, 63, 64])
@pytest.mark.parametrize("signed", [True, False])
def test_constants_of_any_width_are_exact(bits: int, signed: bool) -> None:
    """Beyond 60 bits int64 arithmetic on the data would overflow."""
    kind: IntegerType = integer(bits, signed)
    builder = GraphBuilder("wide", Stage.FIXED)
    x = builder.input("x", TensorType((BATCH, 2), S8))
    data = np.array([[kind.lo], [kind.hi]], kind.dtype)
    weight = builder.constant(Array(data), TensorType((2, 1), affine(kind, 1.0, min(kind.hi, 2**63 - 1))), "w")
    total = builder.emit(FixedMatMul, [x, weight], accumulator=S64, overflow=Overflow.WRAP, order=Order.KHWC)
    graph = builder.finish([total], ["y"])
    zero = min(kind.hi, 2**63 - 1)
    low, high = (kind.lo - zero, kind.hi - zero)
    ends = [a * low + b * high for a in (-128, 127) for b in (-128, 127)]
    partial = prove(graph).steps[graph.ops[-1]].partial
    reached = [a * low for a in (-128, 127)]
    assert partial == Interval(min(0, *ends, *reached), max(0, *ends, *reached))


def test_a_zero_point_at_the_end_of_64_bits_is_subtracted_exactly() -> None:
    graph = parse(f"""
        graph @g stage=fixed (%x: Nx1 x s64<0.5, zero={-(1 << 63)}>) {{
          %w = const {{value=s8 1x1 [1]}} : 1x1 x s8
          %y = matmul %x, %w {{accumulator=s64, overflow=saturate, order=khwc}} : Nx1 x s64
          return %y
        }}""")
    assert prove(graph).steps[graph.ops[-1]].partial == Interval(0, (1 << 64) - 1)


def test_a_zero_point_of_the_result_is_added_exactly() -> None:
    graph = parse(f"""
        graph @g stage=fixed (%x: N x s16) {{
          %y = requantize %x {{multiplier=s64 [1234567890], shift=s64 [5], form=reduced_16, input_shift=0, overflow=saturate}} : N x s64<0.5, zero={-(1 << 63)}>
          return %y
        }}""")  # noqa: E501
    feeds = {"x": np.array([-32768, -1, 1], np.int16)}
    expected = interpret(graph, feeds, unbounded=True)["y"]
    assert np.array_equal(interpret(graph, feeds)["y"], expected)
    assert expected[:2].tolist() == [-(1 << 63)] * 2
    assert int(prove(graph).bounds[graph.outputs[0]].hull.lo) == -(1 << 63)


WIDE_TEXTS = {
    "a sum of as many as leave 64 bits": """
        graph @g stage=fixed (%x: Nx9 x s62[0, 2305843009213693951]) {
          %y = reduce_sum %x {accumulator=s64, overflow=wrap, order=khwc, axes=[1], keepdims=true} : Nx1 x s64
          return %y
        }""",
    "a sum of unsigned 64 bits": """
        graph @g stage=fixed (%x: Nx2 x u64) {
          %y = reduce_sum %x {accumulator=s40, overflow=saturate, order=khwc, axes=[1], keepdims=true} : Nx1 x s40
          return %y
        }""",
    "a little more than 64 bits": """
        graph @g stage=fixed (%x: Nx2 x s64, %z: Nx2 x u3) {
          %y = add %x, %z {overflow=saturate} : Nx2 x s64
          return %y
        }""",
    "a quotient of wide integers": """
        graph @g stage=fixed (%x: Nx2 x s16, %z: Nx2 x s8[-90, -2]) {
          %y = div %x, %z {overflow=saturate, multiplier=1073741824, shift=-31} : Nx2 x s64
          return %y
        }""",
    "a sum of no channels": """
        graph @g stage=fixed (%x: Nx0 x s8) {
          %q = requantize %x {multiplier=s64 0 [], shift=s64 0 [], form=single_round,
            input_shift=0, overflow=saturate} : Nx0 x s8
          %y = reduce_sum %q {accumulator=s40, overflow=saturate, order=khwc, axes=[1], keepdims=true} : Nx1 x s40
          return %y
        }""",
    "unsigned 64 bits by weights of zero": """
        graph @g stage=fixed (%x: Nx2 x u64) {
          %w = const {value=s8 2x1 [0, 0]} : 2x1 x s8
          %y = matmul %x, %w {accumulator=s40, overflow=wrap, order=khwc} : Nx1 x s40
          return %y
        }""",
}


@pytest.mark.parametrize("name", WIDE_TEXTS)
def test_bounds_beyond_64_bits_are_exact(name: str) -> None:
    """Whole-tensor bounds are 0-d, of which NumPy makes scalars; none of these may wrap or become a float."""
    graph = parse(WIDE_TEXTS[name])
    proofs = [prove(graph, method) for method in ("interval", "affine")]
    for feeds in some_inputs(graph, 64, 0):
        check_soundness(graph, feeds, *proofs)
    for proof in proofs:
        assert faults_of(graph, certificate(graph, proof)) == []


def test_a_sum_that_leaves_64_bits_is_not_idle() -> None:
    graph = parse(WIDE_TEXTS["a sum of as many as leave 64 bits"])
    step = prove(graph).steps[graph.ops[0]]
    assert step.partial == Interval(0, 9 * ((1 << 61) - 1))
    assert not is_idle(graph.ops[0], step)


def test_zero_points_along_different_axes_are_no_identity() -> None:
    graph = parse("""
        graph @g stage=fixed (%x: Nx3x2 x u8<[0.5, 0.5, 0.5], zero=[1, 2, 3], axis=1>) {
          %y = requantize %x {multiplier=s64 [1], shift=s64 [0], form=shift, input_shift=0, rounding=floor, overflow=saturate} : Nx3x2 x u8<[0.5, 0.5], zero=[1, 2], axis=2>
          return %y
        }""")  # noqa: E501
    after = InsertSaturation().run(graph, PassContext())
    assert not find_faults(after)
    feeds = {"x": np.arange(60, dtype=np.uint8).reshape(10, 3, 2)}
    assert np.array_equal(interpret(after, feeds)["y"], interpret(graph, feeds)["y"])


def test_bounds_of_an_empty_axis_of_zero_points() -> None:
    graph = parse("""
        graph @g stage=fixed (%x: Nx0 x s8) {
          %w = const {value=s8 0x2 []} : 0x2 x s8<[], axis=0>
          %y = matmul %x, %w {accumulator=s16, overflow=wrap, order=khwc} : Nx2 x s16
          return %y
        }""")
    assert prove(graph).interval(graph.value("y")) == Interval(0, 0)
