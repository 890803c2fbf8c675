"""What formats and integer ops follow from a contract, in numbers: room for sums, tables, means, sums, averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qir
from qir.backend import load_target
from qir.cost_tables import CostRule, Costs
from qir.errors import PassError
from qir.fixed_point import Overflow, RequantizeForm, Rounding, round_divide
from qir.interpreter import interpret
from qir.interval import Interval
from qir.ir import Graph
from qir.ops.constant import Const
from qir.ops.dequantize_blocks import Packing, pack, unpack
from qir.ops.fixed_rescale import quantize_reals
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.accumulation import excess_bits, largest_sum, least_weight_scale, sum_scale
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.lowering.elementwise import sum_multipliers
from qir.passes.lowering.weight_only import quantize_blocks
from qir.passes.pipelines import parse_pipeline
from qir.passes.weight_formats import affine_weights
from qir.passes.widths.storage import default_widths
from qir.target import AverageRule, Pooling, Product, Requantization, Scheme, Target, Width
from qir.types import AffineType, FixedPointType, integer, storage_of

DSP = load_target("dsp16")
FPGA = load_target("fpga")
ASIC = load_target("asic")
ARM = load_target("arm-neon")
TENSORRT = load_target("tensorrt")

Array = npt.NDArray[Any]


def lowered(text: str, target: Target, passes: str = "legalize,range-analysis,insert-saturation") -> Graph:
    """The fixed graph of a typed one."""
    return parse_pipeline(passes).run(parse(text), PassContext(target))


def kinds(graph: Graph) -> list[str]:
    return [op.mnemonic for op in graph.ops if not isinstance(op, Const)]


def typed(body: str, **inputs: str) -> str:
    """A typed graph of one result %y; inputs have a range that no rule reads."""
    heads = ", ".join(f"%{name}: {kind} in [-1.0, 1.0]" for name, kind in inputs.items())
    return f"graph @g stage=typed ({heads}) {{\n  {body}\n  return %y\n}}\n"


def run(text: str, target: Target, *, passes: str = "legalize,range-analysis", **feeds: Any) -> Array:
    """The integers of %y, from the interpreter and from the program, which must agree."""
    graph = lowered(text, target, passes)
    arrays = {v.name: np.asarray(feeds[v.name], storage_of(v.type.element).dtype) for v in graph.inputs}  # type: ignore[union-attr]
    expected: Array = interpret(graph, arrays)["y"]
    np.testing.assert_array_equal(qir.Program(graph).run_integer(arrays)["y"], expected, strict=True)
    return expected


# Room in the accumulator


def with_accumulator(target: Target, **changes: Any) -> Target:
    return replace(target, accumulator=replace(target.accumulator, **changes))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (DSP, 2.0**30),
        (with_accumulator(DSP, bits=24), 2.0**22),
        (load_target("dsp16-acc40"), 2.0**30),  # guard bits are for sums on the way
        (ASIC, 2.0**18),
        (FPGA, 2.0**62),
    ],
)
def test_calibrated_sums_fill_half_of_the_accumulator(target: Target, expected: float) -> None:
    assert largest_sum(target) == expected


def test_the_scale_of_sums_is_that_of_products_after_their_shift() -> None:
    found = sum_scale(DSP, 2.0**-15, np.array([2.0**-15, 2.0**-12]), Interval(-1e9, 1e9))
    assert found.step.tolist() == [2.0**-31, 2.0**-28]
    assert found.shift == 1


@pytest.mark.parametrize(
    ("reach", "dropped"),
    [(0.0, 0), (2.0, 0), (2.0 * (1 + 2**-20), 1), (4.0, 1), (4.1, 2), (2.0**20, 19)],
)
def test_rounded_sums_drop_as_few_fraction_bits_as_leave_room(reach: float, dropped: int) -> None:
    """Of the finest channel: 2^-17 a unit, 2^18 of them in half of 20 bits."""
    found = sum_scale(ASIC, 2.0**-7, np.array([2.0**-10, 2.0**-8]), Interval(-reach, reach / 2))
    assert found.shift == -dropped
    assert found.step.tolist() == [2.0 ** (dropped - 17), 2.0 ** (dropped - 15)]


def test_sums_of_no_channel_drop_nothing() -> None:
    assert sum_scale(ASIC, 1.0, np.zeros(0), Interval(-1.0, 1.0)).shift == 0


@pytest.mark.parametrize("magnitude", [0.3, 1.0, 7.0])
def test_the_least_weight_scale_leaves_room_for_just_this_sum(magnitude: float) -> None:
    least = float(least_weight_scale(DSP, 2.0**-15, magnitude))
    assert magnitude / (2.0**-15 * least / 2) == pytest.approx(2.0**30, rel=1e-12)
    assert least_weight_scale(DSP, 2.0**-15, [magnitude, 0.0], 100.0).tolist() == [magnitude / (100 * 2.0**-16), 0.0]


@pytest.mark.parametrize(
    ("target", "reach", "bits"),
    [(DSP, 32.0, 0), (DSP, 32.5, 1), (DSP, 64.0, 1), (DSP, 1000.0, 5), (FPGA, 1e9, 0), (ASIC, 1e9, 0), (DSP, 0.0, 0)],
)
def test_products_of_activations_that_leave_no_room(target: Target, reach: float, bits: int) -> None:
    assert excess_bits(target, 2.0**-24, Interval(-reach, 0.0)) == bits


def test_room_without_a_calibrated_range() -> None:
    assert excess_bits(DSP, 1e-9, None) == 0
    assert sum_scale(ASIC, 1.0, np.ones(1), None).shift == 0


def compiled(target: Target, columns: int = 3, scale: float = 1.0, bias: float = 0.0, **options: Any) -> qir.Program:
    """A matrix product of 8 rows, on data of one seed."""
    rng = np.random.default_rng(0)
    weights, offsets = rng.uniform(-1, 1, (8, columns)) * scale, np.full(columns, bias)
    text = f"""graph @g stage=float (%x: Nx8 x f32) {{
  %w = const {{value=f32 8x{columns} {weights.astype(np.float32).reshape(-1).tolist()}}} : 8x{columns} x f32
  %b = const {{value=f32 {columns} {offsets.astype(np.float32).tolist()}}} : {columns} x f32
  %y = MatMul %x, %w, %b : Nx{columns} x f32 loc("fc")
  return %y
}}
"""
    return qir.compile(parse(text), target, [{"x": X}], **options)


X = np.random.default_rng(1).uniform(-1, 1, (64, 8)).astype(np.float32)


def weights_of(program: qir.Program) -> tuple[Array, Array, Array]:
    """Real weights and biases as the integers and their types mean them, and the integers of the bias."""
    (total,) = (op for op in program.graph.ops if op.mnemonic == "matmul")
    w, b = (program.graph.constants[v].data for v in total.operands[1:])
    kind = total.operands[1].type.element
    assert isinstance(kind, AffineType | FixedPointType)
    return w, b, np.asarray(kind.parameters.data)


@pytest.mark.parametrize("bias_bits", [12, 16, 24, 32])
@pytest.mark.parametrize("target", [DSP, FPGA])
def test_a_bias_fits_its_own_width(target: Target, bias_bits: int) -> None:
    """Only coarser weights make room for it: a bias has the scale of the products."""
    program = compiled(replace(target, bias_bits=bias_bits), bias=1.5)
    _, bias, exponents = weights_of(program)
    assert np.abs(bias).max() < 1 << (bias_bits - 1)
    real = X @ np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32) + np.float32(1.5)
    rounded = 8 * 2.0 ** (exponents - 1)  # eight weights, each off by half a step at most or zero
    error = np.abs(program.run({"x": X})["y"] - real).max(axis=0)
    assert (error <= np.minimum(rounded, np.abs(real - 1.5).max()) + 0.001).all()
    assert error.max() < 0.1 or bias_bits < 24


@pytest.mark.parametrize("bits", [20, 24, 32])
def test_weights_are_as_coarse_as_a_narrow_accumulator_needs(bits: int) -> None:
    program = compiled(with_accumulator(DSP, bits=bits))
    weights, _, _ = weights_of(program)
    # Sums of 2 and more, of inputs of 16 bits, in half of the accumulator.
    assert np.abs(weights).max() <= 1 << (bits - 16)
    trace = program.trace({"x": X})
    sums = np.abs(trace[next(n for n in trace if n.endswith(".acc"))].astype(np.int64)).max()
    assert (1 << (bits - 4)) < sums < 1.1 * (1 << (bits - 2))


def test_affine_weights_take_their_range() -> None:
    low, high = np.array([-1.0, 0.0, 0.0, -1.0]), np.array([2.0, 1.0, 0.0, 3.0])
    scales, zeros = affine_weights(low, high, integer(8), np.zeros(()))
    assert scales.tolist() == pytest.approx([3 / 255, 1 / 255, 1 / 255, 4 / 255])  # zeros: the least of the others
    assert zeros.tolist() == [-43, -128, -128, -64]
    scales, zeros = affine_weights(low, high, integer(8), np.array([0.0, 0.1, 0.2, 0.0]))
    assert scales.tolist() == pytest.approx([3 / 255, 0.1, 0.2, 4 / 255])
    assert zeros.tolist() == [-43, -128, -128, -64]
    scale, zero = affine_weights(low.min(), high.max(), integer(4, signed=False), np.zeros(2))
    assert float(scale) == pytest.approx(4 / 15)
    assert int(zero) == 4


def test_affine_weights_compute_what_the_model_says() -> None:
    target = replace(ARM, weights=replace(ARM.weights, scheme=Scheme.AFFINE, narrow_range=False))
    program = compiled(target, bias=0.25)
    expected = compiled(ARM, bias=0.25).run({"x": X})["y"]
    assert np.abs(program.run({"x": X})["y"] - expected).max() < 0.05


# Overflow and fused activations


def overflowing(target: Target, overflow: Overflow) -> Target:
    return replace(target, requantization=replace(target.requantization, overflow=overflow))


ARM_OF_16_BITS = replace(
    ARM,
    activations=replace(ARM.activations, bits=(16,)),
    addition=replace(ARM.addition, left_shift=15),
    costs=Costs(CostRule.BIT_OPERATIONS),
)
OTHER_OVERFLOWS = [Overflow.WRAP, Overflow.SATURATE_ZERO, Overflow.SATURATE_SYMMETRIC]


@pytest.mark.parametrize("overflow", OTHER_OVERFLOWS)
@pytest.mark.parametrize("element", ["s16<2^-4>", "s16<0.0625, zero=-3>"])
def test_an_activation_comes_before_what_does_not_fit_overflows(element: str, overflow: Overflow) -> None:
    """Accumulators of 2^-4 or 1/16 a unit far outside of 16 bits: below 0 they are 0, whatever wraps."""
    power = "2^" in element
    target = overflowing(FPGA if power else ARM_OF_16_BITS, overflow)
    kind = "s16<2^-2>" if power else "s16<0.25>"
    clips = {"[0.0, inf]": (0.0, np.inf), "[-1.0, 1.0]": (-1.0, 1.0), "[-inf, 6.0]": (-np.inf, 6.0)}
    x = np.array([[-30000], [-20000], [-3], [-1], [0], [2], [40], [9000], [20000], [32767]])
    form = parse("graph @t stage=typed (%x: N x " + element + ") {\n  return %x\n}\n").inputs[0].type.element
    zero = 0 if power else -3
    assert storage_of(form) == integer(16)
    for text, (low, high) in clips.items():
        y = run(
            typed(f"%y = Mul %x, %x {{clip={text}}} : Nx1 x {element} in [-1.0, 1.0]", x=f"Nx1 x {kind}"), target, x=x
        )
        units = np.clip(x.astype(np.int64) ** 2, low * 16, high * 16).astype(np.int64) + zero
        top = 32767 if overflow is Overflow.SATURATE_SYMMETRIC else None
        if overflow is Overflow.WRAP:
            kept = (units + 32768) % 65536 - 32768
        elif overflow is Overflow.SATURATE_ZERO:
            kept = np.where(abs(units) > 32767, 0, units)
        else:
            assert top is not None
            kept = np.clip(units, -top, top)
        least, greatest = (int(np.clip(end * 16 + zero, -32768, 32767)) for end in (low, high))
        np.testing.assert_array_equal(y, np.clip(kept, least, greatest), text)


def test_a_relu_far_below_zero_is_zero_where_results_wrap() -> None:
    text = """graph @g stage=float (%x: Nx8 x f32) {
  %w = const {value=f32 8x1 [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]} : 8x1 x f32
  %b = const {value=f32 1 [-4.0]} : 1 x f32
  %h = MatMul %x, %w, %b : Nx1 x f32
  %y = Relu %h : Nx1 x f32
  return %y
}
"""
    program, real = qir.compile(parse(text), FPGA, [{"x": X}]), interpret(parse(text), {"x": X})["y"]
    assert 0 < real.max() < 1
    assert np.abs(program.run({"x": X})["y"] - real).max() < 0.02


@pytest.mark.parametrize("target", ["dsp16", "dsp16-acc40", "asic", "fpga"])
def test_sums_far_beyond_a_fused_activation_do_not_saturate_on_the_way(target: str) -> None:
    """Of [0, 1] nothing is left to see that sums reach 24: what calibration saw before the activation says it."""
    text = """graph @g stage=float (%x: Nx8 x f32) {
  %w = const {value=f32 8x2 [6, -6, 6, -6, 6, -6, 6, -6, -6, 6, -6, 6, -6, 6, -6, 6]} : 8x2 x f32
  %h = MatMul %x, %w : Nx2 x f32
  %y = Clip %h {minimum=0.0, maximum=1.0} : Nx2 x f32
  return %y
}
""".replace("6,", "6.0,").replace("6]", "6.0]")
    program, real = qir.compile(parse(text), load_target(target), [{"x": X}]), interpret(parse(text), {"x": X})["y"]
    assert {0.0, 1.0} <= set(real.reshape(-1).tolist())
    # Inputs of 8 bits are off by half of 2^-7 each, eight times six.
    assert np.abs(program.run({"x": X})["y"] - real).max() < (0.4 if target == "asic" else 0.01)


@pytest.mark.parametrize("scheme", Scheme)
def test_formats_have_room_where_results_wrap(scheme: Scheme) -> None:
    target = overflowing(replace(ARM, activations=replace(ARM.activations, scheme=scheme)), Overflow.WRAP)
    program = compiled(target)
    kind = program.graph.outputs[0].type.element
    assert isinstance(kind, AffineType)
    (before,) = (v for v in compiled(replace(target, requantization=ARM.requantization)).graph.outputs)
    assert isinstance(before.type.element, AffineType)
    assert float(kind.scale.data) > 1.9 * float(before.type.element.scale.data)
    beyond = np.concatenate([X * 1.3, -X * 1.3])
    real = beyond @ np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    assert np.abs(program.run({"x": X})["y"] - real[: len(X)] / np.float32(1.3)).max() < 0.1


@pytest.mark.parametrize(
    ("overflow", "scheme", "scale", "zero"),
    [
        (Overflow.SATURATE, Scheme.AFFINE, 2.55 / 255, -128),
        (Overflow.WRAP, Scheme.AFFINE, 5.1 / 255, -64),  # as much below 0 as above 2.55: [-1.275, 3.825]
        (Overflow.SATURATE_ZERO, Scheme.AFFINE, 5.1 / 255, -64),
        (Overflow.SATURATE_SYMMETRIC, Scheme.SYMMETRIC, 2.55 / 127, 0),
        (Overflow.WRAP, Scheme.SYMMETRIC, 5.1 / 127, 0),
    ],
)
def test_where_the_room_lies(overflow: Overflow, scheme: Scheme, scale: float, zero: int) -> None:
    target = overflowing(replace(ARM, activations=replace(ARM.activations, scheme=scheme)), overflow)
    text = "graph @g stage=ranged (%x: Nx2 x f32 in [0.0, 2.55] storage s8) {\n  return %x\n}\n"
    kind = lowered(text, target, "select-q-formats").inputs[0].type.element
    assert isinstance(kind, AffineType)
    assert float(kind.scale.data) == pytest.approx(scale)
    assert int(kind.zero_point.data) == zero


# Tables


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


@pytest.mark.parametrize(
    ("body", "function"),
    [
        ("Sigmoid %x", sigmoid),
        ("Tanh %x", np.tanh),
        ("HardSigmoid %x {alpha=0.2, beta=0.5}", lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
        ("HardSwish %x", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
        ("LeakyRelu %x {alpha=0.25}", lambda x: np.where(x < 0, x * 0.25, x)),
    ],
)
def test_wide_operands_are_rounded_to_the_index_of_a_table(body: str, function: Callable[[Array], Array]) -> None:
    """16 bits at 2^-12 become 10 at 2^-6, ties up and saturated; entries are those of the index, ties away."""
    x = np.array([-32768, -32, -31, 0, 31, 32, 33, 95, 96, 4096, 32735, 32736, 32767])
    index = np.clip((x + 32) >> 6, -512, 511)
    assert (index[[1, 2, 4, 5, 10, 11]] == [0, 0, 0, 1, 511, 511]).all()
    text = typed(f"%y = {body} : Nx1 x s16<2^-13> in [-1.0, 1.0]", x="Nx1 x s16<2^-12>")
    y = run(text, DSP, x=x.reshape(-1, 1)).reshape(-1)
    real = function(index * 2.0**-6) * 2.0**13
    assert np.abs(y - np.clip(real, -32768, 32767)).max() <= 0.5 + 1e-2
    assert len(lowered(text, DSP).constants) == 1
    (table,) = lowered(text, DSP).constants.values()
    assert table.shape == (1024,)


def test_operands_of_the_index_or_narrower_need_no_rounding() -> None:
    text = typed("%y = Tanh %x : Nx1 x s16<2^-15> in [-1.0, 1.0]", x="Nx1 x s10<2^-6>")
    assert kinds(lowered(text, DSP)) == ["table"]
    text = typed("%y = Tanh %x : Nx1 x s8<0.0078125> in [-1.0, 1.0]", x="Nx1 x s8<0.05>")
    assert kinds(lowered(text, TENSORRT)) == ["table"]


def test_a_wide_operand_of_a_real_scale_has_an_index_at_a_multiple_of_it() -> None:
    target = replace(
        TENSORRT, activations=replace(TENSORRT.activations, bits=(8, 16)), costs=Costs(CostRule.BIT_OPERATIONS)
    )
    text = typed("%y = Tanh %x : Nx1 x s8<0.0078125> in [-1.0, 1.0]", x="Nx1 x s16<0.001>")
    graph = lowered(text, target)
    assert kinds(graph) == ["requantize", "table"]
    index = graph.ops[0].result.type.element
    assert isinstance(index, AffineType)
    assert str(index.storage) == "s8"
    assert float(index.scale.data) == pytest.approx(0.256)
    y = run(text, target, x=[[-32768], [-128], [-127], [129], [2000]])
    assert (
        y.tolist() == np.clip(np.rint(np.tanh([[-32.768], [0.0], [0.0], [0.256], [2.048]]) * 128), -128, 127).tolist()
    )


def test_a_wide_operand_with_a_zero_point_has_no_index() -> None:
    text = typed("%y = Tanh %x : Nx1 x s8<0.0078125> in [-1.0, 1.0]", x="Nx1 x s16<0.001, zero=5>")
    assert "island" in str(lowered(text, TENSORRT))


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        (Rounding.HALF_EVEN, [-2, 0, 0, 0, 2, 2]),
        (Rounding.HALF_AWAY, [-2, -1, 0, 1, 2, 3]),
        (Rounding.HALF_UP, [-1, 0, 0, 1, 2, 3]),
        (Rounding.FLOOR, [-2, -1, 0, 0, 1, 2]),
    ],
)
def test_entries_of_a_table_round_as_the_contract_says(rounding: Rounding, expected: list[int]) -> None:
    target = replace(TENSORRT, functions=replace(TENSORRT.functions, rounding=rounding))
    text = typed("%y = LeakyRelu %x {alpha=1.0} : Nx1 x s8<1.0> in [-1.0, 1.0]", x="Nx1 x s8<0.5>")
    assert run(text, target, x=[[-3], [-1], [0], [1], [3], [5]]).reshape(-1).tolist() == expected


def test_a_table_a_channel_of_real_slopes() -> None:
    body = "%k = const {value=f32 2x1 [0.5, -0.25]} : 2x1 x s16<2^-10> in [-0.25, 0.5]\n"
    body += "  %y = PRelu %x, %k : Nx2x1 x s16<2^-8> in [-1.0, 1.0]"
    graph = lowered(typed(body, x="Nx2x1 x s10<2^-8>"), DSP)
    assert [v.type.shape for v in graph.constants] == [(2, 1024)]
    y = run(typed(body, x="Nx2x1 x s10<2^-8>"), DSP, x=[[[-101], [-102]], [[7], [-511]]])
    assert y.tolist() == [[[-51], [26]], [[7], [128]]]  # -50.5 and 25.5 away from zero; 127.75


def test_softmax_without_an_integer_form() -> None:
    text = typed('%y = Softmax %x {axis=1} : Nx4 x s8<0.00390625> in [0.0, 1.0] loc("top")', x="Nx4 x s8<0.5>")
    graph = lowered(text, TENSORRT)
    assert [op.island_mark for op in graph.ops] == ["", "island tolerance", ""]
    words = r"Softmax %y \(from node \"top\"\) has no integer form on fpga: the target has no integer softmax; fpga has"
    with pytest.raises(PassError, match=words):
        lowered(typed('%y = Softmax %x {axis=1} : Nx4 x s8<2^-7> in [0.0, 1.0] loc("top")', x="Nx4 x s8<2^-1>"), FPGA)


# Means and averages


@pytest.mark.parametrize("count", [1, 2, 3, 7, 49, 1000])
@pytest.mark.parametrize("target", ["dsp16", "dsp16-acc40", "fpga", "asic"])
def test_a_mean_by_products_is_near_and_never_leaves_the_accumulator(target: str, count: int) -> None:
    contract = load_target(target)
    bits = 8 if target == "asic" else 16
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    rng = np.random.default_rng(count)
    x = np.stack(
        [np.full(count, low), np.full(count, high), rng.integers(low, high + 1, count), rng.choice([low, high], count)]
    )
    text = typed(f"%y = ReduceMean %x {{axes=[1], keepdims=false}} : N x s{bits}<2^-4> in [{low / 16}, {high / 16}]",
                 x=f"Nx{count} x s{bits}<2^-4>")  # fmt: skip
    text = text.replace("in [-1.0, 1.0]", f"in [{low / 16}, {high / 16}]")
    found = run(text, contract, x=x)
    # A rounding of the sum and one of the mean, a weight that is off by 2^-15, and steps of 2^-11 rounded down.
    error = 2 + 2.0 ** (bits - 16) + (count * 2.0**-11 if target == "asic" else 0)
    assert np.abs(found - x.mean(axis=1)).max() <= error
    assert np.abs(found[:2]).max() > high - error - 1


def test_a_mean_sums_first_where_room_would_take_bits_of_its_weight() -> None:
    """49 elements of 16 bits: their sum, 2^6 a unit, then 1 / 49 in 16 bits; 1 / 4 needs but one bit of a weight."""
    text = typed("%y = ReduceMean %x {axes=[1], keepdims=false} : N x s16<2^-15> in [-1.0, 1.0]", x="Nx49 x s16<2^-15>")
    graph = lowered(text, DSP)
    assert kinds(graph) == ["reshape", "matmul", "requantize", "matmul", "requantize", "reshape"]
    ones, weight = (v for v in graph.constants)
    assert graph.constants[ones].data.tolist() == [[1]] * 49
    assert graph.constants[weight].data.tolist() == [[round(2**20 / 49 - 0.5)]]
    assert len(kinds(lowered(text, FPGA))) == 4
    assert len(kinds(lowered(text, with_accumulator(DSP, bits=24)))) == 6
    assert len(kinds(lowered(text.replace("Nx49", "Nx64"), DSP))) == 4
    assert len(kinds(lowered(text, with_accumulator(DSP, bits=21)))) == 4  # 49 * 2^16 would leave them


@pytest.mark.parametrize("target", [ASIC, with_accumulator(DSP, bits=20)])
def test_a_small_mean_of_large_elements_has_room_on_the_way(target: Target) -> None:
    bits = target.activations.default or 16
    text = typed(
        f"%y = ReduceMean %x {{axes=[1], keepdims=false}} : N x s{bits}<2^{-bits - 3}> in [-0.03125, 0.03125]",
        x=f"Nx32 x s{bits}<2^{1 - bits}>",
    )
    end = 7 << (bits - 4)
    x = np.array([[-end] * 16 + [end] * 16, [end] * 16 + [-end] * 16])
    assert np.abs(run(text, target, x=x)).max() <= 2


def test_a_mean_in_a_guarded_accumulator() -> None:
    """140 times 127 leaves 15 bits on the way; read out of 23 bits to 15, the sum saturates."""
    target = replace(
        ARM,
        accumulator=replace(ARM.accumulator, bits=15, guard_bits=8, overflow=Overflow.SATURATE),
        requantization=Requantization(RequantizeForm.SINGLE_ROUND),
    )
    text = typed("%y = ReduceMean %x {axes=[1], keepdims=false} : N x s8<1.0> in [-1.0, 1.0]", x="Nx140 x s8<1.0>")
    back = np.concatenate([np.full(139, 127), [-128]])
    y = run(text, target, x=np.stack([np.full(140, 127), np.full(140, 50), back]))
    assert y.tolist() == [round(16383 / 140), 50, round(16383 / 140)]
    guarded = [str(op.result.type.element) for op in lowered(text, target).ops]
    assert guarded[:2] == ["s23", "s15"]


def test_a_mean_sums_elements_and_no_products() -> None:
    target = replace(ARM, product=Product(8, Overflow.SATURATE, 1))
    text = typed("%y = ReduceMean %x {axes=[1], keepdims=false} : N x s8<1.0> in [-1.0, 1.0]", x="Nx3 x s8<1.0>")
    assert run(text, target, x=[[100, 101, 102]]).tolist() == [101]
    assert "product" not in str(lowered(text, target))


def test_a_mean_takes_the_width_that_is_proved() -> None:
    target = replace(
        ARM,
        accumulator=replace(ARM.accumulator, bits=Width.PROVED),
        requantization=Requantization(RequantizeForm.SINGLE_ROUND),
    )
    text = typed("%y = ReduceMean %x {axes=[1], keepdims=false} : N x s8<1.0> in [-1.0, 1.0]", x="Nx100 x s8<1.0>")
    total = lowered(text, target).ops[0]
    assert str(total.result.type.element) == "s15"  # 100 * 128 = 12800, below 2^14
    assert run(text, target, x=[[-128] * 100, [127] * 100]).tolist() == [-128, 127]


WINDOW = "{kernel=[2], strides=[2], pads=[0, 0], dilations=[1], ceil_mode=false, count_include_pad=false}"


@pytest.mark.parametrize("rounding", Rounding)
def test_an_average_of_integers_rounds_as_the_contract_says(rounding: Rounding) -> None:
    target = replace(DSP, pooling=Pooling(AverageRule.INTEGER, rounding))
    text = typed(f"%y = AveragePool %x {WINDOW} : Nx1x5 x s16<2^-4> in [-1.0, 1.0]", x="Nx1x10 x s16<2^-4>")
    x = np.array([[[-3, -2, -1, 0, 0, 1, 2, 3, 3, 4]]])
    sums = x.reshape(5, 2).sum(axis=1)
    assert run(text, target, x=x).reshape(-1).tolist() == round_divide(sums, 2, rounding).tolist()


def test_an_average_in_floating_point_is_an_island() -> None:
    text = typed(f"%y = AveragePool %x {WINDOW} : Nx1x2 x s8<0.5> in [-1.0, 1.0]", x="Nx1x4 x s8<0.5>")
    graph = lowered(text, TENSORRT)
    assert kinds(graph) == ["dequantize", "AveragePool", "quantize"]
    assert run(text, TENSORRT, x=[[[1, 2, 2, 3]]]).tolist() == [[[2, 2]]]  # 1.5 and 2.5: ties to even


# Sums and products of tensors


@pytest.mark.parametrize(("a", "b"), [(-15, -15), (-15, -12), (-12, -15), (-20, 0), (0, -40), (30, -30)])
@pytest.mark.parametrize("target", [DSP, FPGA])
def test_sums_of_points_that_lie_near_or_far_apart(target: Target, a: int, b: int) -> None:
    """Within one unit of the result: the finer operand loses at most what that unit cannot see."""
    point = max(a, b) + 1
    text = typed(f"%y = Add %a, %b : Nx1 x s16<2^{point}> in [-1.0, 1.0]", a=f"Nx1 x s16<2^{a}>", b=f"Nx1 x s16<2^{b}>")
    rng = np.random.default_rng(0)
    x, z = (rng.integers(-32768, 32768, (500, 1)) for _ in range(2))
    y = run(text, target, a=x, b=z)
    real = (x * 2.0**a + z * 2.0**b) / 2.0**point
    wrapped = (y - real + 32768) % 65536 - 32768 if target is FPGA else y - np.clip(real, -32768, 32767)
    assert np.abs(wrapped).max() <= 1


def test_multipliers_of_21_bits() -> None:
    assert sum_multipliers([np.float32(0.5), np.float32(0.25)], np.float32(0.125)) == ([1 << 20, 1 << 19], 18)
    assert sum_multipliers([np.float32(0.3), np.float32(1e-5)], np.float32(1.0)) == ([1258291, 42], 22)


@pytest.mark.parametrize(
    ("a", "out", "words"),
    [
        ("s8<0.5>", "s8<0.001953125>", "2^-10 to 2^8 times"),
        ("s8<0.0004>", "s8<0.5>", "2^-10 to 2^8 times"),
        ("s16<0.5>", "s8<0.5>", "operands of more than 8 do not fit 32"),
    ],
)
def test_sums_that_xnnpack_leaves_to_others(a: str, out: str, words: str) -> None:
    context = PassContext(load_target("arm-neon-xnnpack"))
    text = typed(f"%y = Add %a, %a : Nx1 x {out} in [-1.0, 1.0]", a=f"Nx1 x {a}")
    fixed = parse_pipeline("legalize").run(parse(text), context)
    assert kinds(fixed).count("Add") == 1
    assert words in context.notes[1]


def test_products_of_16_bits_with_zero_points_take_more_than_32() -> None:
    """(q + 32768)^2 at the end of the range is 2^32, which no 32 bits hold."""
    text = typed(
        "%y = Mul %x, %x : Nx1 x s16<2.0, zero=-32768> in [-1.0, 1.0]", x="Nx1 x s16<0.0055242716, zero=-32768>"
    )
    single = replace(ARM, requantization=Requantization(RequantizeForm.SINGLE_ROUND))
    y = run(text, single, x=[[-32768], [0], [32767]])
    expected = np.rint(np.array([[0.0], [32768.0**2], [65535.0**2]]) * np.float32(0.0055242716) ** 2 / 2) - 32768
    assert np.abs(y - expected).max() <= 1
    assert "64" in str(lowered(text, single).ops[0].result.type.element)
    with pytest.raises(PassError, match="its products take 34 bits, and double_round takes 32"):
        lowered(text, load_target("cortex-m"))


# Widths and overrides


@pytest.mark.parametrize(
    ("target", "expected"),
    [("arm-neon", (8, 8)), ("arm-neon-16x8", (8, 16)), ("fpga", (8, 16)), ("asic", (8, 8)), ("dsp16", (16, 16))],
)
def test_default_widths(target: str, expected: tuple[int, int]) -> None:
    assert default_widths(load_target(target)) == expected


def test_without_a_default_the_cheapest_widths_are_taken_and_of_equals_the_widest() -> None:
    free = replace(
        FPGA,
        activations=replace(FPGA.activations, bits=(4, 8, 16), default=None),
        weights=replace(FPGA.weights, bits=(4, 8), default=None),
    )
    assert default_widths(free) == (4, 4)
    costs = {f"{w}x{a}": (1.0 if a < 16 else 2.0) for w in (4, 8) for a in (4, 8, 16)}
    assert default_widths(replace(free, costs=Costs(mac=costs))) == (8, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fc",
        "fc:",
        ":8",
        "fc:8w",
        "fc:x8",
        "fc:w",
        "fc:123",
        "fc:-8",
        "fc:4/codebook",
        "fc:a4/codebook",
        "fc:w4/",
        "fc:w4/ternary",
        "fc:w/codebook",
    ],
)
def test_an_override_of_another_form(text: str) -> None:
    with pytest.raises(PassError, match=r"is not of the form pattern:bits, pattern:w4 or pattern:a8"):
        AssignBitWidths(override=(text,))


@pytest.mark.parametrize(
    ("target", "override", "words"),
    [
        ("arm-neon", "fc:4", "override 'fc:4': arm-neon has activations of 8 bits, not 4"),
        ("arm-neon", "fc:w4", "override 'fc:w4': arm-neon has weights of 8 bits, not 4"),
        ("tensorrt", "fc:w5", "override 'fc:w5': tensorrt has weights of 8, 4 bits, not 5"),
        ("tensorrt", "fc:4", "override 'fc:4': tensorrt has activations of 8 bits, not 4"),
        ("tensorrt", "conv*:w4", "override 'conv*:w4' matches no result and no location of the graph"),
        ("fpga", "w:8", "override 'w:8' matches no result and no location of the graph"),
        ("fpga", "fc:w17", "fpga has weights of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 bits, not 17"),
        ("fpga", "fc:w6/power_of_two", "'fc:w6/power_of_two': fpga has power_of_two weights of 2, 3, 4, 5 bits, not 6"),
        ("fpga", "fc:w7/codebook", "'fc:w7/codebook': fpga has codebook weights of 1, 2, 3, 4, 5, 6 bits, not 7"),
        (
            "arm-neon",
            "fc:w4/codebook",
            "override 'fc:w4/codebook': arm-neon has no codebook weights, only uniform; list codebook under its "
            "weights.formats",
        ),
        ("tensorrt", "fc:w4/power_of_two", "'fc:w4/power_of_two': tensorrt has no power_of_two weights, only uniform"),
    ],
)
def test_an_override_that_the_target_or_the_graph_lacks(target: str, override: str, words: str) -> None:
    pattern, _, bits = override.rpartition(":")
    with pytest.raises(PassError) as caught:
        compiled(load_target(target), overrides={pattern: bits})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "widths"),
    [("fc:6", (6, 6)), ("fc:w6", (6, 16)), ("fc:a6", (8, 6)), ("f?:a6;y:w3", (3, 6)), ("*:5;y:a9", (5, 9))],
)
def test_an_override_of_weights_results_or_both(override: str, widths: tuple[int, int]) -> None:
    pipeline = str(qir.default_pipeline()).replace("assign-bit-widths", f"assign-bit-widths{{override={override}}}")
    graph = compiled(FPGA, pipeline=pipeline).graph
    (total,) = (op for op in graph.ops if op.mnemonic == "matmul")
    stored = [storage_of(v.type.element) for v in (total.operands[1], graph.outputs[0])]
    assert tuple(s.bits for s in stored if s is not None) == widths


# Weights alone


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17])
def test_packed_integers_come_back(packing: Packing, count: int) -> None:
    values = np.resize(np.arange(-8, 8), count)
    packed = pack(values, packing)
    assert packed.dtype == np.uint8
    assert packed.shape == ((count + 1) // 2,)
    np.testing.assert_array_equal(unpack(packed, count, packing), values.astype(np.int8), strict=True)


def test_the_two_packings() -> None:
    assert pack(np.array([1, -8, 7]), Packing.LOW_FIRST).tolist() == [0x81, 0x07]
    assert pack(np.array([1, -8, 7]), Packing.HIGH_FIRST).tolist() == [0x18, 0x70]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("block", [1, 3, 4, 7, 100])
def test_blocks_of_weights(axis: int, block: int) -> None:
    data = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    data[:3, :3] = 0
    integers, scales = quantize_blocks(data, axis, block, 4)
    count = math.ceil(7 / block)
    assert scales.shape == ((count, 7) if axis == 0 else (7, count))
    assert scales.dtype == np.float32
    assert -8 <= integers.min() <= integers.max() <= 7
    spread = np.repeat(scales, block, axis=axis).take(range(7), axis=axis)
    assert np.abs(integers * spread - data).max() <= spread.max() / 2 * (1 + 1e-6)
    for start in range(0, 7, block):
        part = np.abs(data if axis == 0 else data.T)[start : start + block].max(axis=0)
        found = (scales if axis == 0 else scales.T)[start // block]
        np.testing.assert_array_equal(found, np.where(part > 0, part / 7, 1).astype(np.float32))


@pytest.mark.parametrize("packing", Packing)
def test_a_layer_of_weights_alone(packing: Packing) -> None:
    assert TENSORRT.weight_only is not None
    target = replace(TENSORRT, weight_only=replace(TENSORRT.weight_only, block=3, packing=packing))
    program = compiled(target, overrides={"fc": "w4"})
    assert kinds(program.graph) == ["dequantize_blocks", "dequantize", "MatMul", "quantize"]
    constants = {v.type.shape: a for v, a in program.graph.constants.items()}
    assert {(12,), (3, 3), (3,)} == constants.keys()  # 24 integers of 4 bits, 3 blocks of 3 columns, the bias
    data = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    integers, scales = quantize_blocks(data, 0, 3, 4)
    np.testing.assert_array_equal(constants[12,].data, pack(integers.reshape(-1), packing))
    y = program.run({"x": X})["y"]
    assert np.abs(y - X @ (integers * np.repeat(scales, 3, axis=0)[:8])).max() < 0.05
    assert program.weight_bytes() < compiled(TENSORRT).weight_bytes() + 40


def test_entries_far_beyond_the_grid_saturate() -> None:
    assert quantize_reals(np.array([np.inf, -np.inf, np.nan], np.float32), Rounding.HALF_EVEN).tolist() == [
        1 << 62,
        -(1 << 62),
        0,
    ]
    text = typed("%y = Tanh %x : Nx1 x s8<0.000001> in [-1.0, 1.0]", x="Nx1 x s8<0.5>")
    assert run(text, TENSORRT, x=[[-128], [0], [127]]).reshape(-1).tolist() == [-128, 0, 127]
