"""No value, partial sum or lane of a run leaves what is proved of it, and a rule that is wrong does not pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, given, settings
from property.recorder import Unsound, check_soundness
from property.soundness_graphs import Model, models

from qir.arrays import Array
from qir.fixed_point import Overflow, Rounding
from qir.interval import Bounds, Interval
from qir.ir import Op, OpBounds, Value
from qir.ops import FIXED_OPS
from qir.ops.accumulate import STEPWISE, Accumulating, Order
from qir.ops.constant import Const
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table, narrowed
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.ops.fixed_rescale import Quantize, Requantize
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.printer import print_graph
from qir.proof import Method, Proof, prove
from qir.types import TensorType, storage_of
from qir.verifier import find_faults

Tensor = npt.NDArray[Any]
#: The first is the widest.
METHODS = (Method.INTERVAL, Method.AFFINE)

_IN_CI = 1000
_EXAMPLES = max(_IN_CI, 4 * settings().max_examples)
_DISTINCT = 5000 if settings.get_current_profile_name() == "nightly" else 300


def test_no_number_leaves_its_bounds(record_property: Callable[[str, object], None]) -> None:
    texts: set[str] = set()
    kinds: set[object] = set()

    @settings(max_examples=_EXAMPLES)
    @given(case=models())
    def check(case: Model) -> None:
        graph = case.graph
        texts.add(print_graph(graph))
        kinds.update(k for op in graph.ops for k in _kinds(op))
        assert find_faults(graph) == ()
        proofs = [prove(graph, method) for method in METHODS]
        check_soundness(graph, case.feeds, *proofs)
        for other in proofs[1:]:
            assert_inside(other, proofs[0])

    check()
    record_property("distinct graphs", len(texts))
    assert len(texts) >= _DISTINCT
    # The reals of dequantize_blocks have no bounds, and are of constants alone.
    assert kinds >= {op.mnemonic for op in FIXED_OPS} - {"dequantize_blocks"}
    sums = {(mode, order) for mode in Overflow for order in Order}
    assert kinds >= sums | set(Rounding) | {"depthwise", "grouped", "dilated", "padded", "product", "dropped bits"}


def assert_inside(inner: Proof, outer: Proof) -> None:
    """No fact of one proof is wider than that of the other."""
    for value, bounds in outer.bounds.items():
        _assert_within(inner.bounds[value], bounds, f"%{value.name}")
    assert inner.steps.keys() == outer.steps.keys()
    for op, wide in outer.steps.items():
        tight = inner.steps[op]
        facts = [(n, getattr(tight, n), getattr(wide, n)) for n in ("unsaturated", "partial", "product")]
        facts += [(n, tight.lanes[n], fact) for n, fact in wide.lanes.items()]
        for name, a, b in facts:
            assert b is None or (a is not None and b.contains(a)), f"{name} of {op.describe()}"
        if wide.channel_partials is not None:
            assert tight.channel_partials is not None
            _assert_within(tight.channel_partials, wide.channel_partials, f"partial by channel of {op.describe()}")


def _assert_within(inner: Bounds, outer: Bounds, place: str) -> None:
    assert np.all(inner.lo >= outer.lo), place
    assert np.all(inner.hi <= outer.hi), place


def _kinds(op: Op) -> list[object]:
    """What a graph shall have somewhere."""
    found: list[object] = [op.mnemonic]
    if isinstance(op, Accumulating):
        found += [(op.overflow, op.order), op.rounding]
        found += [name for name, is_there in (("product", op.product), ("dropped bits", op.dropped_bits)) if is_there]
    if isinstance(op, Conv2d):
        channels = op.operands[0].type.shape[3]
        found += ["depthwise"] if op.groups == channels != 1 else ["grouped"] if op.groups > 1 else []
        found += [name for name, v in (("dilated", max(op.dilations) > 1), ("padded", max(op.pads) > 0)) if v]
    return found


# Rules that are wrong on purpose

Rule = Callable[[Op, Sequence[Bounds]], OpBounds | None]
#: A wrong rule, made of the right one.
Wrong = Callable[[Rule, Any, Sequence[Bounds]], OpBounds | None]


def _with_result(found: OpBounds | None, change: Callable[[Bounds], Bounds]) -> OpBounds | None:
    return None if found is None else replace(found, results=(change(found.results[0]),))


def _greatest_forgotten(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return _with_result(right(op, operands), _without_greatest)


def _without_greatest(b: Bounds) -> Bounds:
    return Bounds(b.lo, np.where(b.hi > b.lo, b.hi - np.maximum(b.steps, 1), b.hi).astype(object), b.data, b.step)


def _step_doubled(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return _with_result(right(op, operands), lambda b: Bounds.of(b.lo, b.hi, b.steps * 2))


def _plain(value: Value) -> Value:
    storage = storage_of(value.type.element)
    assert storage is not None
    return replace(value, type=value.type.with_element(storage))


def _zero_forgotten(place: int) -> Wrong:
    def rule(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
        changed = [_plain(v) if i == place else v for i, v in enumerate(op.operands)]
        return right(op.with_changes(operands=tuple(changed)), operands)

    return rule


def _border_forgotten(right: Rule, op: Conv2d, operands: Sequence[Bounds]) -> OpBounds | None:
    x = op.operands[0]
    batch, height, width, channels = x.type.concrete(1)
    shape = (batch, height + op.pads[0] + op.pads[2], width + op.pads[1] + op.pads[3], channels)
    wider = replace(x, type=TensorType(shape, x.type.element))
    return right(op.with_changes(operands=(wider, *op.operands[1:]), pads=(0, 0, 0, 0)), operands)


def _bias_forgotten(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op, operands[:2])


def _bias_at_the_other_end(right: Rule, op: Accumulating, operands: Sequence[Bounds]) -> OpBounds | None:
    swapped = {
        Order.KHWC: Order.BIAS_KHWC,
        Order.BIAS_KHWC: Order.KHWC,
        Order.CKHW: Order.BIAS_CKHW,
        Order.BIAS_CKHW: Order.CKHW,
    }
    return right(op.with_changes(order=swapped[op.order]), operands)


def _channels_first(right: Rule, op: Accumulating, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op.with_changes(order=Order.BIAS_CKHW if op.order.bias_first else Order.CKHW), operands)


def _result_for_partial(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    found = right(op, operands)
    assert found is not None
    return replace(found, partial=found.results[0].hull, channel_partials=found.results[0])


def _channels_of_partial_swapped(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    found = right(op, operands)
    assert found is not None
    assert found.channel_partials is not None
    return replace(found, channel_partials=found.channel_partials.map(lambda e: e[::-1]))


def _saturation_at_the_end(right: Rule, op: Accumulating, operands: Sequence[Bounds]) -> OpBounds | None:
    if op.overflow not in STEPWISE:
        return right(op, operands)
    found = right(op.with_changes(overflow=Overflow.NONE), operands)
    return _with_result(found, lambda b: b.clamp(op.accumulator.lo, op.accumulator.hi))


def _steps_floored(right: Rule, op: Accumulating, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op.with_changes(rounding=None if op.rounding is None else Rounding.FLOOR), operands)


def _shift_forgotten(right: Rule, op: Accumulating, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op.with_changes(product_shift=None, rounding=None), operands)


def _products_saturate(right: Rule, op: Accumulating, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op.with_changes(product_overflow=Overflow.SATURATE if op.product else None), operands)


def _lane(name: str, change: Callable[[Interval], Interval]) -> Wrong:
    """A bound of what is on the way, changed."""

    def rule(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
        found = right(op, operands)
        if found is None or name not in found.lanes:
            return found
        return replace(found, lanes={**found.lanes, name: change(found.lanes[name])})

    return rule


def _pair_of_one(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    found = right(op, operands)
    assert found is not None
    return replace(found, lanes={**found.lanes, "pair": found.lanes["product"]})


def _short(interval: Interval) -> Interval:
    return Interval(interval.lo, max(interval.lo, interval.hi - 1))


def _product_short(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    found = right(op, operands)
    return found if found is None or found.product is None else replace(found, product=_short(found.product))


def _unsaturated_short(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    found = right(op, operands)
    if found is None or found.unsaturated is None:
        return found
    return replace(found, unsaturated=_short(found.unsaturated))


def _one_element_short(right: Rule, op: ReduceSum, operands: Sequence[Bounds]) -> OpBounds | None:
    x, axis = op.operands[0], op.axes[0]
    shape = tuple(max(1, int(d) - 1) if i == axis else d for i, d in enumerate(x.type.shape))
    return right(op.with_changes(operands=(replace(x, type=x.type.with_shape(shape)),)), operands)


def _zero_of_result_forgotten(right: Rule, op: Requantize, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op.with_changes(results=(_plain(op.result),)), operands)


def _one_multiplier(right: Rule, op: Requantize, operands: Sequence[Bounds]) -> OpBounds | None:
    first = {n: Array(np.full_like(a.data, a.data.reshape(-1)[0])) for n, a in _factors(op).items()}
    return right(op.with_changes(**first), operands)


def _factors(op: Requantize) -> dict[str, Array]:
    return {"multiplier": op.multiplier, "shift": op.shift}


def _left_shift_forgotten(right: Rule, op: Requantize, operands: Sequence[Bounds]) -> OpBounds | None:
    found = right(op, operands)
    shifted = right(op.with_changes(input_shift=0, shift=Array(np.minimum(op.shift.data, 0))), operands)
    assert found is not None
    assert shifted is not None
    return replace(found, lanes=shifted.lanes)


def _second_operand_forgotten(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op, [operands[0], Bounds.of(operands[1].lo, operands[1].lo)])


def _larger_step(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    step = max(int(b.steps.max(initial=0)) for b in operands)
    return _with_result(right(op, operands), lambda b: Bounds.of(b.lo, b.hi, np.where(b.lo == b.hi, 0, step)))


def _like_ends_only(right: Rule, op: FixedSub | FixedMul, operands: Sequence[Bounds]) -> OpBounds | None:
    """Of the corners, only those of both least and of both greatest values."""
    a, b = (Bounds.of(*(getattr(o.hull, end) for end in ("lo", "hi"))) for o in operands)
    (low, high), zeros = (
        [op.combine(x, y) for x, y in ((a.lo, b.lo), (a.hi, b.hi))],
        [v.type.element for v in op.operands],
    )
    if any(e != storage_of(e) for e in zeros):
        return right(op, operands)
    return narrowed(Bounds.of(np.minimum(low, high), np.maximum(low, high)), op.storage, op.overflow)


def _last_entry_forgotten(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return right(op, [_without_greatest(operands[0]), operands[1]])


def _steps_kept(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return _with_result(right(op, operands), lambda b: operands[0])


def _channels_repeated(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    """Channels that a reshape unrolls from whole pixels, taken for neighbours."""
    found, channels = right(op, operands), operands[0].channels
    assert found is not None
    times = (found.results[0].channels or 0) // (channels or 1)
    return _with_result(found, lambda b: operands[0].map(lambda e: np.repeat(e, times)) if times else b)


def _channels_in_place(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    """Channel bounds as they were, cut or repeated, wherever elements go."""
    count, x = int(op.result.type.shape[-1]), operands[0]
    return _with_result(
        right(op, operands), lambda b: b if x.channels is None else x.map(lambda e: np.resize(e, count))
    )


def _first_only(right: Rule, op: Op, operands: Sequence[Bounds]) -> OpBounds | None:
    return OpBounds((operands[0].flat(),))


# Not that a sum saturates at its end: where all terms have the same bounds, as in reduce_sum, that is mostly right.
_SUMS: dict[str, Wrong] = {
    "the greatest is forgotten": _greatest_forgotten,
    "the step is doubled": _step_doubled,
    "the zero point is forgotten": _zero_forgotten(0),
    "partial sums are those at the end": _result_for_partial,
    "channels of partial sums are swapped": _channels_of_partial_swapped,
    "steps are floored": _steps_floored,
    "the shift of products is forgotten": _shift_forgotten,
    "products are one short": _product_short,
    "exact products are one short": _lane("product", _short),
    "pairs are one product": _pair_of_one,
    "pairs are one short": _lane("pair", _short),
}
_WEIGHTED: dict[str, Wrong] = _SUMS | {
    "sums saturate at the end": _saturation_at_the_end,
    "all products saturate": _products_saturate,
    "zero points of the weights are forgotten": _zero_forgotten(1),
    "the bias is forgotten": _bias_forgotten,
    "the bias is at the other end": _bias_at_the_other_end,
}
_GREATEST: dict[str, Wrong] = {"the greatest is forgotten": _greatest_forgotten}
_ARITHMETIC: dict[str, Wrong] = _GREATEST | {
    "the zero point is forgotten": _zero_forgotten(1),
    "the second operand is its least": _second_operand_forgotten,
    "before saturation it is one short": _unsaturated_short,
}
_CHANNELS: dict[str, Wrong] = _GREATEST | {"channels stay in place": _channels_in_place}

WRONG: dict[type[Op], dict[str, Wrong]] = {
    Const: _GREATEST,
    Conv2d: _WEIGHTED | {"the border is forgotten": _border_forgotten, "channels come first": _channels_first},
    FixedMatMul: _WEIGHTED,
    ReduceSum: _SUMS | {"an element is forgotten": _one_element_short},
    Requantize: {
        "the greatest is forgotten": _greatest_forgotten,
        "the step is doubled": _step_doubled,
        "the zero point is forgotten": _zero_forgotten(0),
        "the zero point of the result is forgotten": _zero_of_result_forgotten,
        "one multiplier serves all channels": _one_multiplier,
        "the left shift is forgotten": _left_shift_forgotten,
        "before saturation it is one short": _unsaturated_short,
    },
    Quantize: _GREATEST,
    FixedAdd: _ARITHMETIC | {"the larger step": _larger_step},
    FixedSub: _ARITHMETIC | {"the larger step": _larger_step, "only like ends": _like_ends_only},
    FixedMul: _ARITHMETIC | {"the larger step": _larger_step, "only like ends": _like_ends_only},
    FixedDiv: _GREATEST | {"before saturation it is one short": _unsaturated_short},
    Table: _GREATEST | {"the last entry is forgotten": _last_entry_forgotten, "the step is doubled": _step_doubled},
    FixedSoftmax: _GREATEST,
    FixedArgMax: _GREATEST,
    FixedMaxPool: _GREATEST,
    FixedAveragePool: _GREATEST | {"steps are kept": _steps_kept, "sums are one short": _lane("sum", _short)},
    FixedReshape: _GREATEST | {"channels are repeated": _channels_repeated},
    FixedTranspose: _CHANNELS,
    FixedConcat: _GREATEST | {"the first operand only": _first_only},
    FixedSlice: _CHANNELS,
    FixedGather: _CHANNELS,
    FixedPad: _GREATEST | {"the value is forgotten": _first_only},
}


def test_every_rule_is_made_wrong() -> None:
    """The reals of dequantize_blocks have no bounds that could be wrong."""
    kinds: tuple[type[Op], ...] = (Const, *FIXED_OPS)
    ruled = {op for op in kinds if op.bounds is not Op.bounds}
    assert {op.mnemonic for op in ruled} - {"dequantize_blocks"} == {op.mnemonic for op in WRONG}


@pytest.fixture(scope="module")
def cases() -> list[Model]:
    """As many graphs as the test above runs on in CI, always the same ones."""
    found: list[Model] = []

    @settings(max_examples=_IN_CI, derandomize=True, database=None, phases=[Phase.generate])
    @given(case=models(may_be_proved=False))
    def collect(case: Model) -> None:
        found.append(case)

    collect()
    return found


@pytest.mark.parametrize(("op_class", "name"), [(op, name) for op, rules in WRONG.items() for name in rules])
def test_a_wrong_rule_is_caught(
    op_class: type[Op], name: str, cases: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, right = WRONG[op_class][name], op_class.bounds
    monkeypatch.setattr(op_class, "bounds", lambda op, operands: wrong(right, op, operands))

    def check_all() -> None:
        for case in cases:
            if any(type(op) is op_class for op in case.graph.ops):
                graph = case.graph.with_changes()  # without the proof by the rule that is right
                check_soundness(graph, case.feeds, prove(graph))

    with pytest.raises(Unsound):
        check_all()
