"""Equivalence: each way to hold a pass to the bits, and passes made wrong on purpose that each of them catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import qir
from qir import probes
from qir.arrays import Array
from qir.equivalence import Method, differ_in_facts_only
from qir.fixed_point import Overflow, Rounding
from qir.interpreter import interpret
from qir.interval import Interval
from qir.ir import Graph, Op
from qir.ops.constant import Const
from qir.ops.float_elementwise import Clip
from qir.pass_manager import Differential, Pass, PassContext, Pipeline
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.range_analysis import RangeAnalysis
from qir.probes import count_inputs, every_input, some_inputs
from qir.proof import prove
from qir.rewrite import map_values
from qir.types import integer

Tensor = npt.NDArray[Any]
Rewrite = Callable[[Graph], Graph]


@dataclass(frozen=True)
class Wrong(Pass):
    """Rewrites as it is told."""

    rewrite: Rewrite = lambda graph: graph
    claims: bool = True
    name: ClassVar[str] = "wrong"

    @property
    def preserves_bits(self) -> bool:
        return self.claims

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return self.rewrite(graph)


def held(graph: Graph, *passes: Pass, **options: Any) -> qir.Equivalence:
    """The instrument after the passes."""
    found = qir.Equivalence(**options)
    Pipeline(passes).run(graph, PassContext(), [found])
    return found


def summary(found: qir.Equivalence) -> list[tuple[str, str, int, int]]:
    return [(r.pass_name, r.method, r.inputs, r.differing) for r in found.records]


def on(mnemonic: str, **attributes: Any) -> Rewrite:
    """Other attributes of every op of a kind."""
    return lambda graph: map_values(
        graph, lambda v: {}, attributes=lambda op: attributes if op.mnemonic == mnemonic else {}
    )


def of_value(name: str, /, **changes: Any) -> Rewrite:
    """Other facts or another type of a value."""
    return lambda graph: map_values(graph, lambda v: changes if v.name == name else {})


def of_type(name: str, element: Any) -> Rewrite:
    return lambda graph: map_values(
        graph, lambda v: {"type": replace(v.type, element=element)} if v.name == name else {}
    )


def with_data(name: str, change: Callable[[Tensor], Tensor]) -> Rewrite:
    """Other numbers of a constant."""

    def rewrite(graph: Graph) -> Graph:
        def attributes(op: Op) -> dict[str, Any]:
            return {"value": Array(change(op.value.data))} if isinstance(op, Const) and op.result.name == name else {}

        return map_values(graph, lambda v: {}, attributes=attributes)

    return rewrite


LAYER = """
graph @layer stage=fixed (%x: Nx4 x s8) {
  %w = const {value=s8 4x2 [127, 1, -127, 1, 127, 1, 127, -1]} : 4x2 x s8
  %acc = matmul %x, %w {accumulator=s16, overflow=saturate, order=khwc} : Nx2 x s16
  %y = requantize %acc {multiplier=s64 [1073741824], shift=s64 [-8], form=single_round, input_shift=0, overflow=OVERFLOW} : Nx2 x s8
  return %y
}"""  # noqa: E501


def layer(overflow: str = "saturate") -> Graph:
    return qir.parse(LAYER.replace("OVERFLOW", overflow))


# Identical: nothing runs


def test_what_range_analysis_and_insert_saturation_do_is_shown_from_the_text() -> None:
    found = held(layer(), RangeAnalysis(), InsertSaturation())
    assert summary(found) == [("range-analysis", "identical", 0, 0), ("insert-saturation", "identical", 0, 0)]


def test_passes_before_stage_fixed_are_left_alone() -> None:
    graph = qir.parse("graph @g stage=float (%x: Nx4 x f32) {\n  %y = Tanh %x : Nx4 x f32\n  return %y\n}")
    assert held(graph, qir.parse_pipeline("canonicalize")[0]).records == []


ISLAND = """
graph @island stage=fixed (%x: Nx2 x s8<0.5, zero=3>, %z: Nx2 x s8<0.5, zero=3>) {
  %r = dequantize %x : Nx2 x f32
  %k = const {value=f32 2 [0.25, 1.5]} : 2 x f32
  %m = Mul %r, %k : Nx2 x f32 island
  %c = Clip %m {minimum=0.0, maximum=9.0} : Nx2 x f32 island
  %q = quantize %c {rule=divide, rounding=half_even} : Nx2 x s8<0.25>
  %y = add %x, %z {overflow=saturate} : Nx2 x s8<0.5, zero=3>
  return %q, %y
}"""

CHANGES: dict[str, tuple[Rewrite, bool]] = {
    "a range": (of_value("y", range=Interval(-128, 127)), True),
    "a name": (of_value("y", name="renamed"), True),
    "a location": (lambda g: g.with_changes(ops=tuple(op.with_changes(location="here") for op in g.ops)), True),
    "a zero of another sign": (on("Clip", minimum=-0.0), False),
    "a constant": (with_data("k", lambda k: np.nextafter(k, np.float32(9))), False),
    "an attribute": (on("quantize", rounding=Rounding.HALF_UP), False),
    "a mode that acts": (on("add", overflow=Overflow.WRAP), False),
    "a claim that is not so": (on("add", overflow=Overflow.NONE), False),
    "a type": (of_type("y", integer(8)), False),
    "the outputs": (lambda g: g.with_changes(outputs=g.outputs[::-1]), False),
    "an operand": (
        lambda g: g.with_changes(ops=(*g.ops[:-1], g.ops[-1].with_changes(operands=g.inputs[:1] * 2))),
        False,
    ),
    "an op less": (lambda g: g.with_changes(ops=g.ops[:-1], outputs=(g.outputs[0], g.inputs[0])), False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_only_facts_and_idle_modes_make_no_difference(what: str) -> None:
    change, expected = CHANGES[what]
    graph = qir.parse(ISLAND)
    assert differ_in_facts_only(graph, change(graph)) is expected


def test_a_mode_is_idle_by_what_it_keeps() -> None:
    """Nothing leaves s8 here, but a symmetric saturation changes -128."""
    for mode, is_same in (("saturate", True), ("wrap", True), ("saturate_symmetric", False)):
        graph = qir.parse(f"""
            graph @g stage=fixed (%x: Nx1 x s8) {{
              %y = requantize %x {{multiplier=s64 [1073741824], shift=s64 [1], form=single_round, input_shift=0, overflow={mode}}} : Nx1 x s8
              return %y
            }}""")  # noqa: E501
        unsaturated = on("requantize", overflow=Overflow.NONE)
        assert differ_in_facts_only(graph, unsaturated(graph)) is is_same
        if not is_same:
            with pytest.raises(qir.PassError, match=r"from -127 to -128 on input number 1, x=\[-128\]"):
                held(graph, Wrong(unsaturated))


def test_products_are_idle_by_themselves() -> None:
    for bits, is_same in ((15, True), (14, False)):
        graph = qir.parse(f"""
            graph @g stage=fixed (%x: Nx1 x s8[-127, 127]) {{
              %w = const {{value=s8 1x1 [127]}} : 1x1 x s8
              %y = matmul %x, %w {{accumulator=s32, overflow=wrap, order=khwc, product=s{bits}, product_overflow=saturate}} : Nx1 x s32
              return %y
            }}""")  # noqa: E501
        unsaturated = on("matmul", product_overflow=Overflow.NONE)
        assert differ_in_facts_only(graph, unsaturated(graph)) is is_same
        if not is_same:
            with pytest.raises(qir.PassError, match=r"from -8192 to -16129 on input number 1, x=\[-127\]"):
                held(graph, Wrong(unsaturated))


# Exhaustive: every input runs

#: 1 where the two numbers are 37 and -90, else 0.
NEEDLE = """
graph @needle stage=fixed (%x: Nx2 x s8) {
  %k = const {value=s8 2x256 [TABLE]} : 2x256 x s8
  %w = const {value=s8 2x1 [1, 1]} : 2x1 x s8
  %hits = table %x, %k : Nx2 x s8
  %sum = matmul %hits, %w {accumulator=s32, overflow=wrap, order=khwc} : Nx1 x s32
  %y = requantize %sum {multiplier=s64 [1], shift=s64 [-1], form=shift, input_shift=0, rounding=floor, overflow=saturate} : Nx1 x s8
  return %y
}"""  # noqa: E501


def needle() -> Graph:
    table = np.zeros((2, 256), np.int8)
    table[0, 37 + 128] = table[1, -90 + 128] = 1
    return qir.parse(NEEDLE.replace("TABLE", ", ".join(map(str, table.reshape(-1).tolist()))))


def test_a_difference_on_one_input_of_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed = Wrong(of_type("y", integer(8).narrowed(-128, 0)))
    with pytest.raises(
        qir.PassError, match=r"pass wrong changed output 'y' at \[0\] from 1 to 0 on input number \d+, x=\[37, -90\]"
    ):
        held(needle(), narrowed)
    assert summary(held(needle(), narrowed, exhaustive=65535, samples=500)) == [("wrong", "tested", 500, 0)]
    monkeypatch.setattr(probes, "BATCH_BYTES", 1 << 20)
    place = (37 + 128) + (-90 + 128) * 256
    assert probes.batch_size(needle()) < place
    with pytest.raises(qir.PassError, match=f"on input number {place + 1}, "):
        held(needle(), narrowed)


def test_a_right_pass_is_shown_on_every_input() -> None:
    """Twice the weights and half the scale: other ops, the same bits."""

    def doubled(graph: Graph) -> Graph:
        return on("requantize", shift=Array(np.array([-2])))(with_data("w", lambda w: 2 * w)(graph))

    assert summary(held(needle(), Wrong(doubled))) == [("wrong", "exhaustive", 65536, 0)]


def shaped(lead: str) -> Graph:
    return qir.parse(f"""
    graph @small stage=fixed (%a: {lead}x2 x s3[-2, 3], %b: 1x3 x u1, %c: {lead}x1 x s8[7, 7]) {{
      %s = add %a, %c {{overflow=saturate}} : {lead}x2 x s8
      %t = reduce_sum %b {{accumulator=s8, overflow=wrap, order=khwc, axes=[1], keepdims=true}} : 1x1 x s8
      %y = add %s, %t {{overflow=saturate}} : {lead}x2 x s8
      return %y
    }}""")


@pytest.mark.parametrize(("lead", "count"), [("N", 36 * 8), ("1", 36 * 8), ("2", 36 * 36 * 8)])
def test_every_input_comes_once(lead: str, count: int) -> None:
    """Inputs together, with the batch open, with one number for all samples, and with a batch that is given."""
    graph = shaped(lead)
    assert count_inputs(graph, count) == count
    assert count_inputs(graph, count - 1) is None
    seen = [tuple(np.concatenate([a.reshape(-1) for a in p.values()]).tolist()) for p in every_input(graph, count)]
    size = graph.inputs[0].type.sample_size
    ends = [range(-2, 4)] * size + [range(2)] * 3 + [range(7, 8)] * (size // 2)
    assert sorted(seen) == sorted(product(*ends))
    assert summary(held(graph, Wrong(on("add", overflow=Overflow.WRAP)))) == [("wrong", "identical", 0, 0)]
    assert summary(held(graph, Wrong(of_type("s", integer(16))))) == [("wrong", "exhaustive", count, 0)]
    found = held(graph, Wrong(of_type("s", integer(16))), exhaustive=count - 1, samples=50)
    assert summary(found) == [("wrong", "tested", 50, 0)]


def test_samples_run_in_batches_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = needle()
    monkeypatch.setattr(probes, "BATCH_BYTES", 32 * 1024 * 100)
    for batches in (every_input(graph, 65536), some_inputs(graph, 1000, 0)):
        sizes = [len(feeds["x"]) for feeds in batches]
        assert max(sizes) == probes.batch_size(graph) < 200
        assert sum(sizes) in (65536, 1000)


# Tested: what is too many is chosen


def sums(name: str, activations: str = "s8") -> Graph:
    """Layers whose sums leave 16 bits only where many terms conspire."""
    random = np.random.default_rng(3)
    shape: tuple[int, ...] = (64, 3)
    kind, accumulator = "s8", "accumulator=s16, overflow=saturate, order=khwc"
    window = "pads=[1, 1, 1, 1], strides=[1, 1], dilations=[1, 1], groups=1"
    match name:
        case "matmul":
            head, body = f"%x: Nx64 x {activations}", f"%acc = matmul %x, %w {{{accumulator}}} : Nx3 x s16"
        case "conv2d":
            shape = (3, 3, 3, 7)
            head = "%x: Nx7x5x5 x s8<0.5, zero=-5>"
            body = "%t = transpose %x {perm=[0, 2, 3, 1]} : Nx5x5x7 x s8<0.5, zero=-5>\n  "
            body += f"%acc = conv2d %t, %w {{{accumulator}, {window}}} : Nx5x5x3 x s16"
        case _:
            shape, kind = (4, 3, 3, 4), "s8<0.5, zero=2>"
            head = "%x: 1x4x4x8 x s16[-500, 500]"
            body = "%q = requantize %x {multiplier=s64 [1], shift=s64 [-2], form=shift, input_shift=0, rounding=floor, "
            body += "overflow=saturate} : 1x4x4x8 x s8\n  "
            body += f"%acc = conv2d %q, %w {{{accumulator.replace('khwc', 'ckhw')}, "
            body += f"{window.replace('groups=1', 'groups=2')}}} : 1x4x4x4 x s16"
    data = random.integers(-16, 17, shape)
    numbers = f"value=s8 {'x'.join(map(str, shape))} [{', '.join(map(str, data.reshape(-1).tolist()))}]"
    return qir.parse(f"""
    graph @sums stage=fixed ({head}) {{
      %w = const {{{numbers}}} : {"x".join(map(str, shape))} x {kind}
      {body}
      return %acc
    }}""")


@pytest.mark.parametrize("name", ["matmul", "conv2d", "groups"])
@pytest.mark.parametrize("mode", [Overflow.WRAP, Overflow.NONE])
def test_sums_are_driven_to_their_ends_by_the_signs_of_the_weights(name: str, mode: Overflow) -> None:
    graph = sums(name)
    kind = "matmul" if name == "matmul" else "conv2d"
    unsafe = on(kind, overflow=mode)
    with pytest.raises(qir.PassError, match="pass wrong changed output 'acc' at"):
        held(graph, Wrong(unsafe), samples=64)
    random = np.random.default_rng(0)
    storage = qir.types.storage_of(graph.inputs[0].type.element)
    assert storage is not None
    x = random.integers(storage.lo, storage.hi, graph.inputs[0].type.concrete(64), storage.dtype, endpoint=True)
    expected, missed = (interpret(g, {"x": x})["acc"] for g in (graph, unsafe(graph)))
    np.testing.assert_array_equal(missed, expected)  # which random numbers do not find


@pytest.mark.parametrize("name", ["matmul", "conv2d", "groups"])
def test_every_sum_is_driven_to_what_is_proved(name: str) -> None:
    kind = "matmul" if name == "matmul" else "conv2d"
    graph = of_type("acc", integer(32))(on(kind, accumulator=integer(32))(sums(name)))
    found = [
        interpret(graph, feeds)["acc"].reshape(-1, graph.outputs[0].type.concrete(1)[-1])
        for feeds in some_inputs(graph, 96, 0)
    ]
    bounds = prove(graph).bounds[graph.outputs[0]]
    np.testing.assert_array_equal(np.concatenate(found).max(axis=0), bounds.hi)
    np.testing.assert_array_equal(np.concatenate(found).min(axis=0), bounds.lo)


def test_sums_are_driven_up_and_then_back() -> None:
    """What is clamped behind a sum hides how far it went, unless the sum was clamped on its way and came back."""
    graph = qir.parse(f"""
    graph @back stage=fixed (%x: Nx64 x s8) {{
      %w = const {{value=s8 64x1 [{", ".join(["127"] * 64)}]}} : 64x1 x s8
      %acc = matmul %x, %w {{accumulator=s20[-300000, 300000], overflow=saturate, order=khwc}} : Nx1 x s20[-300000, 300000]
      %y = requantize %acc {{multiplier=s64 [1], shift=s64 [-8], form=shift, input_shift=0, rounding=floor, overflow=saturate}} : Nx1 x s8
      return %y
    }}""")  # noqa: E501
    unsafe = on("matmul", overflow=Overflow.NONE)
    ends = np.array([[127] * 64, [-128] * 64, [-128, 127] * 32, [127, -128] * 32])
    x = np.concatenate([ends, np.random.default_rng(0).integers(-128, 128, (60, 64))]).astype(np.int8)
    expected, missed = (interpret(g, {"x": x})["y"] for g in (graph, unsafe(graph)))
    np.testing.assert_array_equal(missed, expected)
    with pytest.raises(qir.PassError, match=r"from -128 to -16 .* x=64 numbers in \[-128, 127\]"):
        held(graph, Wrong(unsafe), samples=64)


def test_float_islands_keep_their_bits() -> None:
    graph = qir.parse(ISLAND)
    scaled = Wrong(with_data("k", lambda k: np.nextafter(k, np.float32(9))))
    with pytest.raises(qir.PassError, match="changed output 'q'"):
        held(graph, Wrong(on("Clip", maximum=8.0)))
    bare = graph.with_changes(outputs=(graph.value("m"), graph.value("y")), output_names=("m", "y"))
    with pytest.raises(qir.PassError, match="changed output 'm'"):
        held(bare, scaled)


REALS = """
graph @reals stage=fixed (%x: Nx3 x f32 RANGE) {
  %k = const {value=f32 1 [3e+38]} : 1 x f32
  %c = Clip %x {minimum=0.0, maximum=60000.0} : Nx3 x f32 island
  %m = Mul %x, %k : Nx3 x f32 island
  %n = Sub %m, %m : Nx3 x f32 island
  return %c, %n
}"""


@pytest.mark.parametrize(("range_", "end"), [("", 60000.0), ("in [-4, 5]", 5.0)])
def test_reals_are_compared_by_their_bits(range_: str, end: float) -> None:
    graph = qir.parse(REALS.replace("RANGE", range_))
    assert count_inputs(graph, 1 << 62) is None
    with pytest.raises(qir.PassError, match=rf"output 'c' at \[0\] from {end} to 4.5 on input number 2"):
        held(graph, Wrong(on("Clip", maximum=4.5)), samples=4)
    with pytest.raises(qir.PassError, match=r"output 'c' at \[0\] from 0.0 to -0.0 on input number 1"):
        held(graph, Wrong(on("Clip", minimum=-0.0)), samples=4)
    ends = {"x": np.array([[-4, 5, 0]], np.float32)}
    assert np.isnan(interpret(graph, ends)["n"]).tolist() == [[True, True, False]]
    larger = Wrong(with_data("k", lambda k: k * np.float32(1.1)))
    assert summary(held(graph, larger, samples=4)) == [("wrong", "tested", 4, 0)]  # NaN is NaN


# Not claimed, and what is refused


def test_a_pass_that_means_to_change_bits_says_so() -> None:
    graph = needle()
    narrowed = of_type("y", integer(8).narrowed(-128, 0))
    assert summary(held(graph, Wrong(narrowed, claims=False))) == [("wrong", "not claimed", 65536, 1)]
    assert summary(held(graph, Wrong(claims=False))) == [("wrong", "identical", 0, 0)]
    small = qir.parse(LAYER.replace("s8) {", "s8[5, 9]) {").replace("OVERFLOW", "saturate"))
    wraps = on("matmul", accumulator=integer(8))
    found = held(small, Wrong(lambda g: of_type("acc", integer(8))(wraps(g)), claims=False))
    x = np.array(list(product(range(5, 10), repeat=4)))
    exact = x @ np.array([[127, 1], [-127, 1], [127, 1], [127, -1]])
    rescaled = [
        np.floor(np.clip(y, *ends) / 512 + 0.5)
        for y, ends in product([exact], [(-(1 << 15), (1 << 15) - 1), (-128, 127)])
    ]
    count = int((rescaled[0] != rescaled[1]).sum())
    assert count > 100
    assert summary(found) == [("wrong", "not claimed", 625, count)]


def test_passes_claim_to_keep_bits() -> None:
    assert all(item.preserves_bits for item in (RangeAnalysis(), InsertSaturation()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_value("x", name="z"), "changed the inputs of the graph"),
        (of_type("x", integer(8).narrowed(-127, 127)), "changed the inputs of the graph"),
        (lambda g: g.with_changes(output_names=("q", "z")), "changed the outputs of the graph"),
        (lambda g: g.with_changes(outputs=g.outputs[:1], output_names=("q",)), "changed the outputs of the graph"),
        (lambda g: g.with_changes(attributes={"input_rounding": "floor"}), "changed the attributes of the graph"),
    ],
)
@pytest.mark.parametrize("claims", [True, False])
def test_inputs_and_outputs_stay(change: Rewrite, message: str, claims: bool) -> None:
    with pytest.raises(qir.PassError, match=message):
        held(qir.parse(ISLAND), Wrong(change, claims))


def test_integers_count_and_not_how_wide_they_are_stored() -> None:
    wide = Wrong(lambda g: on("matmul", accumulator=integer(32))(of_type("acc", integer(32))(g)))
    assert summary(held(sums("matmul", "s8[-4, 4]"), wide, samples=20)) == [("wrong", "tested", 20, 0)]
    with pytest.raises(qir.PassError, match="changed output 'acc'"):
        held(sums("matmul"), wide)


def test_outputs_that_are_the_same_for_all_samples_are_compared() -> None:
    graph = qir.parse("""
    graph @same stage=fixed (%x: Nx1 x s8) {
      %k = const {value=s8 3 [1, 2, 3]} : 3 x s8
      return %x, %k
    }""")
    with pytest.raises(qir.PassError, match=r"output 'k' at \[1\] from 2 to 5 on input number 1, x=\[-128\]"):
        held(graph, Wrong(with_data("k", lambda k: np.array([1, 5, 3], np.int8))))


def test_records_print_as_a_table() -> None:
    found = held(needle(), RangeAnalysis(), Wrong(of_type("y", integer(8).narrowed(-128, 0)), claims=False))
    lines = str(found).splitlines()
    assert [line.split()[:-1] for line in lines] == [
        ["pass", "method", "inputs", "differing"],
        ["range-analysis", "identical", "0", "0"],
        ["wrong", "not", "claimed", "65,536", "1"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert {r.method for r in found.records} == {Method.IDENTICAL, Method.NOT_CLAIMED}
    assert all(r.seconds > 0 for r in found.records)


def test_differential_measures_reals_and_leaves_integers_to_equivalence() -> None:
    graph = qir.parse("graph @g stage=float (%x: Nx2 x f32) {\n  %y = Relu %x : Nx2 x f32\n  return %y\n}")
    relu = Wrong(lambda g: g.with_changes(ops=tuple(clipped(op) for op in g.ops)))
    found = Differential({"x": np.array([[-1, 2], [3, 7]], np.float32)})
    Pipeline([relu, Wrong()]).run(graph, PassContext(), [found])
    assert [(d.pass_name, d.output, d.largest) for d in found.differences] == [("wrong", "y", 1.0), ("wrong", "y", 0.0)]
    Pipeline([Wrong(of_type("y", integer(8).narrowed(-128, 0)))]).run(needle(), PassContext(), [found])
    assert len(found.differences) == 2


def clipped(op: Op) -> Op:
    return Clip(operands=op.operands, results=op.results, minimum=0.0, maximum=6.0)
