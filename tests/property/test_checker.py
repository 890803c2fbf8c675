"""The checker of certificates agrees with the prover on random graphs, and accepts nothing that some input refutes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from certified import certificate, changed, every_input, faults_of, numbers, proof_of, proof_of_text, proof_with, rich
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from property.fixed_graphs import MAKERS, cases
from property.recorder import Unsound, check_soundness
from property.soundness_graphs import Model, models
from property.test_bounds import chains

from qir.arrays import Array
from qir.fixed_point import Overflow, Rounding
from qir.idle import overflow_room
from qir.interval import Bounds, Interval
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import Accumulating, Order
from qir.proof import Method, false_claims, prove
from qir.types import AffineType, IntegerType, TensorType, storage_of, stored_in
from qir.verifier import find_faults


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
def test_the_checker_agrees_on_every_op(kind: str, data: st.DataObject) -> None:
    graph, _ = data.draw(cases(kind))
    assert faults_of(graph, certificate(graph)) == []


@settings(max_examples=max(200, settings().max_examples))
@given(graph=chains())
def test_the_checker_agrees_on_bounds_that_differ_from_channel_to_channel(graph: Graph) -> None:
    assert faults_of(graph, certificate(graph)) == []


@settings(max_examples=max(300, settings().max_examples))
@given(case=models())
def test_the_checker_agrees_on_models_by_either_method(case: Model) -> None:
    for method in Method:
        assert faults_of(case.graph, certificate(case.graph, prove(case.graph, method))) == []


@settings(max_examples=max(150, settings().max_examples), suppress_health_check=[HealthCheck.filter_too_much])
@given(case=models(), data=st.data())
def test_what_is_accepted_of_an_affine_bound_holds(case: Model, data: st.DataObject) -> None:
    """The checker may be tighter than the prover; a bound moved inward is refused, or true of all inputs tried."""
    graph = case.graph
    proof = prove(graph, Method.AFFINE)
    names = sorted(op.result.name for op, step in proof.steps.items() if step.sources)
    assume(names)
    stated = certificate(graph, proof)
    paths = [p for p in numbers(stated) if p[1].split(":")[0] in names and p[2] != "step"]
    path = data.draw(st.sampled_from(paths))
    by = data.draw(st.sampled_from([1, 2, 5, 40]))
    tampered = changed(stated, path, lambda n: n + by if path[2] == "lo" else n - by)
    if path[0] == "accumulators":
        tampered = _with_facts(tampered, path[1], graph)
    if not faults_of(graph, tampered):
        event("accepted")
        check_soundness(graph, case.feeds, proof_of(graph, tampered))


def _with_facts(stated: dict[str, Any], name: str, graph: Graph) -> dict[str, Any]:
    """The certificate with what an accumulator's entry says of its bounds made right."""
    entry = stated["accumulators"][name]
    lo, hi = min(entry["lo"]), max(entry["hi"])
    op = graph.producers[graph.value(name)]
    room = overflow_room(op)
    assert room is not None
    entry |= {"partial": [lo, hi], "bits": max(hi, ~lo).bit_length() + 1, "idle": room.lo <= lo and hi <= room.hi}
    return stated


@pytest.mark.parametrize("kind", ["conv2d", "matmul", "reduce_sum", "requantize", "mul", "table", "layer"])
@given(data=st.data())
def test_a_number_moved_inward_is_refused(kind: str, data: st.DataObject) -> None:
    graph, _ = data.draw(cases(kind))
    stated = certificate(graph)
    path = data.draw(st.sampled_from(sorted(numbers(stated), key=str)))
    by = data.draw(st.sampled_from([1, 2, 1 << 20, 1 << 80]))
    part, name, end, *_ = path
    value = graph.value(name.partition(":")[0])
    assume(value.type.sample_size > 0)  # of what has no elements anything is true
    assume(part != "lanes" or end != "step")  # of a lane the prover knows ends alone, and the checker more
    # The prover bounds what these may cut by the whole storage, and the checker by the image.
    narrower = (Overflow.SATURATE_SYMMETRIC, Overflow.SATURATE_ZERO)
    op = graph.producers.get(value)
    assume(part != "values" or isinstance(op, Accumulating) or getattr(op, "overflow", None) not in narrower)
    move = {"lo": lambda n: n + by, "hi": lambda n: n - by, "step": lambda n: n * (by + 1)}[end]
    tampered = changed(stated, path, move)
    assume(tampered != stated)  # a step of 0 stays
    assert faults_of(graph, tampered)


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
def test_a_number_moved_outward_is_refused_or_stays_in_its_type(kind: str, data: st.DataObject) -> None:
    """However far, which no arithmetic of the checker minds."""
    graph, _ = data.draw(cases(kind))
    stated = certificate(graph)
    paths = [path for path in numbers(stated) if path[2] != "step"]
    assume(paths)
    path = data.draw(st.sampled_from(paths))
    by = data.draw(st.sampled_from([1, 1 << 20, 1 << 80, 1 << 400]))
    faults = faults_of(graph, changed(stated, path, lambda n: n - by if path[2] == "lo" else n + by))
    if path[0] == "values" and by >> 70 and graph.value(path[1]).type.sample_size:
        assert faults
    if path[0] == "accumulators" and by >> 70:
        assert faults  # what it says of all channels together is another


