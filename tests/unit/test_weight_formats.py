"""Weights of every width and format: kernels against the interpreter, what files hold of them, and what they cost."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from certified import certificate, faults_of
from contract_files import child
from models import PATHS, labelled_images
from onnx_models import model, random
from property.fixed_graphs import proved
from safetensors.numpy import load_file

import qir
from qir.arrays import Array
from qir.backend import load_target
from qir.cost import Homes, Work, graph_cost, layer_cost, weight_fields, work_of
from qir.errors import PassError, VerifyError
from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.levels import power_of_two_levels
from qir.ops.constant import Const
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.packing import packed_bytes
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.correct_bias import CorrectBias
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.repairs.ladder import Repair
from qir.printer import print_graph, resources
from qir.program import Program, load
from qir.report import constant_bytes
from qir.target import Target, WeightFormat
from qir.types import BINARY, AffineType, IntegerType, integer, of_levels, storage_of

Tensor = npt.NDArray[Any]

TARGETS = ("fpga", "asic")
FORMATS = [
    (bits, item) for bits in load_target("fpga").weights.bits for item in load_target("fpga").weights.formats_of(bits)
]
#: A convolution, one of two groups, a depthwise one, and two matrix products, with weights that go to the sidecar.
TEXT = """g (float[N, 3, 6, 5] x) => (float[N, 4] y) {
    a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<group=2, strides=[2,1]>(r, v) d = Conv<group=8>(c, u)
    f = Flatten(d) m = MatMul(f, t) y = Gemm(m, s, e)
}"""


@cache
def float_graph() -> Graph:
    weights: dict[str, Any] = {
        "w": random(6, 3, 3, 3, seed=1), "b": random(6, seed=2), "v": random(8, 3, 2, 2, seed=3),
        "u": random(8, 1, 3, 3, seed=4), "t": random(16, 9, seed=5), "s": random(9, 4, seed=6), "e": random(4, seed=7),
    }  # fmt: skip
    weights["w"][2] = 0  # a channel of zeros
    weights["v"][1] *= 100
    return qir.import_onnx(model(TEXT, **weights))


def compiled(target: str, width: str) -> Program:
    return qir.compile(float_graph(), target, [{"x": random(32, 3, 6, 5)}], overrides={"*": width})


def inputs(program: Program) -> dict[str, Tensor]:
    """The ends of the input's type, and samples."""
    (value,) = program.graph.inputs
    storage = storage_of(value.type.element)
    assert storage is not None
    shape, chooser = value.type.concrete(4), np.random.default_rng(0)
    ends = chooser.choice(np.array([storage.lo, storage.hi], storage.dtype), shape)
    some = chooser.integers(storage.lo, storage.hi, shape, storage.dtype, endpoint=True)
    whole = [np.full(value.type.concrete(1), end, storage.dtype) for end in (storage.lo, storage.hi)]
    return {"x": np.concatenate([ends, some, *whole])}


def weights_of(graph: Graph) -> list[tuple[Tensor, IntegerType]]:
    """Constant weights of the sums of products, and their types; those of means excepted."""
    found = []
    for op in graph.ops:
        if isinstance(op, Conv2d | FixedMatMul) and (data := graph.constants.get(op.operands[1])) is not None:
            storage = storage_of(op.operands[1].type.element)
            assert storage is not None
            found.append((data.data, storage))
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bits", "item"), FORMATS)
def test_kernels_equal_the_interpreter_from_files_too(
    target: str, bits: int, item: WeightFormat, tmp_path: Path
) -> None:
    program = compiled(target, f"w{bits}/{item}")
    graph = program.graph
    weights = weights_of(graph)
    assert len(weights) == 5
    for data, storage in weights:
        assert storage.stored_bits == bits if item is not WeightFormat.CODEBOOK else storage.stored_bits <= bits
        assert len(np.unique(data)) > 1
    feeds = inputs(program)
    expected, found = trace(graph, feeds), program.trace(feeds)
    for value in graph.values():
        np.testing.assert_array_equal(found[value.name], expected[value.name], value.name, strict=True)
    wanted = interpret(graph, feeds)["y"]
    np.testing.assert_array_equal(program.run_integer(feeds)["y"], wanted, strict=True)
    some = {"x": feeds["x"][:2]}
    np.testing.assert_array_equal(interpret(graph, some, unbounded=True)["y"].astype(wanted.dtype), wanted[:2])
    program.save(tmp_path / "build")
    again = load(tmp_path / "build")
    assert again.graph == graph
    np.testing.assert_array_equal(again.run_integer(feeds)["y"], wanted, strict=True)
    assert faults_of(graph, certificate(graph)) == []


