"""Demand: values beyond what is asked for change no output, and clamps that it shows dead can go."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import FixedMaker

from qir.arrays import Array
from qir.demand import demands
from qir.fixed_point import Overflow, RequantizeForm
from qir.interpreter import evaluate_op, interpret
from qir.interval import Interval
from qir.ir import Graph, Value
from qir.ops.constant import Const
from qir.ops.fixed_elementwise import FixedAdd, Table
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import FixedConcat, FixedSlice, FixedTranspose
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.dead_clamps import remove_dead_clamps
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program
from qir.proof import Method, prove
from qir.types import S8, S16, S32, U8, IntegerType, affine, container_bounds, storage_of
from qir.verifier import verify

Tensor = npt.NDArray[Any]

_NARROWED = (S8.narrowed(0, 100), S8.narrowed(-20, 17), U8.narrowed(0, 60), S16.narrowed(-300, 700))


class _Chain(FixedMaker):
    """Ops through which a demand passes, one behind another, with clamps of all kinds."""

    def start(self) -> Value:
        return self.input(self.size(2, 4), self.size(2, 4), self.size(1, 3), storages=(S8, U8, S16))

    def clamp(self, x: Value) -> Value:
        """A rescale by little, to bounds that may be narrower than the container."""
        storage = self.pick([*_NARROWED, S8, S16])
        count = () if self.flag() else (int(x.type.shape[-1]),)
        form = self.pick([RequantizeForm.SINGLE_ROUND, RequantizeForm.DOUBLE_ROUND, RequantizeForm.NEON])
        return self.emit(
            Requantize,
            [x],
            elements=[affine(storage, 0.5, self.pick([0, 3]))],
            multiplier=Array(np.asarray(self.random.integers(1 << 30, 1 << 31, count))),
            shift=Array(np.asarray(self.random.integers(-2, 2, count), np.int64)),
            form=form,
            overflow=Overflow.SATURATE,
        )

    def step(self, x: Value) -> Value:
        storage = storage_of(x.type.element)
        assert storage is not None
        match self.pick(["clamp", "clamp", "clamp", "rescale", "max", "transpose", "slice", "concat", "table", "add"]):
            case "clamp":
                return self.clamp(x)
            case "max":
                kernel = (self.size(1, min(2, int(x.type.shape[1]))), 1)
                return self.emit(FixedMaxPool, [x], kernel=kernel, strides=(1, 1), pads=(0,) * 4, dilations=(1, 1))
            case "transpose":
                return self.emit(FixedTranspose, [x], perm=(0, *self.draw(st.permutations([1, 2, 3]))))
            case "slice":
                return self.emit(FixedSlice, [x], starts=(0,), ends=(1,), axes=(3,), steps=(1,))
            case "concat":
                return self.emit(FixedConcat, [x, x], axis=self.size(1, 3))
            case "add":
                return self.emit(FixedAdd, [x, x], elements=[S32], overflow=Overflow.SATURATE)
            case "table" if storage.bits == 8:
                return self.table_of(x, storage)
            case _:
                return self.rescale(x)

    def table_of(self, x: Value, storage: IntegerType) -> Value:
        """Entries that rise from one plateau to another."""
        ends = np.sort(self.random.integers(0, 256, 2))
        ramp = np.clip(np.arange(256), *ends) - 128
        rows = ramp if self.flag() else np.stack([ramp, -1 - ramp, ramp // 2, ramp])[: int(x.type.shape[-1])]
        if rows.ndim == 2 and len(rows) != x.type.shape[-1]:
            rows = ramp
        return self.emit(Table, [x, self.constant(rows.astype(np.int8), S8)], elements=[affine(S8, 0.125, 3)])


@st.composite
def chains(draw: st.DrawFn) -> Graph:
    chain = _Chain(draw)
    value = chain.start()
    for _ in range(chain.size(2, 6)):
        value = chain.step(value)
    outputs = [value, chain.pick(chain.emitted)] if chain.flag() else [value]
    return chain.builder.finish(outputs, ["y", "other"][: len(outputs)])


def feeds_of(graph: Graph, random: np.random.Generator) -> dict[str, Tensor]:
    """Random integers, and both ends, for every input."""
    found = {}
    for value in graph.inputs:
        storage = storage_of(value.type.element)
        assert storage is not None
        shape = value.type.concrete(4)
        anything = random.integers(storage.lo, storage.hi, shape, endpoint=True)
        ends = random.choice([storage.lo, storage.hi], shape)
        found[value.name] = np.where(random.random(shape) < 0.3, ends, anything).astype(storage.dtype)
    return found


def run_with(graph: Graph, feeds: dict[str, Tensor], moved: Value, change: Any) -> list[Tensor]:
    """The outputs where one value is changed before anything reads it."""
    found: dict[Value, Tensor] = {v: feeds[v.name] for v in graph.inputs}
    if moved in found:
        found[moved] = change(found[moved])
    for op in graph.ops:
        found.update(zip(op.results, evaluate_op(op, [found[v] for v in op.operands]), strict=True))
        if moved in op.results:
            found[moved] = change(found[moved])
    return [found[v] for v in graph.outputs]


def _beyond(random: np.random.Generator, ends: tuple[int, int], low: Tensor, high: Tensor, array: Tensor) -> Tensor:
    """Values at or past `low` or `high` go anywhere past it, within the ends of their container."""
    wide = array.astype(np.int64)
    below = random.integers(ends[0], np.maximum(np.broadcast_to(low, array.shape), ends[0]), endpoint=True)
    above = random.integers(np.minimum(np.broadcast_to(high, array.shape), ends[1]), ends[1], endpoint=True)
    moved = np.where(wide <= low, below, np.where(wide >= high, above, wide))
    return np.asarray(moved.astype(array.dtype))


@settings(max_examples=max(300, settings().max_examples))
@given(graph=chains(), seed=st.integers(0, 2**32 - 1))
def test_no_output_depends_on_more_than_is_asked_for(graph: Graph, seed: int) -> None:
    random = np.random.default_rng(seed)
    feeds, asked = feeds_of(graph, random), demands(graph, prove(graph))
    expected = [interpret(graph, feeds)[n] for n in graph.output_names]
    made_by = {op.result: op for op in graph.ops}
    for value, bounds in asked.items():
        storage = storage_of(value.type.element)
        assert storage is not None
        if isinstance(made_by.get(value), Const):
            continue
        least, greatest = container_bounds(storage.bits, storage.signed)
        inner = bounds.clamp(least, greatest)
        low, high = inner.lo.astype(np.int64), inner.hi.astype(np.int64)

        some, more = bounds.lo >= least, bounds.hi <= greatest
        change = partial(
            _beyond, random, (least, greatest), np.where(some, low, least - 1), np.where(more, high, greatest + 1)
        )
        for want, got in zip(expected, run_with(graph, feeds, value, change), strict=True):
            np.testing.assert_array_equal(got, want, value.name)


@settings(max_examples=max(300, settings().max_examples))
@given(graph=chains(), seed=st.integers(0, 2**32 - 1))
def test_outputs_keep_their_bits_without_dead_clamps(graph: Graph, seed: int) -> None:
    feeds = feeds_of(graph, np.random.default_rng(seed))
    after = remove_dead_clamps(RangeAnalysis().run(graph, PassContext()), Method.INTERVAL, PassContext())
    verify(after)
    expected, found, ran = interpret(graph, feeds), interpret(after, feeds), Program(after).run_integer(feeds)
    for name in graph.output_names:
        np.testing.assert_array_equal(found[name], expected[name], name, strict=True)
        np.testing.assert_array_equal(ran[name], expected[name], name, strict=True)


_ENTRIES = ", ".join(str(min(max(i, -4), 3)) for i in range(-8, 8))
_SAME = "multiplier=s64 [1073741824], shift=s64 [1], form=single_round, input_shift=0, overflow=saturate"
_POOL = "kernel=[1, 1], strides=[1, 1], pads=[0, 0, 0, 0], dilations=[1, 1]"
_READ = "%y = table %1, %t : Nx2x2x3 x s8<0.5>\n  return %y"
_CHAIN = f"""
graph @g stage=fixed (%x: Nx2x2x3 x s4<0.5>) {{
  %t = const {{value=s8 16 [{_ENTRIES}]}} : 16 x s8
  %0 = requantize %x {{{_SAME}}} : Nx2x2x3 x s4[-5, 6]<1.0>
  %1 = max_pool2d %0 {{{_POOL}}} : Nx2x2x3 x s4[-5, 6]<1.0>
  {_READ}
}}"""


def test_a_clamp_that_a_flat_tail_repeats_is_dead() -> None:
    graph = parse(_CHAIN)
    asked = demands(graph, prove(graph))
    assert {n: asked[graph.value(n)].hull for n in ("x", "0", "1")} == dict.fromkeys("x01", Interval(-4, 3))
    context = PassContext()
    after = InsertSaturation().run(graph, context)
    verify(after)
    assert context.notes[0] == "dead clamps: 0 requantizes removed, 1 turned off"
    assert [str(storage_of(after.value(n).type.element)) for n in ("0", "1")] == ["s4", "s4"]
    assert next(op for op in after.ops if isinstance(op, Requantize)).overflow is Overflow.NONE


@pytest.mark.parametrize("reader", [f"{_READ}, %1", "%y = add %1, %1 {overflow=saturate} : Nx2x2x3 x s8\n  return %y"])
def test_a_clamp_that_an_output_or_a_sum_reads_stays(reader: str) -> None:
    graph = parse(_CHAIN.replace(_READ, reader))
    assert remove_dead_clamps(graph, Method.INTERVAL, PassContext()) is graph


def test_a_requantize_that_gives_back_what_it_reads_goes() -> None:
    text = _CHAIN.replace("x s4[-5, 6]<1.0>", "x s4<0.5>")
    graph = parse(text)
    context = PassContext()
    after = remove_dead_clamps(graph, Method.INTERVAL, context)
    verify(after)
    assert [op.mnemonic for op in after.ops] == ["const", "max_pool2d", "table"]
    assert context.notes == ["dead clamps: 1 requantizes removed, 0 turned off"]
    for other in (text.replace("[1073741824]", "[1073741825]"), text.replace("shift=s64 [1]", "shift=s64 [0]")):
        assert remove_dead_clamps(parse(other), Method.INTERVAL, PassContext()) == parse(other)


def test_a_clamp_that_another_dead_one_makes_idle_stays() -> None:
    """Below -5 the second clamp does nothing only because the first one does, and the table reads all that is there."""
    entries = ", ".join(str(min(i, 3)) for i in range(-8, 8))
    text = f"""
    graph @g stage=fixed (%x: Nx3 x s4<0.5>) {{
      %t = const {{value=s8 16 [{entries}]}} : 16 x s8
      %0 = requantize %x {{{_SAME}}} : Nx3 x s4[-5, 7]<1.0>
      %1 = requantize %0 {{{_SAME}}} : Nx3 x s4[-5, 3]<2.0>
      %y = table %1, %t : Nx3 x s8<0.5>
      return %y
    }}"""
    graph, feeds = parse(text), {"x": np.arange(-8, 7, dtype=np.int8).reshape(5, 3)}
    after = remove_dead_clamps(graph, Method.INTERVAL, PassContext())
    verify(after)
    assert after is not graph
    np.testing.assert_array_equal(interpret(after, feeds)["y"], interpret(graph, feeds)["y"])
