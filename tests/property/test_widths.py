"""Widths by integer program against brute force: the solver, the tables of costs, and both on graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import model, random

import qir
from qir.cost import graph_cost, rooms
from qir.ir import Graph
from qir.pass_manager import PassContext
from qir.passes.widths.costs import Metric, unit_of, value_of
from qir.passes.widths.decisions import Decision, Kind, Widths, decisions, with_storages
from qir.passes.widths.problem import Budget, InfeasibleError, WidthProblem
from qir.passes.widths.solver import Factor, Problem, Total, solve
from qir.target import Target, WeightFormat

# The solver alone: integers


def whole(totals: Sequence[Total], sizes: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The largest of the totals for every joint choice."""
    found = np.full(sizes, np.iinfo(np.int64).min)
    for total in totals:
        own = np.full(sizes, total.constant, np.int64)
        for factor in total.factors:
            own += spread(factor, sizes)
        found = np.maximum(found, own)
    return found


def spread(factor: Factor, sizes: tuple[int, ...]) -> npt.NDArray[np.int64]:
    shape = [size if d in factor.scope else 1 for d, size in enumerate(sizes)]
    return factor.table.reshape(shape)


def brute_force(problem: Problem) -> tuple[int, ...] | None:
    """The best objectives, by looking at every joint choice."""
    left = np.ones(problem.sizes, bool)
    for total, most in problem.limits:
        left &= whole([total], problem.sizes) <= most
    for factor in problem.forbidden:
        left &= spread(factor, problem.sizes) == 0
    values = []
    for totals in problem.objectives:
        if not left.any():
            return None
        table = whole(totals, problem.sizes)
        values.append(int(table[left].min()))
        left &= table == values[-1]
    return tuple(values)


@st.composite
def problems(draw: st.DrawFn, most: int = 6) -> Problem:
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=most)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spans = draw(st.sampled_from([(3,), (50, 3), (100_000,)]))

    def factor(highest: int) -> Factor:
        count = min(int(rng.integers(1, 4)), len(sizes))
        scope = tuple(sorted(rng.choice(len(sizes), count, replace=False).tolist()))
        return Factor(scope, rng.integers(-highest, highest + 1, [sizes[d] for d in scope]))

    def total() -> Total:
        highest = int(rng.choice(spans))
        return Total(tuple(factor(highest) for _ in range(int(rng.integers(0, 5)))), int(rng.integers(-5, 6)))

    objectives = tuple(tuple(total() for _ in range(int(rng.integers(1, 3)))) for _ in range(int(rng.integers(1, 4))))
    limits = []
    for _ in range(int(rng.integers(0, 4))):
        bound = total()
        table = whole([bound], sizes)
        limits.append((bound, int(rng.integers(table.min() - 1, table.max() + 2))))
    forbidden = tuple(Factor(f.scope, (f.table > 0).astype(np.int64)) for f in [factor(3)] * int(rng.integers(0, 2)))
    return Problem(sizes, objectives, tuple(limits), forbidden)


@given(problems())
@settings(max_examples=max(150, settings().max_examples))
def test_the_solver_finds_what_brute_force_finds(problem: Problem) -> None:
    found = solve(problem)
    expected = brute_force(problem)
    assert (None if found is None else found.values) == expected
    if found is not None:
        assert found.values == problem.values(found.chosen)
        assert problem.allows(found.chosen)
        assert found.gap == 0
        assert solve(problem) == found