@pytest.fixture
def cpu(tmp_path: Path) -> Target:
    """A chip with scales of any size, zero points of activations, and weights of few bits."""
    pairs = [f'"{bits}x8" = 1' for bits in (1, 2, 4)]
    lines = ["[weights]", "bits = [1, 2, 4, 8]", "default = 8", 'formats = ["uniform", "power_of_two", "codebook"]']
    (tmp_path / "cpu.toml").write_text(child("arm-neon", *lines, "[costs.mac]", *pairs))
    return load_target(tmp_path / "cpu.toml")


@pytest.mark.parametrize(
    "width", ["w1", "w2", "w4", "w2/power_of_two", "w4/power_of_two", "w1/codebook", "w4/codebook"]
)
def test_scales_of_any_size(width: str, cpu: Target) -> None:
    program = qir.compile(float_graph(), cpu, [{"x": random(32, 3, 6, 5)}], overrides={"*": width})
    feeds = inputs(program)
    np.testing.assert_array_equal(program.run_integer(feeds)["y"], interpret(program.graph, feeds)["y"], strict=True)
    kind = program.graph.value("w").type.element
    assert isinstance(kind, AffineType)
    assert kind.axis == 0
    if width == "w1":
        data = float_graph().constants[float_graph().value("w")].data
        means = np.abs(data.astype(np.float64)).mean(axis=(1, 2, 3))
        means[2] = np.delete(means, 2).min() / 256  # of zeros
        np.testing.assert_array_equal(kind.scale.data, means.astype(np.float32))


@pytest.mark.parametrize(("bits", "item"), FORMATS)
def test_large_weights_are_stored_at_their_width(bits: int, item: WeightFormat, tmp_path: Path) -> None:
    program = compiled("asic", f"w{bits}/{item}")
    program.save(tmp_path / "build")
    stored = load_file(tmp_path / "build" / "weights.safetensors")
    large = [(d, s) for d, s in weights_of(program.graph) if d.size > 64]
    assert len(large) == 4
    expected = sorted(d.nbytes if s.stored_bits in (8, 16) else packed_bytes(d.size, s) for d, s in large)
    assert sorted(stored[n].nbytes for n in ("w", "v", "u", "t")) == expected
    consts = [op for op in program.graph.ops if isinstance(op, Const)]
    assert program.weight_bytes() == constant_bytes(program.graph) == sum(op.stored_bytes for op in consts)
    assert program.plan().weight_bytes == program.weight_bytes()


# The sidecars of the models


def weight_bytes(program: Program, build: Path) -> int:
    """Bytes of the weights in the sidecar of a program: of all its arrays those that sums of products read."""
    stored = load_file(build / "weights.safetensors")
    weights = {Array(data).sha256 for data, _ in weights_of(program.graph)}
    return sum(stored[name].nbytes for name, array in resources(program.graph).items() if array.sha256 in weights)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fm_cnn", "fm_mlp"])
def test_weights_of_4_bits_take_half_the_bytes_of_8(name: str, target: str, tmp_path: Path) -> None:
    pictures, _ = labelled_images()
    sizes, whole = {}, {}
    for width in ("w8", "w4", "w4/power_of_two", "w4/codebook", "w2", "w1"):
        program = qir.compile(str(PATHS[name]), target, [{"x": pictures[:8]}], overrides={"*": width})
        program.save(tmp_path / width)
        sizes[width] = weight_bytes(program, tmp_path / width)
        whole[width] = (tmp_path / width / "weights.safetensors").stat().st_size
    assert sizes["w8"] > 10_000
    for width, most in (("w4", 0.55), ("w4/power_of_two", 0.55), ("w4/codebook", 0.55), ("w2", 0.3), ("w1", 0.15)):
        assert sizes[width] <= most * sizes["w8"], width
        assert whole[width] <= (most + 0.02) * whole["w8"], width  # biases and names too
    assert max(whole["w4"], whole["w4/power_of_two"], whole["w4/codebook"]) <= 0.55 * whole["w8"]


# What is chosen, and what is refused


@pytest.mark.parametrize("target", TARGETS)
def test_formats_are_chosen_where_they_are_asked_for_and_nowhere_else(target: str) -> None:
    plain = qir.compile(float_graph(), target, [{"x": random(32, 3, 6, 5)}])
    assert all(storage.levels is None for _, storage in weights_of(plain.graph))
    mixed = qir.compile(
        float_graph(), target, [{"x": random(32, 3, 6, 5)}], overrides={"*": "w8", "c": "w3/codebook", "d": "w1"}
    )
    found = [storage for _, storage in weights_of(mixed.graph)]
    assert [s.stored_bits for s in found] == [8, 3, 1, 8, 8]
    assert found[2] == BINARY


