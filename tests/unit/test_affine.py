"""Affine forms: what cancels or rejoins is seen, in any layout, and bounds are never wider than those of intervals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

import qir
from qir.errors import PassError, VerifyError
from qir.fixed_point import RequantizeForm, Rounding, requantize, rounded_product
from qir.interpreter import trace
from qir.interval import Interval
from qir.ir import Graph, Stage
from qir.ops.float_elementwise import Sub
from qir.ops.float_pool import ReduceMean
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.proof import prove
from qir.rewrite import GraphBuilder
from qir.types import BATCH, TensorType, storage_of

HALF = "multiplier=s64 [1073741824], input_shift=0, form=double_round, overflow=saturate"
SUM = "accumulator=s32, overflow=wrap, order=khwc"


def numbers(*values: int) -> str:
    return ", ".join(map(str, values))


def hull(graph: Graph, name: str, method: str = "affine") -> Interval:
    found = prove(graph, method).interval(graph.value(name))
    assert found is not None
    return found


def extremes(graph: Graph, name: str, samples: Sequence[npt.NDArray[np.generic]]) -> Interval:
    """The least and the greatest of what was seen at a value, over inputs of random bounds and given ones."""
    (x,) = graph.inputs
    storage = storage_of(x.type.element)
    assert storage is not None
    ends = np.array([storage.lo, storage.hi]).astype(storage.dtype)
    feeds = [np.random.default_rng(0).choice(ends, x.type.concrete(2000)), *samples]
    seen = [trace(graph, {x.name: feed})[name] for feed in feeds]
    return Interval(min(int(s.min()) for s in seen), max(int(s.max()) for s in seen))


def assert_sound_and_narrower(graph: Graph, name: str, samples: Sequence[npt.NDArray[np.generic]] = ()) -> Interval:
    affine, interval = hull(graph, name), hull(graph, name, "interval")
    assert interval.contains(affine)
    assert affine != interval
    assert affine.contains(extremes(graph, name, samples))
    return affine


MEAN = f"""
    graph @g stage=fixed (%x: Nx4x4x3 x s8<0.5, zero=3>) {{
      %s = reduce_sum %x {{{SUM}, axes=[AXES], keepdims=true}} : NxSHAPE x s32
      %m = requantize %s {{{HALF}, shift=s64 [SHIFT]}} : NxSHAPE x s8<0.5, zero=3>
      %y = sub %x, %m {{overflow=saturate}} : Nx4x4x3 x s16<0.5, zero=0>
      %z = requantize %y {{{HALF}, shift=s64 [1]}} : Nx4x4x3 x s8<0.5, zero=0>
      return %z
    }}"""


def mean(axes: str, shape: str, shift: int = -3) -> Graph:
    """An input less its sum over axes times 2^(shift - 1)."""
    return parse(MEAN.replace("AXES", axes).replace("SHAPE", shape).replace("SHIFT", str(shift)))


def one_against_all(position: tuple[int, ...]) -> list[npt.NDArray[np.int8]]:
    """An element at one end of its range, all others at the other."""
    low, high = (np.full((1, 4, 4, 3), e, np.int8) for e in (-128, 127))
    low[(0, *position)], high[(0, *position)] = 127, -128
    return [low, high]


def test_x_less_its_mean_over_positions_is_exact() -> None:
    graph = mean("1, 2", "1x1x3")
    affine = assert_sound_and_narrower(graph, "y", one_against_all((0, 0, 0)))
    assert affine == extremes(graph, "y", one_against_all((0, 0, 0))) == Interval(-239, 239)
    assert hull(graph, "y", "interval") == Interval(-255, 255)


@pytest.mark.parametrize(
    ("axes", "shape", "shift"),
    [("3", "4x4x1", -1), ("1", "1x4x3", -1), ("2", "4x1x3", -1), ("2, 3", "4x1x1", -3), ("1, 2, 3", "1x1x1", -5)],
)
def test_x_less_a_share_of_its_sum_over_any_axes(axes: str, shape: str, shift: int) -> None:
    assert_sound_and_narrower(mean(axes, shape, shift), "y", one_against_all((1, 2, 0)))


def test_a_mean_by_a_matrix_product_in_another_layout() -> None:
    """As legalize writes it where a chip only shifts: transpose, reshape, weights that are all the same."""
    graph = parse(f"""
        graph @g stage=fixed (%x: Nx4x4x3 x s8<2^-3>) {{
          %t = transpose %x {{perm=[0, 3, 1, 2]}} : Nx3x4x4 x s8<2^-3>
          %r = reshape %t {{shape=[3, 16]}} : Nx3x16 x s8<2^-3>
          %w = const {{value=s8 16x1 [{numbers(*[64] * 16)}]}} : 16x1 x s8
          %a = matmul %r, %w {{accumulator=s24, overflow=saturate, order=khwc, product_shift=-4, rounding=floor}} : Nx3x1 x s24
          %m = requantize %a {{multiplier=s64 [1], shift=s64 [-6], form=shift, input_shift=0, rounding=half_even, overflow=saturate}} : Nx3x1 x s8<2^-3>
          %b = reshape %m {{shape=[1, 1, 3]}} : Nx1x1x3 x s8<2^-3>
          %y = sub %x, %b {{overflow=saturate}} : Nx4x4x3 x s16<2^-3>
          return %y
        }}""")  # noqa: E501
    affine = assert_sound_and_narrower(graph, "y", one_against_all((0, 0, 0)))
    assert affine.contains(Interval(-239, 239))
    assert Interval(-241, 241).contains(affine)  # sixteen products are rounded down, each by less than a 1/1024


LINEAR = """
    graph @g stage=fixed (%x: Nx5x4x2 x s8<0.5, zero=-7>) {{
      %w = const {{value=s8 2x3x3x2 [{w}]}} : 2x3x3x2 x s8
      %v = const {{value=s8 2x3x3x2 [{v}]}} : 2x3x3x2 x s8
      %a = conv2d %x, %w {{{sum}, pads=[1, 1, 1, 1], strides={strides}, dilations=[1, 1], groups=1}} : Nx{shape}x2 x s32
      %b = conv2d %x, %v {{{sum}, pads=[1, 1, 1, 1], strides={strides}, dilations=[1, 1], groups=1}} : Nx{shape}x2 x s32
      %p = requantize %a {{{half}, shift=s64 [-1]}} : Nx{shape}x2 x s24<1, zero=0>
      %q = requantize %b {{{half}, shift=s64 [-1]}} : Nx{shape}x2 x s24<1, zero=0>
      %y = sub %p, %q {{overflow=saturate}} : Nx{shape}x2 x s24<1, zero=0>
      %c = concat %q, %p {{axis=3}} : Nx{shape}x4 x s24<1, zero=0>
      %k = const {{value=s8 4x3 [{k}]}} : 4x3 x s8
      %z = matmul %c, %k {{{sum}}} : Nx{shape}x3 x s32
      return %y, %z
    }}"""
W = [(7 * i * i + 3 * i) % 19 - 9 for i in range(36)]


def linear(strides: str = "[1, 1]", shape: str = "5x4", gap: int = 1) -> Graph:
    """Two convolutions whose weights differ by little, subtracted, and joined by concat and a matrix product."""
    v = [w + (gap if i % 5 == 0 else 0) for i, w in enumerate(W)]
    k = numbers(1, 2, 0, 0, 1, 1, -1, -2, 0, 0, 0, -1)
    return parse(LINEAR.format(w=numbers(*W), v=numbers(*v), k=k, strides=strides, shape=shape, sum=SUM, half=HALF))


@pytest.mark.parametrize(("strides", "shape"), [("[1, 1]", "5x4"), ("[2, 2]", "3x2"), ("[1, 3]", "5x2")])
def test_linear_branches_that_rejoin(strides: str, shape: str) -> None:
    graph = linear(strides, shape)
    affine = assert_sound_and_narrower(graph, "y")
    assert int(affine.hi) < int(hull(graph, "y", "interval").hi) // 10
    assert_sound_and_narrower(graph, "z")


def test_the_sums_over_a_rejoined_concat_take_fewer_bits() -> None:
    """Every partial sum is bounded from the form of the operand, too."""
    graph = linear()
    partials = [prove(graph, m).steps[graph.ops[-1]].partial for m in ("interval", "affine")]
    assert partials[0] is not None
    assert partials[1] is not None
    assert partials[0].contains(partials[1])
    assert partials[0] != partials[1]


def test_branches_that_are_the_same_leave_but_roundings() -> None:
    assert hull(linear(gap=0), "y") == Interval(-1, 1)


def test_what_a_gate_leaves_of_x() -> None:
    """Of x - x * s with s in [0, 255 / 256]: squeeze and excite, less its input."""
    graph = parse(f"""
        graph @g stage=fixed (%x: Nx4x4x3 x s8<0.5, zero=0>) {{
          %s = reduce_sum %x {{{SUM}, axes=[1, 2], keepdims=true}} : Nx1x1x3 x s32
          %m = requantize %s {{{HALF}, shift=s64 [-3]}} : Nx1x1x3 x s8<0.5, zero=0>
          %t = const {{value=u8 256 [{numbers(*range(256))}]}} : 256 x u8
          %g = table %m, %t : Nx1x1x3 x u8<0.00390625, zero=0>
          %p = mul %x, %g {{overflow=saturate}} : Nx4x4x3 x s24
          %r = requantize %p {{{HALF}, shift=s64 [-7]}} : Nx4x4x3 x s8<0.5, zero=0>
          %y = sub %x, %r {{overflow=saturate}} : Nx4x4x3 x s16<0.5, zero=0>
          return %y
        }}""")
    affine = assert_sound_and_narrower(graph, "y", one_against_all((0, 0, 0)))
    assert Interval(-129, 129).contains(affine)


def test_a_residual_through_a_clamp_attains_its_interval_bound() -> None:
    graph = parse(f"""
        graph @g stage=fixed (%x: Nx3 x s8<0.5, zero=0>) {{
          %r = requantize %x {{{HALF}, shift=s64 [1]}} : Nx3 x u8<0.5, zero=0>
          %y = add %x, %r {{overflow=saturate}} : Nx3 x s16<0.5, zero=0>
          return %y
        }}""")
    assert hull(graph, "y") == hull(graph, "y", "interval") == extremes(graph, "y", []) == Interval(-128, 254)


def test_a_clamp_that_cuts_little_keeps_the_form() -> None:
    """17 / 16 of the mean reaches [-136, 135], of which [-128, 127] stay: the form is off by up to 8 either way."""
    graph = parse(str(mean("1, 2", "1x1x3")).replace("[1073741824], shift=s64 [-3]", "[1140850688], shift=s64 [-3]"))
    step = prove(graph).steps[graph.ops[1]]
    assert step.unsaturated == Interval(-136, 135)
    affine = assert_sound_and_narrower(graph, "y", one_against_all((0, 0, 0)))
    assert affine == Interval(-254, 254)


def compiled(target: str) -> Graph:
    """An input less its mean, quantized on inputs that drive both to their ends."""
    builder = GraphBuilder("centre", Stage.FLOAT)
    x = builder.input("x", TensorType((BATCH, 3, 4, 4)))
    m = builder.emit(ReduceMean, [x], axes=(2, 3), keepdims=True, name="m")
    y = builder.emit(Sub, [x, m], clip=None, name="y")
    ends = np.ones((1, 3, 4, 4), np.float32)
    one = ends.copy()
    one[:, :, 0, 0] = -1
    return qir.compile(builder.finish([y], ["y"]), target, [{"x": s} for s in (ends, -ends, one, -one)]).graph


@pytest.mark.parametrize("target", ["arm-neon", "arm-neon-16x8", "arm-neon-xnnpack", "cortex-m", "fpga", "asic"])
def test_a_compiled_model(target: str) -> None:
    graph = compiled(target)
    (difference,) = (op.result.name for op in graph.ops if op.mnemonic == "sub")
    assert_sound_and_narrower(graph, difference)


def test_a_stated_range_that_only_affine_forms_support_holds() -> None:
    graph = mean("1, 2", "1x1x3")
    narrow = RangeAnalysis(method="affine").run(graph, PassContext())
    assert narrow.value("y").range == Interval(-239, 239)
    assert qir.Program(narrow).graph is narrow
    assert parse(str(narrow)) == narrow


def test_a_stated_range_that_nothing_supports_is_refused() -> None:
    narrow = RangeAnalysis(method="affine").run(mean("1, 2", "1x1x3"), PassContext())
    false = parse(str(narrow).replace("[-239, 239]", "[-238, 239]"))
    with pytest.raises(VerifyError, match=r"states the range \[-238, 239\], but \[-239, 239\] is what is proved"):
        qir.Program(false)


def test_a_method_is_named_in_the_notes() -> None:
    context = PassContext()
    RangeAnalysis(method="affine").run(mean("1, 2", "1x1x3"), context)
    assert context.notes[0] == "5 integer ranges proved, 1 of them tighter by affine forms"
    with pytest.raises(PassError, match="there are: interval, affine"):
        RangeAnalysis(method="zonotope")


@pytest.mark.parametrize("form", list(RequantizeForm))
def test_a_rounded_product_is_off_by_no_more_than_is_said(form: RequantizeForm) -> None:
    random = np.random.default_rng(1)
    reach = 1 << 20
    accumulators = [*range(-40, 41), -reach, reach, *random.integers(-reach, reach, 300).tolist()]
    roundings = list(Rounding) if form is RequantizeForm.SHIFT else [None]
    multipliers = [1 << 30, (1 << 31) - 1, 3 << 29, int(random.integers(1 << 30, 1 << 31))]
    for rounding, multiplier, shift in itertools.product(roundings, multipliers, (-9, -3, -1, 0, 2)):
        given: float = multiplier
        if form is RequantizeForm.FLOAT32:
            given = float(np.float32(multiplier * 2.0 ** (shift - 31)))
        elif form is RequantizeForm.DOUBLE_AWAY:
            given = 0.1 * multiplier * 2.0 ** (shift - 31)
        factor, below, above = rounded_product(form, rounding, given, shift, reach)
        for acc in accumulators:
            gap = int(requantize(acc, given, shift, form, rounding)) - factor * acc
            assert below <= gap <= above, (acc, given, shift)


def test_partial_sums_of_what_mixes_channels_of_a_source() -> None:
    """The operand is (x0 + x1, x0 - x1) and the sum 2 * x0: no partial sum is larger than of both at their ends."""
    graph = parse("""
        graph @g stage=fixed (%x: Nx2 x s8) {
          %w = const {value=s8 2x2 [1, 1, 1, -1]} : 2x2 x s8
          %a = matmul %x, %w {accumulator=s32, overflow=wrap, order=khwc} : Nx2 x s32
          %v = const {value=s8 2x1 [1, 1]} : 2x1 x s8
          %y = matmul %a, %v {accumulator=s32, overflow=wrap, order=khwc} : Nx1 x s32
          return %y
        }""")
    assert hull(graph, "y", "interval") == Interval(-511, 509)
    assert hull(graph, "y") == Interval(-256, 254)
    assert prove(graph, "affine").steps[graph.ops[-1]].partial == Interval(-256, 254)
