"""Programs: what they take and give, how they are saved and refused, and the memory that they run in."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from property.fixed_graphs import proved

import qir
from qir.arrays import Array
from qir.backends.kernels import executor
from qir.backends.kernels.kernel import Facts
from qir.backends.kernels.plan import Buffer, lay_out
from qir.errors import QirError, ResourceError, RunError, VerifyError
from qir.fixed_point import Overflow, RequantizeForm
from qir.interpreter import interpret
from qir.interval import Interval
from qir.ir import Graph, Stage
from qir.ops.accumulate import Order
from qir.ops.fixed_elementwise import FixedAdd
from qir.ops.fixed_linear import Conv2d
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Requantize, dequantize_array, quantize_input
from qir.parser import parse
from qir.program import Program, load
from qir.proof import prove
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, S8, S32, Dim, TensorType, affine

Tensor = npt.NDArray[Any]


def small_net(lead: Dim = BATCH) -> Graph:
    """Two convolutions with a residual between them; weights of which some go to the sidecar."""
    random = np.random.default_rng(0)
    builder = GraphBuilder("net", Stage.FIXED)
    kind = affine(S8, 0.05, -3)
    x = builder.input("x", TensorType((lead, 6, 6, 4), kind))
    value = x
    for number in range(2):
        weight = Array(random.integers(-127, 128, (4, 3, 3, 4)).astype(np.int8), f"conv{number}.weight")
        bias = Array(random.integers(-1000, 1000, 4).astype(np.int32), f"conv{number}.bias")
        operands = [
            value,
            builder.constant(weight, TensorType(weight.shape, affine(S8.narrowed(-127, 127), 0.01))),
            builder.constant(bias, TensorType((4,), S32)),
        ]
        acc = builder.emit(
            Conv2d,
            operands,
            pads=(1, 1, 1, 1),
            strides=(1, 1),
            dilations=(1, 1),
            groups=1,
            accumulator=S32,
            overflow=Overflow.WRAP,
            order=Order.KHWC,
            name=f"acc{number}",
        )
        scaled = builder.emit(
            Requantize,
            [acc],
            elements=[kind],
            multiplier=Array(np.array(1 << 30)),
            shift=Array(np.array(-7)),
            form=RequantizeForm.DOUBLE_ROUND,
            overflow=Overflow.SATURATE,
            name=f"scaled{number}",
        )
        value = builder.emit(FixedAdd, [scaled, x], elements=[kind], overflow=Overflow.SATURATE, name=f"sum{number}")
    pooled = builder.emit(
        FixedMaxPool, [value], kernel=(2, 2), strides=(2, 2), pads=(0,) * 4, dilations=(1, 1), name="pooled"
    )
    attributes = {"input_rule": "divide", "input_rounding": "half_away"}
    return proved(builder.finish([pooled], ["y"], attributes=attributes))


NET = small_net()


def samples(count: int, seed: int = 1) -> Tensor:
    return np.random.default_rng(seed).integers(-128, 128, (count, 6, 6, 4)).astype(np.int8)


def proved_text(body: str, inputs: str = "%x: Nx2 x s8<0.5>", attributes: str = "") -> Graph:
    """A graph of this body, with ranges."""
    rules = "{input_rule=divide, input_rounding=half_away}"
    return proved(parse(f"graph @text stage=fixed {attributes or rules} ({inputs}) {{\n{body}\n}}"))


# Saving, loading and refusing


def test_saved_programs_come_back(tmp_path: Path) -> None:
    program = Program(NET)
    program.save(tmp_path / "build")
    found = sorted(p.name for p in (tmp_path / "build").iterdir())
    assert found == ["certificate.json", "graph.qir", "weights.safetensors"]
    again = load(tmp_path / "build")
    assert again.graph == program.graph
    assert str(again.plan()) == str(program.plan())
    feeds = {"x": samples(3)}
    assert np.array_equal(again.run_integer(feeds)["y"], program.run_integer(feeds)["y"])
    program.save(tmp_path / "build")  # qir's own output may be replaced


def _range(text: str) -> str:
    """The range of the input, one short."""
    return text.replace(
        "%x: Nx6x6x4 x s8<0.05, zero=-3> in [-128, 127]", "%x: Nx6x6x4 x s8<0.05, zero=-3> in [-127, 127]"
    )


def _claim(text: str) -> str:
    return text.replace("overflow=saturate", "overflow=none", 1)


def _partial(text: str) -> str:
    return re.sub(r"partial in \[-\d+, \d+\]", "partial in [-9, 9]", text, count=1)


def _hash(text: str) -> str:
    return re.sub(r'sha256="(.)', lambda m: f'sha256="{"0" if m[1] != "0" else "1"}', text, count=1)


def _no_range(text: str) -> str:
    return text.replace(" in [-128, 127]", "", 1)


def _no_partial(text: str) -> str:
    return re.sub(r" partial in \[-?\d+, \d+\]", "", text, count=1)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (_range, VerifyError, r"%x: states the range \[-127, 127\], but \[-128, 127\] is what is proved"),
        (_claim, VerifyError, "requantize %scaled0: claims overflow=none, which is not proved"),
        (_partial, VerifyError, r"conv2d %acc0: states partial sums in \[-9, 9\], but .* is what is proved"),
        (_hash, ResourceError, "conv0.weight"),
        (_no_range, VerifyError, "%x: states no range; run range-analysis"),
        (_no_partial, VerifyError, "conv2d %acc0: states no bounds of its partial sums; run range-analysis"),
    ],
)
def test_edited_text_is_refused(
    edit: Callable[[str], str], error: type[QirError], message: str, tmp_path: Path
) -> None:
    Program(NET).save(tmp_path)
    path = tmp_path / "graph.qir"
    text = path.read_text()
    edited = edit(text)
    assert edited != text
    path.write_text(edited)
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_a_wider_range_than_is_proved_is_no_lie() -> None:
    wider = map_values(NET, lambda v: {"range": Interval(-500, 500)} if v.name == "pooled" else {})
    assert np.array_equal(Program(wider).run_integer({"x": samples(1)})["y"], interpret(NET, {"x": samples(1)})["y"])


def test_other_stages_are_refused() -> None:
    graph = parse("graph @early stage=float (%x: Nx2 x f32) {\n %y = Relu %x : Nx2 x f32\n return %y\n}")
    with pytest.raises(QirError, match="graph @early is at stage float; a program runs stage fixed: run legalize"):
        Program(graph)


def test_a_folder_without_a_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QirError, match=r"cannot read .*graph\.qir: No such file or directory"):
        load(tmp_path)
    Program(NET).save(tmp_path / "build")
    (tmp_path / "build" / "weights.safetensors").unlink()
    with pytest.raises(ResourceError, match=r"its sidecar .* is missing; keep the two files together"):
        load(tmp_path / "build")


# Feeds and outputs


def test_run_quantizes_and_dequantizes() -> None:
    program = Program(NET)
    real = np.random.default_rng(2).normal(0, 4, (5, 6, 6, 4)).astype(np.float32)
    x, y = NET.inputs[0], NET.outputs[0]
    raw = np.asarray(quantize_input(NET, x, real))
    expected = program.run_integer({"x": raw})["y"]
    assert expected.dtype == np.int8
    found = program.run({"x": real})["y"]
    assert found.dtype == np.float32
    assert np.array_equal(found, dequantize_array(expected, y.type.element))
    assert np.array_equal(program.run_integer({"x": real})["y"], expected)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_batches_of_any_size_in_chunks_of_any_size(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {"x": samples(count)}
    size = Program(NET).plan().sample_bytes
    monkeypatch.setattr(executor, "CHUNK_BYTES", chunk * size)
    program = Program(NET)
    assert program.plan().chunk == chunk
    seen: list[tuple[int, int]] = []
    found = program.run_integer(feeds, lambda done, total: seen.append((done, total)))["y"]
    expected = interpret(NET, feeds)["y"]
    assert found.shape == expected.shape == (count, 3, 3, 4)
    assert np.array_equal(found, expected)
    ends = [min(start + chunk, count) for start in range(0, max(count, 1), chunk)]
    assert seen == [(end, count) for end in ends]


def test_batches_may_change_from_call_to_call() -> None:
    program = Program(NET)
    for count in (3, 1, 200, 0, 3, 100):
        feeds = {"x": samples(count, seed=count)}
        assert np.array_equal(program.run_integer(feeds)["y"], interpret(NET, feeds)["y"])


def test_threads_take_turns() -> None:
    program = Program(NET)
    feeds = [{"x": samples(count, seed=count)} for count in (1, 5, 40, 7, 200, 3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(program.run_integer, feeds * 5))
    for one, result in zip(feeds * 5, found, strict=True):
        assert np.array_equal(result["y"], interpret(NET, one)["y"])


def test_progress_may_run_the_program_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "CHUNK_BYTES", 2 * Program(NET).plan().sample_bytes)
    program = Program(NET)
    within: list[Tensor] = []
    feeds, other = {"x": samples(7)}, {"x": samples(3, seed=2)}
    found = program.run_integer(feeds, lambda done, total: within.append(program.run_integer(other)["y"]))["y"]
    assert np.array_equal(found, interpret(NET, feeds)["y"])
    assert len(within) == 4
    assert all(np.array_equal(w, interpret(NET, other)["y"]) for w in within)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"the inputs are \['x'\]; missing \['x'\]"),
        ({"x": samples(1), "z": samples(1)}, r"unknown \['z'\]"),
        ({"x": samples(1)[..., :3]}, "input 'x' has shape 1x6x6x3, expected Nx6x6x4"),
        ({"x": samples(1).astype(np.int32) + 300}, r"input 'x' spans \[\d+, \d+\], beyond its type's \[-128, 127\]"),
        ({"x": np.full((1, 6, 6, 4), np.nan)}, "input 'x' holds NaN or infinity"),
        ({"x": np.full((1, 6, 6, 4), "a")}, "input 'x' is of <U1, expected integers of s8"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(feeds: dict[str, Tensor], message: str) -> None:
    program = Program(NET)
    for run in (program.run, program.run_integer, program.trace):
        with pytest.raises(RunError, match=message):
            run(feeds)


def test_batches_that_differ_are_refused() -> None:
    graph = proved_text("%y = add %x, %z {overflow=saturate} : Nx2 x s8\nreturn %y", "%x: Nx2 x s8, %z: Nx2 x s8")
    with pytest.raises(RunError, match="input 'z' has a batch of 3, another input one of 2"):
        Program(graph).run_integer({"x": np.zeros((2, 2), np.int8), "z": np.zeros((3, 2), np.int8)})


def test_results_are_nobody_elses() -> None:
    first, second = Program(NET), Program(NET)
    feed = samples(4)
    kept = feed.copy()
    results = [p.run_integer({"x": feed})["y"] for p in (first, second, first)]
    expected = results[0].copy()
    assert not any(np.shares_memory(a, b) for a, b in combinations([*results, feed], 2))
    results[0][:] = 0
    feed[:] = 99
    second.run_integer({"x": samples(4, seed=9)})
    assert np.array_equal(results[1], expected)
    assert np.array_equal(first.run_integer({"x": kept})["y"], expected)
    traced = first.trace({"x": kept})
    first.trace({"x": feed})
    assert np.array_equal(traced["x"], kept)
    traced["conv0.weight"][:] = 0
    assert np.array_equal(first.run_integer({"x": kept})["y"], expected)


def test_a_graph_of_fixed_batch() -> None:
    graph = small_net(2)
    program = Program(graph)
    feeds = {"x": samples(2)}
    assert np.array_equal(program.run_integer(feeds)["y"], interpret(graph, feeds)["y"])
    assert np.array_equal(program.run_integer(feeds)["y"], Program(NET).run_integer(feeds)["y"])
    with pytest.raises(RunError, match="input 'x' has shape 3x6x6x4, expected 2x6x6x4"):
        program.run_integer({"x": samples(3)})


def test_plain_integers_stay_integers() -> None:
    graph = proved_text("%y = argmax %x {axis=1, keepdims=false, select_last_index=true} : N x s64\nreturn %y")
    found = Program(graph).run({"x": np.array([[1.0, 1.0], [2.0, 1.0]])})["y"]
    assert found.dtype == np.int64
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_outputs_that_are_inputs_or_constants_or_the_same_value(count: int) -> None:
    graph = proved_text(
        """
        %k = const {value=s8 2 [5, -5]} : 2 x s8
        %fixed = add %k, %k {overflow=saturate} : 2 x s8
        %view = reshape %x {shape=[2, 1]} : Nx2x1 x s8<0.5>
        %flat = reshape %k {shape=[1, 2]} : 1x2 x s8
        %y = add %x, %k {overflow=saturate} : Nx2 x s8
        return %x as "in", %k as "constant", %fixed as "fixed", %view as "view", %flat as "flat", %y as "a", %y as "b"
        """
    )
    feeds = {"x": np.arange(2 * count, dtype=np.int8).reshape(count, 2)}
    program = Program(graph)
    found, expected = program.run_integer(feeds), interpret(graph, feeds)
    assert list(found) == list(expected) == ["in", "constant", "fixed", "view", "flat", "a", "b"]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name, strict=True)
    found["a"][...] = 77
    found["constant"][...] = 77
    assert not np.shares_memory(found["a"], found["b"])
    for name, array in program.run_integer(feeds).items():
        np.testing.assert_array_equal(array, expected[name], name, strict=True)


def test_results_that_nobody_reads_and_values_read_twice() -> None:
    graph = proved_text(
        """
        %unread = add %x, %x {overflow=saturate} : Nx2 x s16
        %twice = sub %x, %x {overflow=saturate} : Nx2 x s8
        %y = mul %twice, %x {overflow=saturate} : Nx2 x s32
        return %y
        """
    )
    feeds = {"x": np.array([[-128, 127], [3, -4]], np.int8)}
    program = Program(graph)
    assert np.array_equal(program.run_integer(feeds)["y"], interpret(graph, feeds)["y"])
    assert np.array_equal(program.trace(feeds)["unread"], [[-256, 254], [6, -8]])


def test_reals_pass_through_islands() -> None:
    graph = proved_text(
        """
        %0 = dequantize %x : Nx2 x f32
        %1 = Relu %0 : Nx2 x f32 island
        return %1 as "real", %x as "raw"
        """
    )
    program = Program(graph)
    found = program.run({"x": np.array([[-1.0, 2.0]])})
    assert (found["real"].tolist(), found["raw"].tolist()) == ([[0.0, 2.0]], [[-1.0, 2.0]])
    assert [s.kernel for s in program.plan().steps] == ["dequantize", "island"]


# The plan


def test_the_plan_says_what_runs_where() -> None:
    program = Program(NET)
    plan = program.plan()
    conv = "conv2d_s8s8s32+requantize_double_round"
    assert [s.kernel for s in plan.steps] == [conv, "add", conv, "add", "max_pool2d"]
    assert plan.steps[0].ops == ("conv2d %acc0", "requantize %scaled0")
    assert plan.weight_bytes == program.weight_bytes() == 2 * (4 * 3 * 3 * 4 + 4 * 4)
    assert program.macs() == NET.macs() == 2 * 6 * 6 * 4 * 3 * 3 * 4
    lines = str(plan).splitlines()
    assert lines[0] == (
        f"5 steps; arena {plan.sample_bytes:,} bytes a sample and {plan.fixed_bytes:,} fixed; "
        f"up to {plan.chunk:,} samples at a time"
    )
    assert lines[1] == f"weights 320 bytes, packed for this host {plan.packed_bytes:,}"
    assert len(lines) == 4 + len(plan.steps)
    for line, step in zip(lines[4:], plan.steps, strict=True):
        assert step.kernel in line
        assert line.endswith(f"%{step.output}")


def _overlap(a: Buffer, b: Buffer) -> bool:
    together = a.first <= b.last and b.first <= a.last
    return together and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes


@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("lead", [BATCH, 3])
def test_live_buffers_never_overlap(lead: Dim, keep_all: bool) -> None:
    graph = small_net(lead)
    layout = lay_out(graph, Facts(graph.constants, prove(graph)), keep_all=keep_all)
    buffers = [*layout.place.values(), *(b for rooms in layout.scratch for b in rooms)]
    assert len({b.name for b in buffers}) == len(buffers)
    for per_sample, size in ((True, layout.sample_bytes), (False, layout.fixed_bytes)):
        pool = [b for b in buffers if b.per_sample is per_sample]
        assert all(b.offset % 64 == 0 and b.offset + b.bytes <= size for b in pool)
        assert not [(a.name, b.name) for a, b in combinations(pool, 2) if _overlap(a, b)]
    last = {v.name: n for n, s in enumerate(layout.steps) for v in s.inputs}
    for value, buffer in layout.place.items():
        assert buffer.last >= last.get(value.name, buffer.first)
    if not keep_all:
        whole = sum(b.bytes for b in buffers)
        assert layout.sample_bytes + layout.fixed_bytes < whole + 64 * len(buffers)


def test_the_public_names_are_these_functions(tmp_path: Path) -> None:
    program = qir.Program(NET)
    program.save(tmp_path)
    assert qir.load(tmp_path).graph == NET