def test_every_shipped_target_refuses_the_formats_that_it_does_not_list() -> None:
    for name in sorted(qir.backend.shipped_backends()):
        target = load_target(name)
        for item in WeightFormat:
            for bits in range(1, 17):
                text = f"*:w{bits}/{item}"
                alone = target.weight_only.bits if target.weight_only and item is WeightFormat.UNIFORM else ()
                if item in target.weights.formats_of(bits) or bits in alone:
                    continue
                with pytest.raises(PassError, match=f"override '{re.escape(text)}': {name} has "):
                    qir.compile(float_graph(), target, [{"x": random(2, 3, 6, 5)}], overrides={"*": f"w{bits}/{item}"})


EDITED = """graph @g stage=fixed (%x: Nx2 x s8 in [-128, 127]) {
  %w = const {value=s8 2x2 [1, -1, 4, 0]} : 2x2 x s4{-4, -2, -1, 0, 1, 2, 4} in [-1, 4]
  %y = matmul %x, %w {accumulator=s16, overflow=none, order=khwc} : Nx2 x s16 in [-640, 635] partial in [-640, 635]
  return %y
}
"""


@pytest.mark.parametrize("edited", ["s4{-4, -2, -1, 1, 2, 4}", "s4{-1, 1, 4}"])
def test_constants_that_hold_no_level_are_refused_and_the_checker_says_so_too(edited: str) -> None:
    graph = parse(EDITED)
    assert faults_of(graph, certificate(graph)) == []
    false = parse(EDITED.replace("s4{-4, -2, -1, 0, 1, 2, 4}", edited))
    with pytest.raises(VerifyError, match=f"its data hold 0, which is none of the levels of {re.escape(edited)}"):
        Program(false)
    assert faults_of(false, certificate(graph)) == [
        "%w: its type has levels, and it holds others; compile the model again"
    ]


def test_the_checker_allows_levels_to_constants_alone() -> None:
    graph = parse(EDITED)
    false = parse(EDITED.replace("Nx2 x s8 in [-128, 127]", "Nx2 x s8{-128, 127} in [-128, 127]"))
    assert "%x: its type has levels, and it holds others; compile the model again" in faults_of(
        false, certificate(graph)
    )


@pytest.mark.parametrize("kind", ["s8{-100, 1, 100}", "s8{-100, 0, 100}"])
def test_repairs_leave_levels_as_they_are(kind: str) -> None:
    other = "1" if "1," in kind else "0"
    graph = proved(
        parse(f"""graph @g stage=fixed target="dsp16" (%x: Nx1x1x3 x s8) {{
          %w = const {{value=s8 1x1x1x3 [100, {other}, 100]}} : 1x1x1x3 x {kind}
          %y = conv2d %x, %w {{accumulator=s15, overflow=wrap, order=khwc, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1}} : Nx1x1x1 x s15
          return %y
        }}""")  # noqa: E501
    )
    after = InsertSaturation(repair=Repair.SATURATE).run(graph, PassContext(load_target("dsp16")))
    qir.verify(after)
    assert all(str(s) == kind for _, s in weights_of(after))


@pytest.mark.parametrize("width", ["w1", "w3/power_of_two", "w2/codebook"])
def test_biases_are_corrected_for_levels(width: str) -> None:
    feeds = [{"x": random(64, 3, 6, 5)}]
    context = PassContext(load_target("asic"), feeds)
    pipeline = qir.default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=(f"*:{width}",)))
    typed = pipeline.before("legalize").run(float_graph(), context)
    fixed = qir.Pipeline(list(pipeline)[9:])
    truth = interpret(float_graph(), feeds[0])["y"].mean(axis=0)
    off = []
    for graph in (typed, CorrectBias().run(typed, context)):
        found = Program(fixed.run(graph, context)).run(feeds[0])["y"].mean(axis=0)
        off.append(float(np.abs(found - truth).sum()))
    assert off[1] < off[0] / 2


# Costs


WORK = Work(
    macs=100 * 640, positions=100, terms=640, weight_bits=8, activation_bits=8, accumulator_bits=32, constants=640 * 8
)


def cost_of(target: str, storage: IntegerType) -> Any:
    work = replace(WORK, **weight_fields(storage), constants=640 * storage.stored_bits)
    return layer_cost(work, load_target(target), Homes())


@pytest.mark.parametrize(
    ("storage", "fields"),
    [
        (integer(8), (8, 0, 0)),
        (integer(2), (2, 0, 2)),
        (integer(2).narrowed(-1, 1), (2, 0, 1)),
        (BINARY, (2, 1, 1)),
        (power_of_two_levels(4), (8, 4, 7)),
        (power_of_two_levels(5), (16, 5, 15)),
        (of_levels((-100, 3, 60)), (8, 2, 0)),
        (None, (32, 0, 0)),
    ],
)
def test_what_a_type_means_for_work(storage: IntegerType | None, fields: tuple[int, int, int]) -> None:
    assert weight_fields(storage) == dict(zip(("weight_bits", "index_bits", "shifts"), fields, strict=True))


