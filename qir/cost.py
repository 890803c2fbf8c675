"""What a graph costs on a chip, by the tables of its target: cycles, energy, bytes, and logic where it is laid out.

A roofline for each layer: it takes as long as its computation, or as the memory that moves its data most slowly,
whichever is longer, and layers follow each other. Data moves once, at the widths of its types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from types import MappingProxyType
from typing import Any, Final

from qir.cost_tables import FLOAT_BITS, CostRule, Costs, Fabric
from qir.errors import QirError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_pool import Pool2d
from qir.ops.fixed_rescale import Dequantize, Quantize, Requantize
from qir.ops.float_base import Windowed
from qir.ops.movement import Movement, Reshape
from qir.target import Target
from qir.types import FloatType, IntegerType, storage_of

#: What a layer waits for, where that is no memory.
COMPUTE, OVERHEAD = "compute", "overhead"

Storages = Mapping[Value, IntegerType]
#: Every value as the graph has it.
AS_THEY_ARE: Final[Storages] = MappingProxyType({})


@dataclass(frozen=True)
class Work:
    """What a layer does for one sample, in numbers; other widths and formats of it are `dataclasses.replace` away.

    `positions` is how often the same products are taken, for a convolution the pixels of its output, and `terms` how
    many of them make a sum. Widths are 0 where nothing is multiplied. `index_bits` is what a weight is stored in where
    that is the index of a level, else 0; `shifts` is how many distances it may shift by where a product is but a shift,
    else 0; `weight_fields` has these of a type. `constants`, `loaded` and `stored` are in bits, all else in elements.
    """

    macs: int = 0
    positions: int = 1
    terms: int = 0
    weight_bits: int = 0
    activation_bits: int = 0
    accumulator_bits: int = 0
    index_bits: int = 0
    shifts: int = 0
    constants: int = 0
    loaded: int = 0
    stored: int = 0
    requantized: int = 0
    converted: int = 0
    elements: int = 0
    floating: int = 0

    @property
    def shift_stages(self) -> int:
        """The stages of a logarithmic shifter for the weights: each shifts by a power of two or not."""
        return max(self.shifts - 1, 0).bit_length()

    @property
    def rows(self) -> int:
        """How many rows of the activation's bits a product takes: one a bit of the weight, or one a stage of shifting,
        and one at least.
        """
        return max(self.shift_stages, 1) if self.shifts else self.weight_bits


@dataclass(frozen=True)
class Homes:
    """The memories that constants and activations are moved from and to; empty names where the target states none."""

    constants: str = ""
    activations: str = ""


@dataclass(frozen=True)
class Cost:
    """What a layer, or a whole graph, takes for a sample; None is what the target says nothing of.

    `cycles` are those of `bound`, the longest of `times`, plus the overhead of a layer; `times` are cycles of
    computation and of each memory. `energy` is in pJ, `constant_bytes` and `moved_bytes` (activations loaded and
    stored) are packed at their widths, `bit_operations` the products of both widths of every multiply-accumulate, or,
    where it shifts, of the stages of shifting and the width of the activation.
    """

    macs: int
    bit_operations: int
    constant_bytes: int
    moved_bytes: int
    cycles: float | None = None
    bound: str = ""
    times: Mapping[str, float] | None = None
    energy: float | None = None
    lut: float | None = None
    dsp: float | None = None
    bram: int | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """Ops that become one step on the chip, what they do, and what they cost."""

    name: str
    ops: tuple[Op, ...]
    work: Work
    cost: Cost


@dataclass(frozen=True, eq=False)
class GraphCost:
    """The cost of a graph: its layers in order, and where its data lives.

    `peak_bytes` is the most that activations of a sample take at once, `misfits` says what fits into no memory.
    """

    graph: str
    target: str
    clock: float | None
    layers: tuple[Layer, ...]
    homes: Homes
    peak_bytes: int
    misfits: tuple[str, ...]

    @property
    def total(self) -> Cost:
        """The sums of the layers."""
        costs = [layer.cost for layer in self.layers]
        return Cost(
            sum(c.macs for c in costs),
            sum(c.bit_operations for c in costs),
            sum(c.constant_bytes for c in costs),
            sum(c.moved_bytes for c in costs),
            _sum([c.cycles for c in costs]),
            energy=_sum([c.energy for c in costs]),
            lut=_sum([c.lut for c in costs]),
            dsp=_sum([c.dsp for c in costs]),
            bram=None if (blocks := _sum([c.bram for c in costs])) is None else int(blocks),
        )

    @property
    def seconds(self) -> float | None:
        """The latency of a sample; None without cycles or without a clock."""
        cycles = self.total.cycles
        return None if cycles is None or self.clock is None else cycles / self.clock


def graph_cost(graph: Graph, target: Target) -> GraphCost:
    """The cost of each layer and of a whole graph, from assign-bit-widths on, when every value has a width.

    Raises QirError at an earlier stage, and where the target's tables lack a pair of widths.
    """
    _need_widths(graph)
    groups = layer_ops(graph)
    works = [work_of(graph, ops, seen) for ops, seen in with_seen(groups)]
    constants = sum(-(-work.constants // 8) for work in works)
    peak = peak_bytes(graph, groups)
    homes, misfits = place(target, constants, peak)
    layers = tuple(
        Layer(layer_name(ops), ops, work, _located(layer_name(ops), work, target, homes))
        for ops, work in zip(groups, works, strict=True)
    )
    return GraphCost(graph.name, target.name, target.costs.clock, layers, homes, peak, misfits)


def layer_cost(work: Work, target: Target, homes: Homes) -> Cost:
    """The cost of some work, whose data lives in these memories.

    Raises QirError where the target's tables lack the pair of widths.
    """
    costs = target.costs
    unread = ("mac", "fabric.dsp") if work.shifts else ("mac",)
    missing = [n for n in costs.uncovered(work.weight_bits, work.activation_bits) if n not in unread]
    if work.macs and missing:
        pair = f"{work.weight_bits}x{work.activation_bits}"
        tables = " and ".join(f"costs.{name}" for name in missing)
        raise QirError(f'{target.name} lists no pair that holds "{pair}"; state it in {tables}')
    constant_bytes, moved = -(-work.constants // 8), -(-work.loaded // 8) + -(-work.stored // 8)
    operations = work.macs * work.rows * work.activation_bits
    found = Cost(work.macs, operations, constant_bytes, moved)
    changes: dict[str, Any] = {}
    multipliers = 0
    if costs.fabric is not None:
        multipliers = _multipliers(work, costs.fabric)
        changes |= _logic(work, costs.fabric, multipliers)
    if costs.has_latency:
        times = {COMPUTE: _compute(work, costs, multipliers)} | _memory_times(work, costs, homes)
        bound = max(times, key=lambda name: times[name])
        overhead = costs.cycles.layer
        changes |= {"times": times, "cycles": times[bound] + overhead}
        changes["bound"] = OVERHEAD if overhead > times[bound] else bound
    if costs.mac_energy:
        changes["energy"] = _energy(work, costs, homes)
    return replace(found, **changes)


@dataclass(frozen=True)
class Room:
    """Memories of data, and the bytes that they have: for activations, and for constants beside these; None: no end."""

    homes: Homes
    activations: int | None = None
    both: int | None = None


def rooms(target: Target) -> tuple[Room, ...]:
    """The memories that data can live in, the smaller first; the largest takes what fits into none."""
    costs = target.costs
    by_size = sorted(costs.load, key=lambda name: (target.memory[name], name))
    stores = [n for n in by_size if n in costs.store]

    def most(name: str, names: Sequence[str]) -> int | None:
        return None if name == names[-1] else target.memory[name]

    if not by_size:
        return (Room(Homes()),)
    if costs.weights is not None:
        return tuple(Room(Homes(costs.weights, a), most(a, stores)) for a in stores)
    pairs = ((c, a) for a in stores for c in by_size)
    return tuple(Room(Homes(c, a), most(a, stores), most(c, by_size)) for c, a in pairs)


def place(target: Target, constant_bytes: int, peak: int) -> tuple[Homes, tuple[str, ...]]:
    """The least memories that hold the activations, and the constants beside them, and what fits into none."""
    both = constant_bytes + peak
    found = next(
        room.homes
        for room in rooms(target)
        if (room.activations is None or peak <= room.activations) and (room.both is None or both <= room.both)
    )
    if not found.activations:
        return found, ()
    needs = [("activations", found.activations, peak)]
    if target.costs.weights is None:
        needs.append(("constants and activations", found.constants, both))
    else:
        needs.append(("constants", found.constants, both if found.constants == found.activations else constant_bytes))
    return found, tuple(
        f"{what} take {need:,} bytes, {name} has {target.memory[name]:,}"
        for what, name, need in needs
        if need > target.memory[name]
    )


def work_of(
    graph: Graph, ops: Sequence[Op], seen: frozenset[Value] = frozenset(), storages: Storages = AS_THEY_ARE
) -> Work:
    """What some ops do as one step; constants that `seen` holds are counted elsewhere.

    `storages` are those of values that have others in the graph.
    """
    made = {r for op in ops for r in op.results}
    read = dict.fromkeys(v for op in ops for v in op.operands if v not in made and not _is_view(op))
    outputs = set(graph.outputs)
    kept = [
        r
        for op in ops
        for r in op.results
        if not _is_view(op) and (r in outputs or any(u not in ops for u in graph.users.get(r, ())))
    ]
    multiplying = [op for op in ops if op.macs()]
    counts = {"requantized": 0, "converted": 0, "elements": 0, "floating": 0}
    for op in ops:
        for name, count in _other_work(op, graph.stage):
            counts[name] += count
    return Work(
        macs=sum(op.macs() for op in multiplying),
        constants=sum(value_bits(v, storages) for v in read if v in graph.constants and v not in seen),
        loaded=sum(value_bits(v, storages) for v in read if v not in graph.constants),
        stored=sum(value_bits(v, storages) for v in kept),
        **_products(graph, multiplying, storages),
        **counts,
    )


def value_bits(value: Value, storages: Storages = AS_THEY_ARE) -> int:
    """Bits of a value of one sample, packed."""
    return value.type.sample_size * element_bits(value, storages)


def element_bits(value: Value, storages: Storages = AS_THEY_ARE) -> int:
    """The width that is stored of an element, as was assigned or as the type has it; 32 of reals."""
    storage = _storage(value, storages)
    return FLOAT_BITS if storage is None else storage.stored_bits


def weight_fields(storage: IntegerType | None) -> dict[str, int]:
    """The fields of `Work` that follow from the type of constant weights; of reals for None."""
    if storage is None:
        return {"weight_bits": FLOAT_BITS, "index_bits": 0, "shifts": 0}
    shifts = max(-storage.lo, storage.hi).bit_length() if storage.is_shift else 0
    return {
        "weight_bits": storage.bits,
        "index_bits": storage.stored_bits if storage.levels is not None else 0,
        "shifts": shifts,
    }


def _storage(value: Value, storages: Storages) -> IntegerType | None:
    return storages.get(value) or value.storage or storage_of(value.type.element)


def peak_bytes(graph: Graph, groups: Sequence[Sequence[Op]]) -> int:
    """The most bytes of activations of a sample that are alive at once, where each group of ops is one step."""
    changes = [0] * (len(groups) + 2)
    for value, (first, last) in lifetimes(graph, groups).items():
        size = -(-value_bits(value) // 8)
        changes[first] += size
        changes[last + 1] -= size
    return max(accumulate(changes))


def lifetimes(graph: Graph, groups: Sequence[Sequence[Op]]) -> dict[Value, tuple[int, int]]:
    """The first and the last step at which each activation takes memory, where each group of ops is one step.

    A value is alive from the step that writes it, or from the start for an input, to the last that reads it, or to the
    end for an output. What only its own step reads takes nothing, a reshaped value no room of its own.
    """
    step = {op: number for number, ops in enumerate(groups) for op in ops}
    root = {v: v for v in graph.values()}
    for op in graph.ops:
        if _is_view(op):
            root[op.result] = root[op.operands[0]]
    spans = {v: [0, 0] for v in graph.inputs}
    for op in graph.ops:
        if not isinstance(op, Const) and not _is_view(op):
            spans |= {r: [step[op], step[op]] for r in op.results}
    inner = set(spans) - set(graph.inputs) - {root[v] for v in graph.outputs}
    for op in graph.ops:
        if _is_view(op) or isinstance(op, Const):
            continue
        for value in (root[v] for v in op.operands if root[v] in spans):
            spans[value][1] = max(spans[value][1], step[op])
    for value in (root[v] for v in graph.outputs if root[v] in spans):
        spans[value][1] = len(groups)
    return {
        value: (first, last)
        for value, (first, last) in spans.items()
        if value not in inner or first != last or value not in graph.users
    }


def _need_widths(graph: Graph) -> None:
    stored = any(v.storage is not None for v in graph.values())
    if graph.stage is Stage.FLOAT or (graph.stage is Stage.RANGED and not stored):
        raise QirError(f"graph @{graph.name} at stage {graph.stage} has no widths yet; run assign-bit-widths")


def layer_ops(graph: Graph) -> list[tuple[Op, ...]]:
    """The ops of each layer: neighbours that come from one node of the model, without constants and views."""
    ops = [op for op in graph.ops if not isinstance(op, Const) and not _is_view(op)]
    return [tuple(group) for _, group in groupby(ops, key=lambda op: op.location or op.results[0].name)]


def with_seen(groups: Sequence[tuple[Op, ...]]) -> Iterator[tuple[tuple[Op, ...], frozenset[Value]]]:
    """Each group, and of what it reads what a group before it has read."""
    seen: set[Value] = set()
    for ops in groups:
        read = {v for op in ops for v in op.operands}
        yield ops, frozenset(read & seen)
        seen |= read


def layer_name(ops: Sequence[Op]) -> str:
    """The node of the model that a layer comes from, else its last result."""
    return ops[0].location or f"%{ops[-1].results[0].name}"


def _located(name: str, work: Work, target: Target, homes: Homes) -> Cost:
    try:
        return layer_cost(work, target, homes)
    except QirError as fault:
        raise QirError(f"{name}: {fault}") from fault


def _is_view(op: Op) -> bool:
    return isinstance(op, Reshape)


def _products(graph: Graph, ops: Sequence[Op], storages: Storages) -> dict[str, int]:
    """Positions, terms and widths of the sums of products among some ops; of several the largest of each.

    Of several, weights are levels or shifts where all are.
    """
    found = {"positions": 1, "terms": 0, "weight_bits": 0, "activation_bits": 0, "accumulator_bits": 0}
    formats: dict[str, list[int]] = {"index_bits": [], "shifts": []}
    for op in ops:
        x, w = op.operands[:2]
        weight, activation = weight_fields(_storage(w, storages)), element_bits(x, storages)
        terms = op.macs() // max(op.result.type.sample_size, 1)
        exact = weight["weight_bits"] + activation + max(terms, 1).bit_length()
        own = {
            "positions": max(op.macs() // max(w.type.sample_size, 1), 1),
            "terms": terms,
            "weight_bits": weight["weight_bits"],
            "activation_bits": activation,
            "accumulator_bits": op.accumulator.bits if isinstance(op, Accumulating) else exact,
        }
        found = {name: max(found[name], own[name]) for name in found}
        for name, listed in formats.items():
            listed.append(weight[name] if w in graph.constants else 0)
    return found | {name: max(listed) if listed and all(listed) else 0 for name, listed in formats.items()}


def _other_work(op: Op, stage: Stage) -> Iterator[tuple[str, int]]:
    """Elements that are computed without multiply-accumulates, by their kind."""
    size = sum(r.type.sample_size for r in op.results)
    if isinstance(op, Requantize):
        yield "requantized", size
    elif isinstance(op, Quantize | Dequantize):
        yield "converted", size
    elif op.macs():
        if stage is not Stage.FIXED:  # legalize brings sums to their scale
            yield "requantized", size
    elif not isinstance(op, Movement):
        floating = stage is Stage.FIXED and isinstance(op.operands[0].type.element if op.operands else None, FloatType)
        window = op.window.kernel if isinstance(op, Pool2d | Windowed) else ()
        read = max((v.type.sample_size for v in op.operands[:1]), default=0)
        yield "floating" if floating else "elements", size * math.prod(window) if window else max(size, read)


def _multipliers(work: Work, fabric: Fabric) -> int:
    """The multipliers of a layer: each takes `reuse` weights in turn."""
    return -(-work.macs // (work.positions * fabric.reuse))


def _logic(work: Work, fabric: Fabric, multipliers: int) -> dict[str, Any]:
    """LUTs, slices and blocks of memory of a layer, as far as the fabric has them."""
    found: dict[str, Any] = {}
    logic = fabric.lut_per_sum_bit * work.accumulator_bits
    if fabric.dsp:
        is_dsp = multipliers and not work.shifts
        found["dsp"] = multipliers * fabric.dsp_of(work.weight_bits, work.activation_bits) if is_dsp else 0.0
    if work.shifts:
        logic += fabric.lut_per_shift_bit * work.shift_stages * (work.activation_bits + work.shifts - 1)
    elif not fabric.dsp:
        logic += fabric.lut_per_bit_operation * work.weight_bits * work.activation_bits
    if work.index_bits and not work.shifts:
        logic += fabric.lut_per_level_bit * work.weight_bits
    if fabric.has_logic:
        found["lut"] = multipliers * logic
    if fabric.bram_bits is not None and fabric.bram_port is not None:
        read = multipliers * (work.index_bits or work.weight_bits)
        constants = max(-(-work.constants // fabric.bram_bits), -(-read // fabric.bram_port))
        found["bram"] = constants + -(-work.stored // fabric.bram_bits)
    return found


def _factor_bits(work: Work, costs: Costs) -> int:
    """The width of weights that the tables are read at: where costs follow bit operations a shift takes fewer."""
    return work.rows if costs.rule is CostRule.BIT_OPERATIONS else work.weight_bits


def _compute(work: Work, costs: Costs, multipliers: int) -> float:
    """Cycles of computation: multiply-accumulates, then all else."""
    cycles = 0.0
    if multipliers:
        cycles = work.macs / multipliers
    elif work.macs:
        cycles = work.macs / costs.rate(_factor_bits(work, costs), work.activation_bits)
    other = costs.cycles
    cycles += work.requantized * other.requantize + work.converted * other.convert
    return cycles + work.elements * other.element + work.floating * other.floating


def _traffic(work: Work, homes: Homes) -> Iterator[tuple[str, int, int]]:
    """Memories, and the bits that are loaded from them and stored to them."""
    if homes.constants:
        yield homes.constants, work.constants, 0
        yield homes.activations, work.loaded, work.stored


def _memory_times(work: Work, costs: Costs, homes: Homes) -> dict[str, float]:
    """Cycles of each memory: its loads and stores follow each other."""
    times: dict[str, float] = {}
    for name, loaded, stored in _traffic(work, homes):
        cycles = loaded / 8 / costs.load[name] + (stored / 8 / costs.store[name] if stored else 0.0)
        times[name] = times.get(name, 0.0) + cycles
    return times


def _energy(work: Work, costs: Costs, homes: Homes) -> float:
    """Energy in pJ: of the products, and of every byte that moves."""
    energy = work.macs * costs.energy_of_mac(_factor_bits(work, costs), work.activation_bits) if work.macs else 0.0
    return energy + sum((loaded + stored) / 8 * costs.byte_energy[n] for n, loaded, stored in _traffic(work, homes))


def _sum(parts: Sequence[float | None]) -> float | None:
    stated = [p for p in parts if p is not None]
    return sum(stated) if stated else None
