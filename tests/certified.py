"""A small graph of which every input can be tried, certificates as data, and what they and a text claim as proofs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from property.fixed_graphs import proved

from qir.certificate import make_certificate
from qir.checker import check_certificate
from qir.idle import overflow_room
from qir.interval import Bounds, Interval
from qir.ir import Graph, Op, OpBounds, Value
from qir.ops.accumulate import Accumulating
from qir.parser import parse
from qir.pass_manager import PassContext, Pipeline
from qir.passes.range_analysis import RangeAnalysis
from qir.proof import Method, Proof, prove
from qir.types import storage_of

Tensor = npt.NDArray[Any]
Stated = dict[str, Any]

#: Sums with padding, zero points and products that saturate; requantization a channel; a table; steps; what rejoins.
RICH_TEXT = """
graph @rich stage=fixed (%x: Nx2x2x1 x s3[-2, 1]<0.5, zero=-1>) {
  %w = const {value=s8 2x2x2x1 [3, -2, 1, 4, -1, 2, 2, 1]} : 2x2x2x1 x s4
  %b = const {value=s32 2 [5, -7]} : 2 x s32
  %acc = conv2d %x, %w, %b {pads=[1, 0, 0, 1], strides=[1, 1], dilations=[1, 1], groups=1, accumulator=s16,
    overflow=wrap, order=khwc} : Nx2x2x2 x s16
  %q = requantize %acc {multiplier=s64 2 [1610612736, 1288490189], shift=s64 2 [0, 1], form=double_round,
    input_shift=0, overflow=saturate} : Nx2x2x2 x s5<0.5, zero=2>
  %e = const {value=s8 32 [0, -1, -3, -2, -5, 4, 3, 2, 1, 0, 1, 2, 9, 8, 7, 6, 5, 4, 3, -8, 2, 1, 0, 2, 4, 6, 8, 10,
    12, 14, 15, -16]} : 32 x s5
  %t = table %q, %e : Nx2x2x2 x s5<0.25>
  %d = add %q, %t {overflow=saturate} : Nx2x2x2 x s5<0.5>
  %p = average_pool2d %d {kernel=[2, 2], strides=[1, 1], pads=[0, 0, 0, 0], dilations=[1, 1],
    rounding=half_away} : Nx1x1x2 x s5<0.5>
  %f = reshape %p {shape=[2]} : Nx2 x s5<0.5>
  %u = const {value=s8 2x3 [1, -2, 3, 2, 0, -3]} : 2x3 x s3
  %g = matmul %f, %u {accumulator=s7, overflow=saturate, order=bias_ckhw, product_shift=1, product=s6,
    product_overflow=saturate} : Nx3 x s7
  %r = reduce_sum %x {axes=[1, 2], keepdims=false, accumulator=s9, overflow=wrap, order=khwc} : Nx1 x s9
  %h = mul %g, %r {overflow=wrap} : Nx3 x s10
  %k = requantize %h {multiplier=s64 [0], shift=s64 [-2], form=shift, input_shift=0, rounding=half_even,
    overflow=saturate} : Nx3 x s8
  %c = concat %g, %k {axis=1} : Nx6 x s8
  return %c
}
"""
_SUM = "accumulator=s16, overflow=wrap, order=khwc"
_CONV = f"{_SUM}, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1"
#: Bounds that are tighter by affine forms: four times x less the sum of all, and a product of it; branches that rejoin.
AFFINE_TEXTS = {
    "mean": f"""
graph @mean stage=fixed (%x: Nx2x2x1 x s3[-2, 1]<0.5, zero=-1>) {{
  %s = reduce_sum %x {{{_SUM}, axes=[1, 2], keepdims=true}} : Nx1x1x1 x s16
  %t = requantize %x {{multiplier=s64 [1], shift=s64 [2], form=shift, input_shift=0, rounding=floor,
    overflow=saturate}} : Nx2x2x1 x s8
  %y = sub %t, %s {{overflow=saturate}} : Nx2x2x1 x s8
  %w = const {{value=s8 2x1x2x1 [3, 1, -2, 2]}} : 2x1x2x1 x s3
  %b = const {{value=s16 2 [4, -3]}} : 2 x s16
  %z = conv2d %y, %w, %b {{{_CONV}}} : Nx2x1x2 x s16
  return %z
}}""",
    "branches": f"""
