"""Costs: the tables of contracts, rooflines by hand, what a layer is, and the command."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import onnx
import pytest
from contract_files import case, child, marked_line, reached, refusal
from onnx_models import model, random

import qir
import qir.backend
import qir.cost_tables
from qir.backend import load_target, shipped_backends
from qir.cli import main
from qir.cost import Cost, GraphCost, Homes, Work, graph_cost, layer_cost, place
from qir.cost_report import cost_json, cost_text, draw_cost
from qir.cost_tables import Costs
from qir.errors import QirError
from qir.ir import Graph
from qir.pass_manager import PassContext
from qir.target import Target
from qir.target_file import parse_target

SHIPPED = sorted(shipped_backends())
#: A residual block, so that one value outlives the layer behind it.
TEXT = """g (float[N, 4, 8, 8] x) => (float[N, 3] y) {
    h = Conv<pads=[1,1,1,1]>(x, w) r = Relu(h) s = Add(r, x) p = GlobalAveragePool(s) f = Flatten(p) y = Gemm(f, v, b)
}"""
WEIGHTS: dict[str, Any] = {"w": random(4, 4, 3, 3, seed=1), "v": random(4, 3, seed=2), "b": random(3, seed=3)}
SAMPLES = random(8, 4, 8, 8)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compiled(target: Target | str, **overrides: int | str) -> Graph:
    return qir.compile(qir.import_onnx(model(TEXT, **WEIGHTS)), target, [{"x": SAMPLES}], overrides=overrides).graph


# Contradictions, each with its key and its line


CONTRADICTIONS = {
    "a table for a rule": (
        case("fpga", "[costs.mac]  # here", '"8x8" = 1'),
        "costs.mac: a table belongs to rule = table",
    ),
    "a rate of no pair": (
        case("dsp16", "[costs.macs_per_cycle]", '"8" = 1  # here'),
        'costs.macs_per_cycle.8: a cost is that of bits of weight and activation, such as "8x16"',
    ),
    "no rate": (
        case("dsp16", "[costs.macs_per_cycle]", '"16x16" = 0  # here'),
        "costs.macs_per_cycle.16x16: a rate is finite and above zero, not 0.0",
    ),
    "a negative energy": (
        case("dsp16", "[costs.mac_energy]", '"16x16" = -1  # here'),
        "costs.mac_energy.16x16: an energy is finite and not negative, not -1.0",
    ),
    "a clock that stands": (
        case("dsp16", "[costs]", "clock = 0  # here"),
        "costs.clock: a clock is finite and above zero, not 0.0",
    ),
    "a memory that gives nothing": (
        case("dsp16", "[costs.load]", "data = inf  # here"),
        "costs.load.data: a rate is finite and above zero, not inf",
    ),
    "a byte that gives energy": (
        case("dsp16", "[costs.byte_energy]", "data = -0.5  # here"),
        "costs.byte_energy.data: an energy is finite and not negative, not -0.5",
    ),
    "negative cycles": (
        case("dsp16", "[costs.cycles]", "requantize = -3  # here"),
        "costs.cycles.requantize: cycles are finite and not negative, not -3.0",
    ),
    "two rates": (
        case("fpga", "[costs.macs_per_cycle]  # here", '"8x8" = 4'),
        "costs.macs_per_cycle: the rate of a fabric follows from its reuse; state one of the two",
    ),
    "a pair that follows": (
        case("fpga", "[costs.mac_energy]  # here", '"16x16" = 4'),
        'costs.mac_energy: with rule = bit_operations state "8x8" alone; the others follow',
    ),
    "a multiplier without weights": (
        case("fpga", "[costs.fabric]", "reuse = 0  # here"),
        "costs.fabric.reuse: a multiplier takes at least one weight, not 0",
    ),
    "a slice for nothing": (
        case("fpga", "[costs.fabric.dsp]", '"4x4" = 0  # here'),
        "costs.fabric.dsp.4x4: slices are finite and above zero, not 0.0",
    ),
    "logic that is given back": (
        case("fpga", "[costs.fabric]", "lut_per_sum_bit = nan  # here"),
        "costs.fabric.lut_per_sum_bit: numbers of LUTs are finite and not negative, not nan",
    ),
    "a block of nothing": (
        case("fpga", "[costs.fabric]", "bram_port = 0  # here"),
        "costs.fabric.bram_port: a block of memory has at least one bit, not 0",
    ),
    "half a block": (
        case("fpga", "[costs.fabric]", 'bram_port = "none"  # here'),
        "costs.fabric.bram_port: a block of memory has both bram_bits and bram_port; state bram_port too",
    ),
    "an unknown memory": (
        case("dsp16", "[costs.load]", "flash = 1  # here"),
        "costs.load.flash: there is no memory of this name; [memory] has data, saram, external",
    ),
    "results that are lost": (
        case("dsp16", "[memory]", "sink = 8", "[costs.store]", "sink = 1  # here"),
        "costs.store.sink: what is stored is loaded again; state costs.load of it too",
    ),
    "nowhere to store": (
        case("dsp16", "[costs]  # here", "store = 'none'"),
        "costs.load: some memory must take results; state costs.store of it",
    ),
    "weights nowhere": (
        case("dsp16", "[costs]", 'weights = "flash"  # here'),
        "costs.weights: names one of the memories of costs.load, data, saram, external",
    ),
    "a byte without energy": (
        case("dsp16", "[costs.byte_energy]  # here", 'saram = "none"'),
        "costs.byte_energy: saram is missing, as costs.mac_energy and costs.load are there",
    ),
    "a width without a relative cost": (
        case("dsp16", "[weights]", "bits = [8, 16]"),
        'costs.mac: "8x16" is missing, the cost of weights of 8 bits times activations of 16',
    ),
    "a width without a rate": (
        case("dsp16", "[costs.macs_per_cycle]  # here", '"16x16" = "none"', '"8x16" = 4'),
        'costs.macs_per_cycle: "16x16" is missing, the cost of weights of 16 bits times activations of 16',
    ),
    "a width without a slice": (
        case("fpga", "[costs.fabric.dsp]  # here", '"16x16" = "none"'),
        'costs.fabric.dsp: "9x2" is missing, the cost of weights of 9 bits times activations of 2',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tables_that_contradict_themselves(name: str, here: Path) -> None:
    text, expected = CONTRADICTIONS[name]
    assert refusal(text) == (marked_line(text), expected)


def test_every_contradiction_has_a_case(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, untested = reached(qir.cost_tables, [text for text, _ in CONTRADICTIONS.values()], monkeypatch)
    assert calls > 10
    assert untested == []


def test_the_word_none_takes_a_row_of_a_table_away(here: Path) -> None:
    Path("mine.toml").write_text(child("cortex-m", "[costs.macs_per_cycle]", '"16x16" = "none"'))
    target = load_target("mine.toml")
    assert target.costs.macs_per_cycle == {"8x8": 1.0}
    assert dict(target.memory) == {"flash": 1_048_576, "sram": 196_608}
    assert parse_target(str(target)) == target


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_target_states_latency_energy_and_memories(name: str) -> None:
    costs = load_target(name).costs
    assert costs.has_latency
    assert costs.clock
    assert costs.mac_energy
    assert costs.load.keys() == costs.byte_energy.keys() == load_target(name).memory.keys()
    assert (costs.fabric is not None) == (name in ("fpga", "asic"))


# Tables


def test_widths_that_are_not_listed_cost_what_the_cheapest_pair_does_that_holds_them() -> None:
    costs = Costs(macs_per_cycle={"4x8": 4, "8x8": 2, "8x16": 3}, mac_energy={"8x8": 5, "8x16": 7, "4x16": 9})
    assert [costs.rate(*p) for p in ((4, 8), (3, 7), (5, 8), (8, 9), (4, 16))] == [4, 4, 3, 3, 3]
    assert [costs.energy_of_mac(*p) for p in ((8, 8), (2, 2), (4, 16), (8, 16))] == [5, 5, 7, 7]
    assert [list(costs.uncovered(*p)) for p in ((8, 16), (16, 8))] == [["mac"], ["mac", "macs_per_cycle", "mac_energy"]]


def test_integers_are_not_multiplied_as_float32() -> None:
    costs = load_target("arm-neon").costs
    assert [costs.rate(*p) for p in ((8, 8), (8, 9), (16, 16), (32, 32))] == [32, 4, 4, 8]
    assert list(Costs(mac_energy={"32x32": 1}).uncovered(16, 16)) == ["mac", "mac_energy"]


def test_bit_operations_scale_the_pair_of_8_bits() -> None:
    costs = replace(load_target("fpga").costs, fabric=None, macs_per_cycle={"8x8": 64.0})
    assert [costs.rate(8, 8), costs.rate(4, 8), costs.rate(16, 16)] == [64, 128, 16]
    assert [costs.energy_of_mac(8, 8), costs.energy_of_mac(16, 8)] == [4.2, 8.4]
    assert list(costs.uncovered(3, 13)) == []


def test_a_slice_holds_two_products_of_8_bits_and_four_of_4() -> None:
    fabric = load_target("fpga").costs.fabric
    assert fabric is not None
    assert [fabric.dsp_of(*p) for p in ((16, 16), (8, 9), (8, 8), (5, 4), (4, 4), (2, 2))] == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
    ]


# Rooflines by hand: 1,000 products of 10 terms at 100 places, 10 weights a place; 80 bytes of constants, 160 bytes in.


def small(weight: int, activation: int, **changes: int) -> Work:
    work = Work(
        macs=1000, positions=100, terms=10, weight_bits=weight, activation_bits=activation, accumulator_bits=32,
        constants=640, loaded=1280, stored=800, requantized=100,
    )  # fmt: skip
    return replace(work, **changes)


@pytest.mark.parametrize(
    ("name", "widths", "homes", "times", "overhead", "energy"),
    [
        # 1000 / 32 + 100 * 1; 160 / 32 + 100 / 16; 80 / 16
        ("arm-neon", (8, 8), Homes("l2", "l1"), {"compute": 131.25, "l2": 5, "l1": 11.25}, 2000, 4700 + 1000 + 650),
        ("cortex-m", (8, 8), Homes("flash", "sram"), {"compute": 2200, "flash": 80 / 2.67, "sram": 65}, 1000, 786450),
        ("dsp16", (16, 16), Homes("saram", "data"), {"compute": 800, "saram": 20, "data": 160 / 6 + 25}, 500, 51650),
        ("tensorrt", (8, 8), Homes("l2", "l2"), {"compute": 1000 / 221184 + 0.13, "l2": 340 / 5120}, 3500, 5530),
        ("x86-fbgemm", (8, 8), Homes("l1", "l1"), {"compute": 1000 / 42.67 + 25, "l1": 1.875 + 1.5625}, 2000, 4450),
        ("onnxruntime", (8, 8), Homes("l1", "l1"), {"compute": 7.8125 + 25, "l1": 1.875 + 1.5625}, 2000, 2250),
        ("arm-neon-16x8", (8, 16), Homes("l1", "l1"), {"compute": 1000 / 2.7 + 100, "l1": 13.75}, 2000, 27550),
        ("arm-qnnpack", (8, 8), Homes("l1", "l1"), {"compute": 450, "l1": 42.5}, 2000, 18650),
        # one multiplier for the ten weights of a place, which it takes in turn
        ("fpga", (8, 8), Homes("bram", "bram"), {"compute": 1000, "bram": 340 / 2808}, 20, 4200 + 425),
        ("asic", (8, 8), Homes("bram", "bram"), {"compute": 1000, "bram": 340 / 2808}, 20, 300 + 425),
    ],
)
def test_a_roofline_by_hand(
    name: str, widths: tuple[int, int], homes: Homes, times: dict[str, float], overhead: float, energy: float
) -> None:
    cost = layer_cost(small(*widths), load_target(name), homes)
    assert cost.times == pytest.approx(times)
    assert cost.cycles == pytest.approx(max(times.values()) + overhead)
    assert cost.bound == ("overhead" if overhead > max(times.values()) else "compute")
    assert cost.energy == pytest.approx(energy)
    assert (cost.macs, cost.bit_operations) == (1000, 1000 * widths[0] * widths[1])
    assert (cost.constant_bytes, cost.moved_bytes) == (80, 260)


def test_the_memory_that_moves_its_data_most_slowly_bounds_a_layer() -> None:
    target = load_target("arm-neon")
    cost = layer_cost(small(8, 8, constants=8 * 71_000), target, Homes("dram", "l1"))
    assert cost.bound == "dram"
    assert cost.cycles == pytest.approx(10_000 + 2000)
    cost = layer_cost(small(8, 8, stored=8 * 160_000), target, Homes("l2", "l1"))
    assert (cost.bound, cost.cycles) == ("l1", 5 + 10_000 + 2000)


def test_logic_of_a_fabric() -> None:
    target = load_target("fpga")
    work = small(8, 8, macs=100 * 640, terms=640, constants=640 * 8)
    cost = layer_cost(work, target, Homes())
    # ten multipliers, two in a slice, an adder of 32 bits each; 80 bits a cycle are 3 ports, results one block more
    assert (cost.cycles, cost.dsp, cost.lut, cost.bram) == (6420, 5, 320, 4)
    narrow = layer_cost(replace(work, weight_bits=4, activation_bits=4, constants=640 * 4), target, Homes())
    assert (narrow.cycles, narrow.dsp, narrow.bram) == (6420, 2.5, 3)
    assert target.costs.fabric is not None
    logic = replace(target.costs.fabric, dsp={}, lut_per_bit_operation=1.5)
    cost = layer_cost(work, replace(target, costs=replace(target.costs, fabric=logic)), Homes())
    assert (cost.dsp, cost.lut) == (None, 10 * (32 + 1.5 * 64))
    asic = layer_cost(work, load_target("asic"), Homes())
    assert (asic.dsp, asic.lut, asic.bram, asic.bit_operations) == (None, None, None, 64_000 * 64)


@pytest.mark.parametrize("name", SHIPPED)
def test_wider_operands_never_cost_less(name: str) -> None:
    target = load_target(name)
    costs = {
        (w, a): layer_cost(small(w, a, constants=80 * w, loaded=160 * a, accumulator_bits=w + a + 4), target, Homes())
        for w in range(1, 17)
        for a in range(1, 17)
        if not set(target.costs.uncovered(w, a)) - {"mac"}
    }
    assert len(costs) >= 128
    for (w, a), cost in costs.items():
        for wider in (costs.get((w + 1, a)), costs.get((w, a + 1))):
            if wider is not None:
                assert all(x <= y for x, y in zip(_numbers(cost), _numbers(wider), strict=True)), (w, a)


def _numbers(cost: Cost) -> list[float]:
    found = (cost.cycles, cost.energy, cost.constant_bytes, cost.moved_bytes, cost.bit_operations, cost.lut, cost.dsp,
             cost.bram)  # fmt: skip
    return [x for x in found if x is not None]


def test_a_pair_that_no_row_holds_is_named(here: Path) -> None:
    with pytest.raises(QirError) as caught:
        layer_cost(small(32, 8), load_target("cortex-m"), Homes("flash", "sram"))
    assert str(caught.value) == (
        'cortex-m lists no pair that holds "32x8"; state it in costs.macs_per_cycle and costs.mac_energy'
    )


# Where data lives


def test_data_lives_in_the_least_memory_that_holds_it() -> None:
    arm, mcu = load_target("arm-neon"), load_target("cortex-m")
    assert place(arm, 1000, 1000) == (Homes("l1", "l1"), ())
    assert place(arm, 65_536, 65_536) == (Homes("l2", "l1"), ())
    assert place(arm, 10**7, 10**6) == (Homes("dram", "l3"), ())
    assert place(mcu, 1000, 1000) == (Homes("flash", "sram"), ())
    homes, misfits = place(mcu, 2_000_000, 200_000)
    assert homes == Homes("flash", "sram")
    assert misfits == (
        "activations take 200,000 bytes, sram has 196,608",
        "constants take 2,000,000 bytes, flash has 1,048,576",
    )
    dsp = load_target("dsp16")
    shared = replace(dsp, costs=replace(dsp.costs, weights="data"))
    assert place(shared, 60_000, 6_000) == (Homes("data", "data"), ("constants take 66,000 bytes, data has 65,536",))


# Graphs


def test_layers_of_a_graph_by_hand() -> None:
    cost = graph_cost(compiled("arm-neon"), load_target("arm-neon"))
    conv, add, mean, gemm = (
        next(layer for layer in cost.layers if any(op.mnemonic == kind for op in layer.ops))
        for kind in ("conv2d", "add", "reduce_sum", "matmul")
    )
    size = 4 * 8 * 8
    assert conv.work == Work(
        macs=size * 36, positions=64, terms=36, weight_bits=8, activation_bits=8, accumulator_bits=32,
        constants=4 * 36 * 8, loaded=size * 8, stored=size * 8, requantized=size,
    )  # fmt: skip
    # three rescalings around one sum, whose 32-bit values stay inside
    assert add.work == Work(loaded=2 * size * 8, stored=size * 8, requantized=3 * size, elements=size)
    assert mean.work == Work(loaded=size * 8, stored=4 * 8, requantized=4, elements=size)
    assert gemm.work == Work(
        macs=12, positions=1, terms=4, weight_bits=8, activation_bits=8, accumulator_bits=32,
        constants=12 * 8 + 3 * 32, loaded=4 * 8, stored=3 * 8, requantized=3,
    )  # fmt: skip
    assert cost.peak_bytes == 3 * size  # input, result of the convolution and their sum
    assert cost.homes == Homes("l1", "l1")


@pytest.mark.parametrize("name", SHIPPED)
def test_totals_are_the_sums_of_the_layers(name: str) -> None:
    graph = compiled(name)
    cost = graph_cost(graph, load_target(name))
    total = cost.total
    for field in ("macs", "bit_operations", "constant_bytes", "moved_bytes", "cycles", "energy", "lut", "dsp", "bram"):
        parts = [getattr(layer.cost, field) for layer in cost.layers]
        assert getattr(total, field) == (None if None in parts else sum(parts)), field
    assert total.macs == graph.macs()
    assert (total.lut is not None) == (name == "fpga")
    assert total.cycles is not None
    assert cost.clock is not None
    assert cost.seconds == total.cycles / cost.clock
    ops = [op for layer in cost.layers for op in layer.ops]
    assert len(ops) == len(set(ops))
    assert {op.mnemonic for op in graph.ops} - {op.mnemonic for op in ops} <= {"const", "reshape", "Reshape"}


SHARED = """graph @g stage=fixed target="fpga" (%x: Nx1x1x2 x s8 in [-128, 127]) {
  %w = const {value=s8 2x1x1x2 [1, 2, 3, 4]} : 2x1x1x2 x s4 in [1, 4]
  %a = conv2d %x, %w {accumulator=s16, overflow=none, order=khwc, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1} : Nx1x1x2 x s16 in [-896, 889] loc("a")
  %b = conv2d %a, %w {accumulator=s24, overflow=none, order=khwc, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1} : Nx1x1x2 x s24 in [-6272, 6223] loc("b")
  return %b
}
"""  # noqa: E501


def test_a_constant_that_two_layers_read_is_counted_once_and_sub_bytes_are_packed() -> None:
    cost = graph_cost(qir.parse(SHARED), load_target("fpga"))
    assert [layer.cost.constant_bytes for layer in cost.layers] == [2, 0]  # four weights of 4 bits
    assert [layer.cost.moved_bytes for layer in cost.layers] == [2 + 4, 4 + 6]
    assert [layer.work.accumulator_bits for layer in cost.layers] == [16, 24]
    assert [layer.name for layer in cost.layers] == ["a", "b"]
    assert cost.peak_bytes == 4 + 6  # the input is not read any more


def test_weights_alone_are_packed_and_multiplied_as_float32() -> None:
    target = load_target("tensorrt")
    cost = graph_cost(compiled(target, y="w4"), target)
    whole = graph_cost(compiled(target), target)
    products = next(layer for layer in cost.layers if layer.work.macs == 12)
    assert (products.work.weight_bits, products.work.activation_bits) == (32, 32)
    assert products.cost.energy is not None
    assert products.cost.energy >= 12 * 41
    assert cost.total.macs == whole.total.macs


def test_narrower_weights_cost_less_on_an_fpga() -> None:
    target = load_target("fpga")
    totals = [graph_cost(compiled("fpga", **{"*": f"w{bits}"}), target).total for bits in (4, 8, 16)]
    for narrow, wide in itertools.pairwise(totals):
        assert narrow.constant_bytes < wide.constant_bytes
        assert narrow.energy < wide.energy  # type: ignore[operator]
        assert narrow.lut <= wide.lut  # type: ignore[operator]
        assert narrow.cycles <= wide.cycles  # type: ignore[operator]


def test_widths_are_known_from_assign_bit_widths_on() -> None:
    target = load_target("arm-neon")
    graph = qir.import_onnx(model(TEXT, **WEIGHTS))
    with pytest.raises(QirError, match="graph @g at stage float has no widths yet; run assign-bit-widths"):
        graph_cost(graph, target)
    context = PassContext(target, [{"x": SAMPLES}])
    ranged = qir.default_pipeline().before("assign-bit-widths").run(graph, context)
    with pytest.raises(QirError, match="stage ranged has no widths yet"):
        graph_cost(ranged, target)
    assigned = qir.parse_pipeline("assign-bit-widths").run(ranged, context)
    cost, final = graph_cost(assigned, target), graph_cost(compiled("arm-neon"), target)
    assert cost.total.macs == final.total.macs
    conv = next(layer for layer in cost.layers if layer.work.macs == 9216)
    assert (conv.work.weight_bits, conv.work.activation_bits, conv.work.requantized) == (8, 8, 256)
    assert cost.peak_bytes == final.peak_bytes


def test_what_the_target_does_not_state_is_not_estimated() -> None:
    target = load_target("arm-neon")
    bare = replace(target, costs=Costs(mac=target.costs.mac))
    cost = graph_cost(compiled("arm-neon"), bare)
    assert (cost.total.cycles, cost.total.energy, cost.seconds, cost.homes) == (None, None, None, Homes())
    text = cost_text(cost)
    assert "not estimated  latency and energy: arm-neon states no costs for it" in text
    assert "cycles" not in text
    assert json.loads(cost_json(cost))["total"]["cycles"] is None


# The command


@pytest.fixture
def build(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    onnx.save(model(TEXT, **WEIGHTS), "model.onnx")
    qir.compile("model.onnx", "fpga", [{"x": SAMPLES}]).save("build")
    return here / "build"


def found(build: Path) -> GraphCost:
    return graph_cost(qir.read_graph(build / "graph.qir"), load_target("fpga"))


def test_the_command_prints_layers_and_totals(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "build", "-o", "cost.json"]) == 0
    out = capsys.readouterr().out
    assert out == f"{cost_text(found(build))}\n"
    lines = out.splitlines()
    headings = "MACs cycles bound by nJ constants moved bit operations LUT DSP BRAM layer"
    assert lines[0].split() == headings.split()
    count = len(found(build).layers)
    assert lines[1 + count].endswith(f"total of {count} layers")
    assert lines[3 + count].split()[-4:] == ["200", "MHz,", "by", "roofline"]
    data = json.loads(Path("cost.json").read_text())
    assert data["total"]["cycles"] == sum(layer["cycles"] for layer in data["layers"])
    assert (data["target"], data["activations_in"], len(data["layers"])) == ("fpga", "bram", count)
    assert main(["cost", "build/graph.qir"]) == 0
    assert capsys.readouterr().out == out


def test_costs_of_another_file(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fast.toml").write_text(child("fpga", "[costs]", "clock = 400_000_000"))
    assert main(["cost", "build", "--target", "fast.toml"]) == 0
    assert "at 400 MHz" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "start"), [("cost.svg", b"<?xml"), ("cost.png", b"\x89PNG")])
def test_drawings(name: str, start: bytes, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "build", "--plot", name]) == 0
    first = Path(name).read_bytes()
    assert first.startswith(start)
    if name.endswith(".svg"):
        assert b"bound by compute" in first or b"<!-- bound by compute -->" in first
    assert draw_cost(found(build), Path(name).suffix) == first


def test_drawings_need_matplotlib(
    build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["cost", "build", "--plot", "cost.svg"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "qir: drawings need matplotlib; install it, or qir with the extra 'plot'\n")
    assert not Path("cost.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "cannot read nowhere: No such file or directory"),
        (["build", "--plot", "cost.pdf"], "cannot draw cost.pdf: the name must end in .svg or .png"),
        (["build", "--target", "nosuch"], "unknown target 'nosuch'; there are: "),
        (["nameless.qir"], "graph @g names no target; give the one whose costs are meant by --target"),
        (["strange.qir"], "unknown target 'mychip'; there are: "),
        (["float.qir"], "graph @g names no target; give the one whose costs are meant by --target"),
        (["float.qir", "--target", "fpga"], "graph @g at stage float has no widths yet; run assign-bit-widths"),
        (["build", "-o", "no/such/cost.json"], "cannot write no/such/cost.json"),
        (["build", "--plot", "no/such/cost.svg"], "cannot write no/such/cost.svg"),
    ],
)
def test_input_that_does_not_fit(
    arguments: list[str], message: str, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("build/graph.qir").read_text()
    Path("weights.safetensors").write_bytes(Path("build/weights.safetensors").read_bytes())
    Path("nameless.qir").write_text(text.replace(' target="fpga"', ""))
    Path("strange.qir").write_text(text.replace(' target="fpga"', ' target="mychip"'))
    qir.write_graph(qir.import_onnx("model.onnx"), "float.qir")
    capsys.readouterr()
    assert main(["cost", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"qir: {message}")


def test_the_function_of_a_plugin_takes_the_place_of_the_tables(
    build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [EntryPoint("chip20", "qir_chip20:backend", qir.backend.GROUP)]
    monkeypatch.setattr(qir.backend, "entry_points", lambda group: points)
    qir.compile("model.onnx", "chip20", [{"x": SAMPLES}]).save("chip")
    capsys.readouterr()
    assert main(["cost", "chip", "-o", "cost.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(maxsplit=1)[0].strip() for line in lines] == [
        "multiplier cycles",
        "shifter cycles",
        "weight bytes",
    ]
    data = json.loads(Path("cost.json").read_text())
    assert data["target"] == "chip20"
    assert [f"{v:,.6g}" for v in data["parts"].values()] == [line.rsplit(maxsplit=1)[1] for line in lines]
    assert main(["cost", "chip", "--plot", "cost.svg"]) == 2
    assert capsys.readouterr().err == "qir: the cost function of chip20 gives no layers to draw; leave out --plot\n"