# Changes of a graph of which every input can be tried

ATTRIBUTES: dict[str, Any] = {
    "order": st.sampled_from(list(Order)),
    "overflow": st.sampled_from(list(Overflow)),
    "product_overflow": st.sampled_from(list(Overflow)),
    "rounding": st.sampled_from(list(Rounding)),
    "pads": st.sampled_from([(0, 1, 1, 0), (0, 0, 1, 1), (1, 1, 0, 0), (1, 0, 0, 1)]),
    "product_shift": st.integers(0, 2),
    "product": st.sampled_from([IntegerType(b, True, -(1 << (b - 1)), (1 << (b - 1)) - 1) for b in (5, 6, 7, 9)]),
    "shift": st.lists(st.integers(-3, 2), min_size=1, max_size=2),
    "multiplier": st.lists(st.integers(1 << 30, (1 << 31) - 1), min_size=1, max_size=2),
    "value": st.tuples(st.integers(0, 31), st.integers(-3, 3)),
    "partial": st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    "channel_bits": st.lists(st.integers(3, 8), min_size=1, max_size=1),
}


@st.composite
def mutants(draw: st.DrawFn) -> Graph:
    """The rich graph with one to three things changed that leave it legal but for its facts."""
    graph = rich()
    for _ in range(draw(st.integers(1, 3))):
        graph = _mutant(draw, graph)
    assume(find_faults(graph, claims=False) == ())
    return graph


def _mutant(draw: st.DrawFn, graph: Graph) -> Graph:
    value = draw(st.sampled_from(sorted(graph.values(), key=lambda v: v.name)))
    op = graph.producers.get(value)
    names = ["range", "storage", "zero", *(n for n in ATTRIBUTES if op is not None and n in op.attribute_names())]
    name = draw(st.sampled_from(names))
    if name in ("range", "storage", "zero"):
        return _replaced(graph, op, {}, (value, _retyped(draw, value, name)))
    assert op is not None
    drawn, old = draw(ATTRIBUTES[name]), getattr(op, name)
    if name in ("shift", "multiplier", "channel_bits"):
        drawn = Array(np.resize(np.array(drawn), np.shape(old.data) if old is not None else 1))
    elif name == "value":
        data = old.data.copy()
        data.reshape(-1)[drawn[0] % data.size] += drawn[1]
        drawn = Array(data)
    elif name == "partial":
        assume(old is not None and old.lo + drawn[0] <= old.hi + drawn[1])
        drawn = Interval(old.lo + drawn[0], old.hi + drawn[1])
    return _replaced(graph, op, {name: drawn}, None)


def _retyped(draw: st.DrawFn, value: Value, what: str) -> Value:
    low, high = draw(st.integers(-2, 2)), draw(st.integers(-2, 2))
    kind = value.type.element
    storage = storage_of(kind)
    assert storage is not None
    assert value.range is not None
    if what == "range":
        assume(value.range.lo + low <= value.range.hi + high)
        return replace(value, range=Interval(value.range.lo + low, value.range.hi + high))
    if what == "zero":
        assume(isinstance(kind, AffineType))
        assert isinstance(kind, AffineType)
        zero = int(kind.zero_point.data) + low
        assume(-(1 << (storage.bits - 1)) <= zero < 1 << (storage.bits - 1))
        return replace(value, type=TensorType(value.type.shape, replace(kind, zero_point=Array(np.array(zero)))))
    ends = storage.lo + abs(low), storage.hi - abs(high)
    assume(ends[0] <= ends[1])
    return replace(value, type=TensorType(value.type.shape, stored_in(kind, storage.narrowed(*ends))))


def _replaced(graph: Graph, op: Op | None, attributes: dict[str, Any], retyped: tuple[Value, Value] | None) -> Graph:
    new = {retyped[0]: retyped[1]} if retyped else {}
    ops = []
    for old in graph.ops:
        changes: dict[str, Any] = dict(attributes) if old is op else {}
        if retyped and old is op and isinstance(old, Accumulating):
            changes["accumulator"] = retyped[1].type.element
        operands, results = (tuple(new.get(v, v) for v in values) for values in (old.operands, old.results))
        ops.append(old.with_changes(operands=operands, results=results, **changes))
    values = [tuple(new.get(v, v) for v in part) for part in (graph.inputs, graph.outputs)]
    return graph.with_changes(inputs=values[0], outputs=values[1], ops=tuple(ops))