@pytest.mark.parametrize(
    ("storage", "dsp", "lut", "bram", "operations", "constants"),
    [
        # ten multipliers, two in a slice, an adder of 32 bits each; 80 bits a cycle are 3 ports of 36
        (integer(8), 5, 10 * 32, 3, 64, 640),
        # no multiplier: half a LUT for each of 3 stages of 8 + 6 bits; ten indices of 4 bits are 2 ports
        (power_of_two_levels(4), 0, 10 * (32 + 0.5 * 3 * 14), 2, 3 * 8, 320),
        (power_of_two_levels(3), 0, 10 * (32 + 0.5 * 2 * 10), 1, 2 * 8, 240),
        (power_of_two_levels(5), 0, 10 * (32 + 0.5 * 4 * 22), 2, 4 * 8, 400),
        # the adder negates, and nothing is shifted
        (BINARY, 0, 10 * 32, 1, 8, 80),
        (power_of_two_levels(2), 0, 10 * 32, 1, 8, 160),
        # the levels of 8 bits are multiplied, behind a table of one LUT a bit
        (of_levels(range(-128, 128, 17)), 5, 10 * (32 + 8), 2, 64, 320),
    ],
)
def test_logic_and_bits_of_a_layer_by_hand(
    storage: IntegerType, dsp: float, lut: float, bram: int, operations: int, constants: int
) -> None:
    cost = cost_of("fpga", storage)
    assert (cost.dsp, cost.lut, cost.bram, cost.constant_bytes) == (dsp, lut, bram, constants)
    assert cost.bit_operations == 64_000 * operations
    energy = [cost_of(name, storage).energy for name in TARGETS]
    assert energy == pytest.approx([64_000 * operations / 64 * unit for unit in (4.2, 0.3)])
    assert (cost_of("asic", storage).lut, cost_of("asic", storage).dsp) == (None, None)


def test_tables_cost_the_product_of_the_levels() -> None:
    target = load_target("dsp16")
    widths = [
        replace(small, activation_bits=16) for small in (WORK, replace(WORK, **weight_fields(power_of_two_levels(4))))
    ]
    assert len({layer_cost(work, target, Homes("saram", "data")).energy for work in widths}) == 1


def test_the_work_of_layers_follows_from_the_types_of_their_weights() -> None:
    target = load_target("fpga")
    for width, fields in (
        ("w8", weight_fields(integer(8))),
        ("w4/power_of_two", weight_fields(power_of_two_levels(4))),
        ("w1", weight_fields(BINARY)),
    ):
        graph = compiled("fpga", width).graph
        for op in graph.ops:
            if isinstance(op, Conv2d | FixedMatMul):
                work = work_of(graph, [op])
                assert {name: getattr(work, name) for name in fields} == fields
    widths = ("w8", "w4/codebook", "w4", "w4/power_of_two", "w1")
    whole, coded, narrow, shifted, signs = (graph_cost(compiled("fpga", w).graph, target).total for w in widths)
    assert whole.constant_bytes > coded.constant_bytes > signs.constant_bytes
    assert coded.constant_bytes == narrow.constant_bytes == shifted.constant_bytes
    assert whole.dsp == coded.dsp == narrow.dsp > shifted.dsp == signs.dsp == 0  # type: ignore[operator]
    assert whole.energy > narrow.energy > shifted.energy > signs.energy  # type: ignore[operator]


def test_products_of_activations_are_no_shifts() -> None:
    graph = proved(
        parse("""graph @g stage=fixed target="fpga" (%x: Nx2x3 x s2, %z: Nx3x2 x s2) {
          %y = matmul %x, %z {accumulator=s8, overflow=wrap, order=khwc} : Nx2x2 x s8
          return %y
        }""")
    )
    (layer,) = graph_cost(graph, load_target("fpga")).layers
    assert (layer.work.weight_bits, layer.work.shifts) == (2, 0)
    assert layer.cost.dsp == 0.25


def test_programs_say_in_their_text_what_their_weights_are() -> None:
    text = print_graph(compiled("fpga", "w3/power_of_two").graph)
    assert re.search(r"%w = const \{value=@w\} : 6x3x3x3 x s4\{-4, -2, -1, 0, 1, 2, 4\}<2\^\[", text)
    assert "\n  @w : s4{-4, -2, -1, 0, 1, 2, 4} 6x3x3x3 sha256=" in text


def test_signs_of_one_kind_are_no_zeros() -> None:
    graph = qir.import_onnx(
        model("g (float[N, 3] x) => (float[N, 2] y) { y = MatMul(x, w) }", w=np.ones((3, 2), np.float32))
    )
    context = PassContext(load_target("fpga"), [{"x": random(8, 3)}])
    qir.default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=("y:w1",))).run(graph, context)
    assert context.diagnostics == []