graph @branches stage=fixed (%x: Nx2x2x1 x s3[-2, 1]<0.5, zero=-1>) {{
  %w = const {{value=s8 2x1x1x1 [3, 2]}} : 2x1x1x1 x s3
  %v = const {{value=s8 2x1x1x1 [2, -1]}} : 2x1x1x1 x s3
  %p = conv2d %x, %w {{{_CONV}}} : Nx2x2x2 x s16
  %q = conv2d %x, %v {{{_CONV}}} : Nx2x2x2 x s16
  %r = requantize %p {{multiplier=s64 [1], shift=s64 [-1], form=shift, input_shift=0, rounding=half_even,
    overflow=saturate}} : Nx2x2x2 x s8
  %y = sub %r, %q {{overflow=saturate}} : Nx2x2x2 x s8
  %c = concat %y, %q {{axis=3}} : Nx2x2x4 x s8
  %u = const {{value=s8 4x1 [1, 2, 1, -2]}} : 4x1 x s3
  %z = matmul %c, %u {{{_SUM}}} : Nx2x2x1 x s16
  return %z
}}""",
}
HASH = "0" * 64


@cache
def rich() -> Graph:
    """The graph with the ranges that are proved."""
    return proved(parse(RICH_TEXT))


@cache
def affine(name: str) -> Graph:
    """A graph with the ranges that affine forms prove."""
    return Pipeline([RangeAnalysis(method=Method.AFFINE)]).run(parse(AFFINE_TEXTS[name]), PassContext())


def every_input(graph: Graph) -> dict[str, Tensor]:
    """All inputs of a graph with one input, as samples of one batch."""
    (value,) = graph.inputs
    storage = storage_of(value.type.element)
    assert storage is not None
    shape = value.type.concrete(1)[1:]
    grid = itertools.product(range(storage.lo, storage.hi + 1), repeat=int(np.prod(shape)))
    return {value.name: np.array(list(grid), np.int8).reshape(-1, *shape)}


def certificate(graph: Graph, proof: Proof | None = None) -> Stated:
    """The certificate of a graph as data."""
    stated: Stated = json.loads(make_certificate(graph, proof or prove(graph), HASH, None))
    return stated


def faults_of(graph: Graph, stated: Stated | str) -> list[str]:
    """What the checker finds, where all hashes are right."""
    text = stated if isinstance(stated, str) else json.dumps(stated)
    return check_certificate(graph, text, graph_sha256=HASH, weights_sha256=None)


def numbers(stated: Stated) -> Iterator[tuple[Any, ...]]:
    """The paths of all bounds of a certificate: part, name, `lo`, `hi` or `step`, and the channel in a list."""
    for part in ("values", "accumulators", "lanes"):
        for name, entry in stated[part].items():
            for end in ("lo", "hi", "step"):
                listed = isinstance(entry[end], list)
                yield from ((part, name, end, i) for i in range(len(entry[end]))) if listed else [(part, name, end)]


def changed(stated: Stated, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Stated:
    """A copy with one thing changed."""
    copy = deepcopy(stated)
    place: Any = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = change(place[path[-1]])
    return copy


def proof_of(graph: Graph, stated: Stated) -> Proof:
    """What a certificate claims, as a proof."""
    bounds = {v: _bounds(stated["values"][v.name]) for v in graph.values() if v.name in stated["values"]}
    steps: dict[Op, OpBounds] = {}
    for op in graph.ops:
        name, results = op.results[0].name, tuple(bounds[v] for v in op.results if v in bounds)
        lanes = {k.rpartition(":")[2]: _bounds(e).hull for k, e in stated["lanes"].items() if k.startswith(f"{name}:")}
        facts: dict[str, Any] = {"product": lanes.pop("entering", None), "unsaturated": lanes.pop("unsaturated", None)}
        if name in stated["accumulators"]:
            partials = _bounds(stated["accumulators"][name])
            facts |= {"partial": partials.hull, "unsaturated": partials.hull, "channel_partials": partials}
        steps[op] = OpBounds(results, lanes=lanes, **facts)
    return Proof(bounds, steps, ())


def proof_of_text(graph: Graph, certified: Proof) -> Proof:
    """What a text claims: ranges, partial sums, and that nothing overflows; the names of lanes are those certified."""
    bounds = {v: Bounds.of(v.range.lo, v.range.hi) for v in graph.values() if v.range is not None}
    wide = Interval(-(1 << 99), 1 << 99)
    steps: dict[Op, OpBounds] = {}
    for op, known in certified.steps.items():
        facts: dict[str, Any] = {"lanes": dict.fromkeys(known.lanes, wide)}
        partial = getattr(op, "partial", None)
        room = overflow_room(op) if getattr(op, "overflow", None) == "none" else None
        if isinstance(op, Accumulating):
            kept = (partial or wide).intersect(room or wide)
            facts |= {"partial": kept, "channel_partials": Bounds.of(kept.lo, kept.hi) if kept else None}
            if op.product is not None and op.product_overflow == "none":
                facts["product"] = Interval(op.product.lo, op.product.hi)
        elif room is not None:
            facts["unsaturated"] = room
        steps[op] = OpBounds(known.results, **facts)
    return Proof(bounds, steps, ())


def proof_with(graph: Graph, given: Mapping[Value, Bounds]) -> Proof:
    """The prover's rules from other bounds of some values, as an attacker would make his certificate agree."""
    bounds: dict[Value, Bounds] = {}
    steps: dict[Op, OpBounds] = {}
    whole = prove(graph)
    for value in graph.inputs:
        bounds[value] = given.get(value, whole.bounds[value])
    for op in graph.ops:
        step = op.bounds([bounds[v] for v in op.operands])
        assert step is not None
        steps[op] = step
        bounds[op.result] = given.get(op.result, step.results[0])
    return Proof(bounds, steps, ())


def _bounds(entry: Mapping[str, Any]) -> Bounds:
    return Bounds.of(entry["lo"], entry["hi"], entry["step"])