def _adjusted(stated: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """The certificate with what it repeats of the text brought up to date, as an attacker does."""
    fresh = certificate(graph)
    copy = changed(stated, ("format",), lambda f: f)
    for name, entry in copy["accumulators"].items():
        for key in ("type", "overflow", "order", "idle"):
            entry[key] = fresh["accumulators"][name][key]
    return copy


_ACCEPTED: list[bool] = []


@settings(max_examples=max(600, settings().max_examples))
@given(graph=mutants())
def test_what_is_accepted_of_a_changed_graph_holds_for_every_input(graph: Graph) -> None:
    """The certificate is that of the graph before the change; the hashes are right."""
    stated = _adjusted(certificate(rich()), graph)
    faults = faults_of(graph, stated)
    event("refused" if faults else "accepted")
    _ACCEPTED.append(not faults)
    if not faults:
        certified = proof_of(graph, stated)
        check_soundness(graph, every_input(graph), certified, proof_of_text(graph, certified))


def test_some_changed_graphs_are_accepted_and_some_refused() -> None:
    """The test above holds both kinds."""
    assert _ACCEPTED.count(True) >= 5
    assert _ACCEPTED.count(False) >= 100


@settings(max_examples=max(200, settings().max_examples))
@given(graph=mutants())
def test_a_certificate_made_anew_supports_no_false_text(graph: Graph) -> None:
    stated = certificate(graph)
    assert bool(faults_of(graph, stated)) == any(false_claims(graph, prove(graph)))
    assert faults_of(rich(), stated) == [] or stated != certificate(rich())


@given(data=st.data())
def test_a_false_bound_is_refused_though_all_that_follows_from_it_agrees(data: st.DataObject) -> None:
    graph = rich().with_changes()
    proof = prove(graph)
    value = data.draw(st.sampled_from([v for v in proof.bounds if np.any(proof.bounds[v].lo < proof.bounds[v].hi)]))
    bounds = proof.bounds[value]
    wide = bounds.lo < bounds.hi
    low, high = data.draw(st.sampled_from([(0, 1), (1, 0), (1, 1), (0, 3)]))
    lo, hi = bounds.lo + low * wide, bounds.hi - high * wide
    assume(np.all(lo <= hi))
    false = Bounds.of(lo, hi)
    lie = proof_with(graph, {value: Bounds(false.lo, false.hi, bounds.data, false.step)})
    faults = faults_of(graph, certificate(graph, lie))
    assert [f.split(":")[0] for f in faults] == [f"values {value.name!r}"]


@given(data=st.data())
def test_a_looser_bound_may_stand_where_all_that_follows_from_it_agrees(data: st.DataObject) -> None:
    graph = _unclaimed(rich())
    proof = prove(graph)
    values = [v for v in proof.bounds if (op := graph.producers.get(v)) is not None and op.mnemonic != "const"]
    value = data.draw(st.sampled_from(values))
    storage = storage_of(value.type.element)
    assert storage is not None
    lo, hi = (
        np.array(e + d, object)
        for e, d in zip(
            (proof.bounds[value].lo, proof.bounds[value].hi),
            data.draw(st.tuples(st.integers(-9, 0), st.integers(0, 9))),
            strict=True,
        )
    )
    wide = Bounds.of(np.maximum(lo, storage.lo), np.minimum(hi, storage.hi))
    assert faults_of(graph, certificate(graph, proof_with(graph, {value: wide}))) == []
    whole = proof_with(graph, {value: Bounds.of(storage.lo, storage.hi)})
    stated = certificate(graph, whole)
    assert faults_of(graph, stated) == []
    stated["values"][value.name] |= {"rule": "type", "inputs": []}
    assert faults_of(graph, stated) == []


def _unclaimed(graph: Graph) -> Graph:
    """The graph without the facts that its text states."""
    new = {v: replace(v, range=None) for v in graph.values()}
    ops = []
    for op in graph.ops:
        changes: dict[str, Any] = {"partial": None} if isinstance(op, Accumulating) else {}
        if getattr(op, "overflow", None) is Overflow.NONE:
            changes["overflow"] = Overflow.SATURATE
        pick = [tuple(new[v] for v in values) for values in (op.operands, op.results)]
        ops.append(op.with_changes(operands=pick[0], results=pick[1], **changes))
    inputs, outputs = (tuple(new[v] for v in values) for values in (graph.inputs, graph.outputs))
    return graph.with_changes(inputs=inputs, outputs=outputs, ops=tuple(ops))


def test_the_oracle_sees_a_false_claim() -> None:
    stated = certificate(rich())
    stated["values"]["acc"]["hi"][0] -= 1
    check_soundness(rich(), every_input(rich()), proof_of(rich(), certificate(rich())))
    with pytest.raises(Unsound, match="%acc spans"):
        check_soundness(rich(), every_input(rich()), proof_of(rich(), stated))