def chain(rng: np.random.Generator, count: int, choices: int, pairs: bool) -> Problem:
    """Losses that fall and costs that rise with width; with `pairs` the cost is of neighbours together."""
    losses = [Factor((d,), np.sort(rng.integers(0, 100_000, choices))[::-1].copy()) for d in range(count)]
    if pairs:
        costs = [
            Factor((d, d + 1), np.sort(np.sort(rng.integers(100, 10_000, (choices, choices)), 0), 1))
            for d in range(count - 1)
        ]
    else:
        costs = [Factor((d,), np.sort(rng.integers(100, 10_000, choices))) for d in range(count)]
    cost = Total(tuple(costs))
    low, high = cost.of([0] * count), cost.of([choices - 1] * count)
    return Problem((choices,) * count, ((Total(tuple(losses)),), (cost,)), ((cost, (low + high) // 2),))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_million_joint_choices_by_brute_force(pairs: bool, seed: int) -> None:
    problem = chain(np.random.default_rng(seed), 10, 4, pairs)
    found = solve(problem)
    assert found is not None
    assert found.values == brute_force(problem)
    assert found.gap == 0


@pytest.mark.parametrize("pairs", [False, True])
def test_two_hundred_layers_are_solved_to_a_gap_of_0(pairs: bool) -> None:
    problem = chain(np.random.default_rng(7), 200, 4, pairs)
    found = solve(problem)
    assert found is not None
    assert found.gap == 0
    assert problem.allows(found.chosen)


# On graphs: the costs are those of qir.cost

FPGA = qir.load_target("fpga")
FABRIC = replace(
    FPGA,
    activations=replace(FPGA.activations, bits=(4, 6, 8), default=8),
    weights=replace(FPGA.weights, bits=(1, 2, 4, 8), default=8),
)
#: Memories so small that where data lives follows from the widths.
MEMORIES = replace(
    FPGA,
    activations=replace(FPGA.activations, bits=(4, 8, 16), default=8),
    weights=replace(FPGA.weights, bits=(2, 4, 8), default=8, formats=(WeightFormat.UNIFORM,)),
    memory={"bram": 90, "ddr": 1_000_000},
    costs=replace(FPGA.costs, load={"bram": 8, "ddr": 1.5}, store={"bram": 8, "ddr": 1}),
)
#: The same, the small memory being the slow one.
SLOW_FIRST = replace(
    MEMORIES,
    costs=replace(
        FPGA.costs, load={"bram": 1.5, "ddr": 8}, store={"bram": 1, "ddr": 8}, byte_energy={"bram": 160, "ddr": 1}
    ),
)


@st.composite
def networks(draw: st.DrawFn) -> Graph:
    """Blocks of convolutions, sums with what came before, and concatenations, on 2 channels of 3 by 3."""
    blocks = draw(
        st.lists(st.sampled_from(["conv", "depthwise", "add", "concat", "pool", "mul"]), min_size=1, max_size=3)
    )
    lines, weights, values = list[str](), dict[str, Any](), ["x"]
    for number, block in enumerate(blocks):
        source, result = values[-1], f"v{number}"
        other = draw(st.sampled_from(values))
        if block in ("conv", "depthwise"):
            shape, groups = ((2, 2, 1, 1), 1) if block == "conv" else ((2, 1, 3, 3), 2)
            weights[f"w{number}"] = random(*shape, seed=number)
            pads = "1,1,1,1" if block == "depthwise" else "0,0,0,0"
            lines.append(f"{result} = Conv<pads=[{pads}], group={groups}>({source}, w{number})")
        elif block == "concat":
            weights[f"w{number}"] = random(2, 4, 1, 1, seed=number)
            lines += [f"c{number} = Concat<axis=1>({source}, {other})", f"{result} = Conv(c{number}, w{number})"]
        elif block == "pool":
            lines.append(f"{result} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({source})")
        else:
            lines.append(f"{result} = {block.title()}({source}, {other})")
        values.append(result)
    text = f"g (float[N,2,3,3] x) => (float[N,2,3,3] {values[-1]}) {{ {' '.join(lines)} }}"
    return qir.import_onnx(model(text, **weights))


def assigned(graph: Graph, target: Target) -> Graph:
    pipeline = qir.default_pipeline().before("select-q-formats")
    return pipeline.run(graph, PassContext(target, [{"x": random(6, 2, 3, 3, seed=9)}]))


def problem_of(graph: Graph, target: Target, seed: int) -> tuple[WidthProblem, tuple[Decision, ...]]:
    found = decisions(graph, target, Widths())
    rng = np.random.default_rng(seed)
    losses = [dict(zip(d.choices, np.sort(rng.integers(0, 1000, len(d.choices))).tolist(), strict=True)) for d in found]
    return WidthProblem(graph, target, found, losses), found


def cost_of(graph: Graph, target: Target, found: Sequence[Decision], chosen: Sequence[int]) -> dict[Metric, Fraction]:
    """What qir.cost says of a graph that has these widths."""
    storages = {v: list(d.choices.values())[c] for d, c in zip(found, chosen, strict=True) for v in d.values}
    changed = with_storages(graph, storages)
    cost = graph_cost(changed, target)
    return {m: value_of(m, changed, target, cost) for m in METRICS}


METRICS = (
    Metric.WEIGHTS,
    Metric.CONSTANTS,
    Metric.PEAK,
    Metric.LATENCY,
    Metric.ENERGY,
    Metric.LUT,
    Metric.DSP,
    Metric.BRAM,
)


def total_of(totals: Sequence[Total], chosen: Sequence[int]) -> Fraction:
    return Fraction(max(total.of(chosen) for total in totals))


@given(networks(), st.sampled_from([FABRIC, MEMORIES, SLOW_FIRST]), st.integers(0, 2**32 - 1))
@settings(max_examples=max(25, settings().max_examples // 10))
def test_tables_are_what_costs_say_of_the_graph_with_those_widths(network: Graph, target: Target, seed: int) -> None:
    graph = assigned(network, target)
    problem, found = problem_of(graph, target, seed)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        chosen = [int(rng.integers(len(d.choices))) for d in found]
        storages = {v: list(d.choices.values())[c] for d, c in zip(found, chosen, strict=True) for v in d.values}
        homes = graph_cost(with_storages(graph, storages), target).homes
        for metric, value in cost_of(graph, target, found, chosen).items():
            assert total_of(problem.costs.totals(metric, homes), chosen) * unit_of(metric, target) == value, metric


@given(networks(), st.sampled_from([FABRIC, MEMORIES, SLOW_FIRST]), st.data())
@settings(max_examples=max(25, settings().max_examples // 10))
def test_widths_of_graphs_are_those_of_brute_force(network: Graph, target: Target, data: st.DataObject) -> None:
    graph = assigned(network, target)
    problem, found = problem_of(graph, target, data.draw(st.integers(0, 1000)))
    sizes = [len(d.choices) for d in found]
    if math.prod(sizes) > 1500:
        found = tuple(
            Decision(d.name, d.kind, d.values, dict(list(d.choices.items())[:: max(len(d.choices) - 1, 1)]))
            for d in found
        )
        losses = [{name: 1000.0 * place for place, name in enumerate(d.choices)} for d in found]
        problem = WidthProblem(graph, target, found, losses)
        sizes = [len(d.choices) for d in found]
    every = list(itertools.product(*map(range, sizes)))
    costs = [cost_of(graph, target, found, chosen) for chosen in every]
    losses_of = [problem.loss.of(chosen) for chosen in every]
    metrics = data.draw(st.lists(st.sampled_from(METRICS), min_size=1, max_size=2, unique=True))
    budgets = []
    for metric in metrics:
        values = sorted({cost[metric] for cost in costs})
        budgets.append(Budget(metric, values[data.draw(st.integers(0, len(values) - 1))]))
    kept = [i for i, cost in enumerate(costs) if all(cost[b.metric] <= b.most for b in budgets)]
    if not kept:
        with pytest.raises(InfeasibleError):
            problem.best(budgets)
        return
    best = problem.best(budgets)
    assert Fraction(best.loss) == min(losses_of[i] for i in kept)
    assert all(best.costs[b.metric] <= b.most for b in budgets)
    assert best.gap == 0
    most_loss = losses_of[data.draw(st.sampled_from(kept))]
    least = problem.best((), metrics[0], most_loss)
    least_cost = min(c[metrics[0]] for c, own in zip(costs, losses_of, strict=True) if own <= most_loss)
    assert Fraction(least.loss) <= most_loss
    if metrics[0] in (Metric.LATENCY, Metric.ENERGY):  # whose steps are 2**-20 of the best, for each of few layers
        assert least_cost <= least.costs[metrics[0]] <= least_cost * (1 + Fraction(1, 100_000))
    else:
        assert least.costs[metrics[0]] == least_cost


#: Five layers and five groups of activations: sums of what two layers make, and a concatenation that shares a format.
SHARED = """g (float[N,2,3,3] x) => (float[N,2,3,3] y) {
    a = Conv<pads=[1,1,1,1]>(x, w0) s = Add(a, x) b = Conv(s, w1) c = Conv(s, w2) d = Concat<axis=1>(b, c)
    e = Conv<pads=[1,1,1,1], group=4>(d, w3) y = Conv(e, w4)
}"""


def in_integers(total: Total, sizes: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], int]:
    """A total for every joint choice, and by how much it is multiplied so that all are integers."""
    numbers = [Fraction(total.constant), *(Fraction(e) for f in total.factors for e in f.table.reshape(-1))]
    times = math.lcm(*(n.denominator for n in numbers))
    found = np.full(sizes, int(numbers[0] * times), np.int64)
    for factor in total.factors:
        whole_table = np.array([int(e * times) for e in factor.table.reshape(-1)]).reshape(factor.table.shape)
        found += spread(Factor(factor.scope, whole_table), sizes)
    return found, times


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metrics", [(Metric.WEIGHTS, Metric.LUT), (Metric.ENERGY, Metric.DSP), (Metric.CONSTANTS,)])
def test_a_million_joint_widths_of_a_graph_by_brute_force(seed: int, metrics: tuple[Metric, ...]) -> None:
    shapes = {"w0": (2, 2, 3, 3), "w1": (2, 2, 1, 1), "w2": (2, 2, 1, 1), "w3": (4, 1, 3, 3), "w4": (2, 4, 1, 1)}
    weights: dict[str, Any] = {n: random(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    network = qir.import_onnx(model(SHARED, **weights))
    target = replace(FABRIC, activations=replace(FABRIC.activations, bits=(4, 6, 8, 16), default=8))
    graph = assigned(network, target)
    found = decisions(graph, target, Widths(("8", "4", "2", "1")))
    sizes = tuple(len(d.choices) for d in found)
    assert math.prod(sizes) >= 4**10
    assert any(len(d.values) == 3 for d in found)  # both operands of the concatenation and its result
    rng = np.random.default_rng(seed)
    losses = [dict(zip(d.choices, np.sort(rng.integers(0, 1000, len(d.choices))).tolist(), strict=True)) for d in found]
    problem = WidthProblem(graph, target, found, losses)
    loss, _ = in_integers(problem.loss, sizes)
    left, budgets = np.ones(sizes, bool), []
    homes = rooms(target)[0].homes
    for metric in metrics:
        (total,) = problem.costs.totals(metric, homes)
        table, times = in_integers(total, sizes)
        most = int(np.quantile(table, rng.uniform(0.1, 0.6)))
        left &= table <= most
        budgets.append(Budget(metric, Fraction(most, times) * unit_of(metric, target)))
    best = problem.best(budgets)
    assert best.loss == loss[left].min()
    assert best.gap == 0
    assert all(best.costs[b.metric] <= b.most for b in budgets)


@given(networks(), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=max(25, settings().max_examples // 10))
def test_losses_of_many_magnitudes_are_told_apart(network: Graph, seed: int, share: float) -> None:
    """As real losses are: of 8 bits a millionth of that of 1 bit."""
    graph = assigned(network, FABRIC)
    found = decisions(graph, FABRIC, Widths(("8", "4", "2", "1"), (8,)))
    rng = np.random.default_rng(seed)
    losses = [
        dict(zip(d.choices, np.sort(10.0 ** rng.uniform(-8, 1, len(d.choices))).tolist(), strict=True)) for d in found
    ]
    problem = WidthProblem(graph, FABRIC, found, losses)
    every = list(np.ndindex(*(len(d.choices) for d in found)))
    costs = [problem.exact(Metric.WEIGHTS, chosen) for chosen in every]
    budget = min(costs) + (max(costs) - min(costs)) * Fraction(share)
    best = problem.best([Budget(Metric.WEIGHTS, budget)])
    least = min(problem.loss.of(chosen) for chosen, cost in zip(every, costs, strict=True) if cost <= budget)
    assert least <= Fraction(best.loss) * (1 + Fraction(1, 10**12))
    assert Fraction(best.loss) <= least * (1 + Fraction(1, 100_000))  # the steps are finer by far


@pytest.mark.parametrize("seed", [0, 1, 37])
def test_forty_layers_are_as_good_as_by_dynamic_programming(seed: int) -> None:
    """With losses as real ones are, and one large layer, whose narrowest width alone would save all the bytes."""
    lines = [f"v{i} = MatMul({f'v{i - 1}' if i else 'x'}, w{i})" for i in range(40)]
    text = f"g (float[N,2,3,3] x) => (float[N,2,3,40] v39) {{ {' '.join(lines)} }}"
    weights: dict[str, Any] = {f"w{i}": random(3, 40 if i == 39 else 3, seed=i) * np.float32(0.5) for i in range(40)}
    graph = assigned(qir.import_onnx(model(text, **weights)), FABRIC)
    found = decisions(graph, FABRIC, Widths(("8", "4", "2", "1"), (8,)))
    rng = np.random.default_rng(seed)
    lows, highs = (-6, -4, -2, -1), (-5, -3, -1, 1)
    losses = [
        dict(zip(d.choices, (10.0 ** rng.uniform(lows[:count], highs[:count])).tolist(), strict=True))
        for d in found
        if (count := len(d.choices))
    ]
    problem = WidthProblem(graph, FABRIC, found, losses)
    best = {0: Fraction(0)}  # the least loss of what takes so many bytes
    for decision, own in zip(found, losses, strict=True):
        taken: dict[int, Fraction] = {}
        elements = decision.values[0].type.sample_size if decision.kind is Kind.WEIGHTS else 0
        for name, storage in decision.choices.items():
            size = -(-elements * storage.stored_bits // 8)
            for cost, loss in best.items():
                total = loss + Fraction(own[name])
                taken[cost + size] = min(total, taken.get(cost + size, total))
        best = taken
    for share in (0.2, 0.5, 0.8, 0.9, 0.96):
        budget = min(best) + (max(best) - min(best)) * Fraction(share)
        expected = min(loss for cost, loss in best.items() if cost <= budget)
        point = problem.best([Budget(Metric.WEIGHTS, budget)])
        assert point.costs[Metric.WEIGHTS] <= budget
        assert abs(Fraction(point.loss) - expected) <= expected / 10_000


def test_all_metrics_of_a_fabric_are_held_to_and_rooms_are_several() -> None:
    assert len(rooms(MEMORIES)) > 1
    graph = assigned(qir.import_onnx(model(RESIDUAL, w=random(2, 2, 3, 3), u=random(2, 2, 1, 1))), MEMORIES)
    problem, found = problem_of(graph, MEMORIES, 0)
    homes = {
        graph_cost(problem.assignment(c).graph, MEMORIES).homes
        for c in itertools.product(*(range(len(d.choices)) for d in found))
    }
    assert len(homes) > 1


@pytest.mark.parametrize("metric", [Metric.LATENCY, Metric.ENERGY])
def test_budgets_hold_where_the_small_memory_is_the_slow_one(metric: Metric) -> None:
    """Data lives in the first memory that it fits into, not in the best."""
    graph = assigned(qir.import_onnx(model(RESIDUAL, w=random(2, 2, 3, 3), u=random(2, 2, 1, 1))), SLOW_FIRST)
    problem, found = problem_of(graph, SLOW_FIRST, 0)
    every = list(itertools.product(*(range(len(d.choices)) for d in found)))
    pairs = [(problem.exact(metric, chosen), float(problem.loss.of(chosen))) for chosen in every]
    costs = sorted({cost for cost, _ in pairs})
    assert problem.best((), metric).costs[metric] == costs[0]
    for most in costs[:: max(len(costs) // 8, 1)]:
        best = problem.best([Budget(metric, most)])
        assert best.costs[metric] <= most
        assert best.loss == min(loss for cost, loss in pairs if cost <= most)


RESIDUAL = """g (float[N,2,3,3] x) => (float[N,2,3,3] y) {
    a = Conv<pads=[1,1,1,1]>(x, w) s = Add(a, x) y = Conv(s, u)
}"""
