"""Repairs of sums that overflow: a model whose 16-bit accumulator does is mended by each rung of the ladder."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx_models import model, random

import qir
from qir.backend import load_target
from qir.cli import main
from qir.errors import PassError
from qir.fixed_point import Overflow
from qir.idle import is_idle
from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.ops.accumulate import Accumulating, centre
from qir.ops.fixed_elementwise import FixedAdd
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.pipelines import default_pipeline, parse_pipeline
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.repairs.ladder import Repair
from qir.program import Program
from qir.proof import prove
from qir.rewrite import map_values
from qir.serialization import write_graph
from qir.target import Target
from qir.target_file import parse_target
from qir.types import S64
from qir.verifier import verify

Tensor = npt.NDArray[Any]

TEXT = """g (float[N, 6, 6, 6] x) => (float[N, 5] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(a) d = Conv<group = 8>(r, v)
    p = GlobalAveragePool(d) f = Flatten(p) y = Gemm(f, u, c)
}"""
WEIGHTS: dict[str, Any] = {
    "w": random(8, 6, 3, 3, seed=1),
    "b": random(8, seed=2),
    "v": random(8, 1, 3, 3, seed=3),
    "u": random(8, 5, seed=4),
    "c": random(5, seed=5),
}
RUNGS = (Repair.WIDEN, Repair.SPLIT, Repair.NARROW, Repair.SATURATE)


def narrow_target(mode: str, wider: str = "") -> Target:
    """arm-neon with an accumulator of 16 bits."""
    text = str(load_target("arm-neon"))
    for old, new in (("bits = 32\n", f"bits = 16\n{wider}"), ('overflow = "wrap"', f'overflow = "{mode}"')):
        head, accumulator = text.split("[accumulator]\n")
        text = f"{head}[accumulator]\n{accumulator.replace(old, new, 1)}"
    return parse_target(text.replace("bias_bits = 32\n", ""))


@cache
def overflowing(mode: str) -> tuple[Graph, dict[str, Tensor]]:
    """The model before insert-saturation, and inputs: random ones, and the worst of each channel of the first layer."""
    context = PassContext(narrow_target(mode), [{"x": random(64, 6, 6, 6, seed=6)}])
    graph = default_pipeline().before("insert-saturation").run(qir.import_onnx(model(TEXT, **WEIGHTS)), context)
    first = next(op for op in graph.ops if isinstance(op, Accumulating))
    weights = graph.constants[first.operands[1]].data.transpose(0, 3, 1, 2)
    x = np.random.default_rng(7).integers(-128, 128, (40, 6, 6, 6)).astype(np.int8)
    for channel, row in enumerate(weights):
        x[channel, :, 1:4, 1:4] = np.where(row > 0, 127, -128)
        x[channel + 8, :, 1:4, 1:4] = np.where(row > 0, -128, 127)
    return graph, {"x": x}


def exact_sums(graph: Graph) -> Graph:
    """The graph with all sums in 64 bits."""
    sums = {op.result for op in graph.ops if isinstance(op, Accumulating)}
    wide = {"accumulator": S64, "overflow": Overflow.WRAP, "partial": None}
    found = map_values(
        graph,
        lambda v: {"range": None, **({"type": v.type.with_element(S64)} if v in sums else {})},
        attributes=lambda op: wide if isinstance(op, Accumulating) else {},
    )
    return RangeAnalysis().run(found, PassContext())


def layers(graph: Graph) -> list[Accumulating]:
    return [op for op in graph.ops if isinstance(op, Accumulating)]


def is_free(graph: Graph) -> bool:
    """Whether no sum may overflow."""
    return all(is_idle(op, prove(graph).steps[op]) for op in layers(graph))


def repaired(graph: Graph, target: Target, rung: Repair) -> tuple[Graph, PassContext]:
    """The graph with this rung alone."""
    context = PassContext(target)
    skip = tuple(r for r in RUNGS if RUNGS.index(r) < RUNGS.index(rung))
    after = InsertSaturation(rung, skip).run(graph, context)
    verify(after)
    return after, context


def outputs(graph: Graph, feeds: dict[str, Tensor]) -> Tensor:
    """The integers of %y, from kernels and interpreter, which must agree."""
    found = Program(graph).run_integer(feeds)["y"]
    np.testing.assert_array_equal(found, interpret(graph, feeds)["y"], strict=True)
    return found


@pytest.mark.parametrize("mode", ["wrap", "saturate"])
def test_the_model_overflows_and_is_reported(mode: str) -> None:
    graph, feeds = overflowing(mode)
    context = PassContext()
    after = InsertSaturation().run(graph, context)
    fault = "step-wise saturation" if mode == "saturate" else "overflow"
    assert f"1 of 4 layers are proved free of {fault}" in context.notes
    assert [d.severity for d in context.diagnostics] == ["warning"] * 3
    first = layers(after)[0]
    assert (context.diagnostics[0].place, first.partial) == (first.describe(), prove(after).steps[first].partial)
    assert first.partial is not None
    assert f"may reach [{first.partial.lo}, {first.partial.hi}], beyond the [-32768, 32767] of s16" in str(
        context.diagnostics[0]
    )
    np.testing.assert_array_equal(outputs(after, feeds), outputs(graph, feeds))
    name = first.result.name
    assert np.any(trace(after, feeds)[name] != trace(exact_sums(graph), feeds)[name])


@pytest.mark.parametrize("mode", ["wrap", "saturate"])
@pytest.mark.parametrize("rung", [Repair.WIDEN, Repair.SPLIT])
def test_a_wider_or_a_split_sum_is_the_exact_one(mode: str, rung: Repair) -> None:
    graph, feeds = overflowing(mode)
    after, context = repaired(graph, narrow_target(mode, "wider = [18, 24]\n"), rung)
    assert is_free(after)
    assert all(op.overflow is Overflow.NONE for op in layers(after))
    assert not context.diagnostics
    np.testing.assert_array_equal(outputs(after, feeds), outputs(exact_sums(graph), feeds))
    kinds = {str(op.accumulator) for op in layers(after)}
    assert kinds == ({"s16", "s18"} if rung is Repair.WIDEN else {"s16"})
    assert any(isinstance(op, FixedAdd) for op in after.ops) is (rung is Repair.SPLIT)


@pytest.mark.parametrize("mode", ["wrap", "saturate"])
def test_narrowed_weights_fit_and_others_stay(mode: str) -> None:
    graph, feeds = overflowing(mode)
    after, context = repaired(graph, narrow_target(mode), Repair.NARROW)
    assert is_free(after)
    np.testing.assert_array_equal(outputs(after, feeds), outputs(exact_sums(after), feeds))
    changed = 0
    for old, new in zip(layers(graph), layers(after), strict=True):
        if len(old.operands) < 2:
            continue
        axis = 0 if old.mnemonic == "conv2d" else 1
        rows = [
            np.moveaxis(centre(g.constants[o.operands[1]].data.astype(int), o.operands[1].type), axis, 0)
            for g, o in ((graph, old), (after, new))
        ]
        before, found = (r.reshape(len(r), -1) for r in rows)
        bounds = old.with_changes(overflow=Overflow.WRAP).bounds([prove(graph).bounds[v] for v in old.operands])
        assert bounds is not None
        assert bounds.channel_partials is not None
        fits = (bounds.channel_partials.lo >= -(1 << 15)) & (bounds.channel_partials.hi < 1 << 15)
        same = (before == found).all(axis=1)
        np.testing.assert_array_equal(same, fits)
        assert np.all(np.abs(found) <= np.abs(before))
        assert np.all(found * before >= 0)
        changed += int((~same).sum())
    stated = [n for n in context.notes if "channels were " in n]
    assert sum(int(n.split("the weights of ")[1].split()[0]) for n in stated) == changed


def test_halved_weights_keep_what_the_model_computes() -> None:
    """Factors make up for halved weights, so that roundings alone are left: 2 % of the range on the worst inputs."""
    graph, feeds = overflowing("wrap")
    after, context = repaired(graph, narrow_target("wrap"), Repair.NARROW)
    assert sum("their factors doubled" in n for n in context.notes) == 3
    gap = np.abs(outputs(after, feeds).astype(int) - outputs(exact_sums(graph), feeds))
    assert 0 < float(gap.mean()) < 0.02 * 256


@pytest.mark.parametrize("form", ["double_round", "single_round", "neon", "reduced_16", "float32", "shift"])
def test_every_form_makes_up_for_halved_weights(form: str) -> None:
    """A channel whose weights are even loses nothing; one that fits keeps its own."""
    factor = {"float32": "f32 [0.0001]", "shift": "s64 [1]"}.get(form, "s64 [1374389535]")
    rounding = ", rounding=half_even" if form == "shift" else ""
    graph = RangeAnalysis().run(
        parse(f"""
        graph @g stage=fixed {{input_rule=divide, input_rounding=half_away}} (%x: Nx3 x s8<0.5>) {{
          %w = const {{value=s8 3x2 [126, 1, -64, 2, 80, 3]}} : 3x2 x s8
          %b = const {{value=s16 2 [1000, 5]}} : 2 x s16
          %0 = matmul %x, %w, %b {{accumulator=s16, overflow=wrap, order=khwc}} : Nx2 x s16
          %y = requantize %0 {{multiplier={factor}, shift=s64 [-8], form={form}{rounding}, input_shift=0, overflow=saturate}} : Nx2 x s16<0.5>
          return %y
        }}"""),  # noqa: E501
        PassContext(),
    )
    after, context = repaired(graph, narrow_target("wrap"), Repair.NARROW)
    assert "the weights of 1 of 2 channels were halved once and their factors doubled, at 0.0%" in str(context.notes)
    assert is_free(after)
    feeds = {"x": np.random.default_rng(0).integers(-128, 128, (500, 3)).astype(np.int8)}
    np.testing.assert_array_equal(outputs(after, feeds), outputs(exact_sums(graph), feeds))


@pytest.mark.parametrize("behind", ["", "%z = add %0, %0 {overflow=saturate} : Nx2 x s40"])
def test_weights_whose_sums_are_not_requantized_are_cut_by_a_threshold(behind: str) -> None:
    text = LAYER.replace("BEHIND", behind).replace("return %y", f'return {"%z" if behind else "%0"} as "y"')
    graph = RangeAnalysis().run(parse(text), PassContext())
    after, context = repaired(graph, chip(""), Repair.NARROW)
    assert is_free(after)
    assert "the weights of 1 of 2 channels were narrowed, at " in str(context.notes)
    (new,), (old,) = ([op for op in g.ops if isinstance(op, Accumulating)] for g in (after, graph))
    before, found = (g.constants[o.operands[1]].data.astype(int) for g, o in ((graph, old), (after, new)))
    np.testing.assert_array_equal(found[:, 1], before[:, 1])
    cut = np.abs(before[:, 0]) - np.abs(found[:, 0])
    assert int(cut.min()) > 0
    assert int(np.ptp(cut)) <= 1
    reach = int(np.abs(found[:, 0]).sum()) << 15
    assert reach <= (1 << 31) < reach + (2 << 15)  # no unit more would fit


def test_saturation_is_the_last_resort() -> None:
    graph, feeds = overflowing("wrap")
    after, context = repaired(graph, narrow_target("wrap"), Repair.SATURATE)
    modes = [op.overflow for op in layers(after)]
    assert modes.count(Overflow.SATURATE) == 3
    assert modes.count(Overflow.NONE) == 1
    by_hand = map_values(
        graph,
        lambda v: {},
        attributes=lambda op: {"overflow": Overflow.SATURATE} if isinstance(op, Accumulating) else {},
    )
    np.testing.assert_array_equal(outputs(after, feeds), interpret(by_hand, feeds)["y"])
    assert not context.diagnostics
    assert sum("its steps saturate" in n for n in context.notes) == 3
    kept, _ = overflowing("saturate")
    stays, quiet = repaired(kept, narrow_target("saturate"), Repair.SATURATE)
    assert stays == InsertSaturation().run(kept, PassContext())
    assert not quiet.diagnostics


def test_the_first_rung_that_serves_is_taken() -> None:
    graph, _ = overflowing("wrap")
    wide, narrow = narrow_target("wrap", "wider = [24]\n"), narrow_target("wrap")

    def rungs(target: Target, repair: Repair, *skip: Repair) -> list[str]:
        context = PassContext(target)
        InsertSaturation(repair, skip).run(graph, context)
        words = {"became s24": "widen", "was cut into": "split", "halved": "narrow", "saturate": "saturate"}
        notes = [n for n in context.notes if "take " in n]
        return sorted({name for note in notes for words_in, name in words.items() if words_in in note})

    assert rungs(wide, Repair.SATURATE) == ["widen"]
    assert rungs(wide, Repair.SATURATE, Repair.WIDEN) == ["split"]
    assert rungs(narrow, Repair.WIDEN) == []
    assert rungs(narrow, Repair.SATURATE) == ["split"]
    assert rungs(narrow, Repair.SATURATE, Repair.SPLIT) == ["narrow"]
    assert rungs(narrow, Repair.SATURATE, Repair.SPLIT, Repair.NARROW) == ["saturate"]


def test_a_note_says_what_was_done_where_and_what_it_cost() -> None:
    graph, _ = overflowing("wrap")
    _, context = repaired(graph, narrow_target("wrap"), Repair.SPLIT)
    depthwise = next(op for op in layers(graph) if getattr(op, "groups", 1) > 1)
    (note,) = (n for n in context.notes if n.startswith(depthwise.describe()))
    partial = depthwise.partial
    assert partial is not None
    cost = f"its sum was cut into 2, at 1 addition in s32 and {depthwise.macs():,} more multiply-accumulates"
    assert note.endswith(f"[{partial.lo}, {partial.hi}] take 17 bits and s16 has 16: {cost}")


# Where a rung does not serve


LAYER = """
graph @g stage=fixed {input_rule=divide, input_rounding=half_away} (%x: Nx4 x s16<0.5>) {
  %w = const {value=s16 4x2 [30000, -30000, 30000, 100, -30000, 100, 30000, 100]} : 4x2 x s16<0.5>
  %0 = matmul %x, %w {accumulator=s32, overflow=wrap, order=khwc} : Nx2 x s32
  BEHIND
  return %y
}"""
RESCALED = (
    "%y = requantize %0 {multiplier=FACTOR, shift=s64 [-20], FORM, input_shift=0, overflow=saturate} : Nx2 x s16<0.5>"
)
DOUBLE = RESCALED.replace("FACTOR", "s64 [1073741824]").replace("FORM", "form=double_round")
SINGLE = DOUBLE.replace("double_round", "single_round")
FLOAT = RESCALED.replace("FACTOR", "f32 [0.0000001]").replace("FORM", "form=float32")
WIDER = "wider = [40]\n"


def chip(wider: str = WIDER) -> Target:
    return parse_target(str(load_target("arm-neon")).replace('order = "khwc"\n', f'order = "khwc"\n{wider}'))


@pytest.mark.parametrize("behind", [SINGLE, FLOAT])
@pytest.mark.parametrize("rung", [Repair.WIDEN, Repair.SPLIT])
def test_readers_of_any_width_take_what_leaves_32_bits(behind: str, rung: Repair) -> None:
    graph = RangeAnalysis().run(parse(LAYER.replace("BEHIND", behind)), PassContext())
    after, _ = repaired(graph, chip(), rung)
    assert is_free(after)
    feeds = {"x": np.array([[32767, 32767, -32768, 32767], [1, 2, 3, 4], [-32768, -1, 32767, 5]], np.int16)}
    np.testing.assert_array_equal(outputs(after, feeds), outputs(exact_sums(graph), feeds))
    assert np.any(outputs(after, feeds) != outputs(graph, feeds))


@pytest.mark.parametrize("behind", [DOUBLE, "%y = reshape %0 {shape=[2, 1]} : Nx2x1 x s32"])
def test_readers_of_32_bits_do_not(behind: str) -> None:
    graph = RangeAnalysis().run(parse(LAYER.replace("BEHIND", behind)), PassContext())
    context = PassContext(chip())
    after = InsertSaturation(Repair.SPLIT).run(graph, context)
    assert not is_free(after)
    assert [d.place for d in context.diagnostics] == ["matmul %0"]
    after, _ = repaired(graph, chip(), Repair.NARROW)
    assert is_free(after)


def test_an_output_keeps_its_type() -> None:
    graph = parse(LAYER.replace("BEHIND", "").replace("return %y", "return %0"))
    for repair in (Repair.WIDEN, Repair.SPLIT):
        context = PassContext(chip())
        after = InsertSaturation(repair).run(graph, context)
        assert after.outputs[0].type == graph.outputs[0].type
        assert len(context.diagnostics) == 1


def test_a_product_or_a_bias_that_does_not_fit_alone_is_neither_split_nor_narrowed() -> None:
    text = LAYER.replace("BEHIND", SINGLE)
    narrow = text.replace("accumulator=s32", "accumulator=s24").replace("Nx2 x s32", "Nx2 x s24")
    after, _ = repaired(parse(narrow), chip(""), Repair.SPLIT)
    assert not is_free(after)
    after, _ = repaired(parse(narrow), chip(""), Repair.NARROW)
    assert is_free(after)
    bias = narrow.replace(
        "%0 = matmul %x, %w {", "%b = const {value=s32 2 [1, 9000000]} : 2 x s32\n  %0 = matmul %x, %w, %b {"
    )
    after, context = repaired(parse(bias), chip(""), Repair.NARROW)
    assert is_free(after)  # the bias is halved, too
    assert "their factors doubled" in str(context.notes)
    after, _ = repaired(
        parse(bias.replace("%y = ", "%unread = ").replace("return %y", 'return %0 as "y"')), chip(""), Repair.NARROW
    )
    assert not is_free(after)
    after, context = repaired(parse(bias), chip(""), Repair.SATURATE)
    assert [op.overflow for op in layers(after)] == [Overflow.SATURATE]
    assert not context.diagnostics


def test_a_bias_that_does_not_fit_is_added_in_the_wide_type() -> None:
    window = "pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1"
    rescale = "multiplier=s64 [1073741824], shift=s64 [-9], form=double_round, input_shift=0, overflow=saturate"
    text = f"""
    graph @g stage=fixed {{input_rule=divide, input_rounding=half_away}} (%x: Nx3x3x2 x s8<0.5, zero=5>) {{
      %w = const {{value=s8 2x1x1x2 [100, 100, 50, -3]}} : 2x1x1x2 x s8<0.5>
      %b = const {{value=s32 2 [200000, -7]}} : 2 x s32
      %0 = conv2d %x, %w, %b {{accumulator=s16, overflow=wrap, order=bias_khwc, {window}}} : Nx3x3x2 x s16
      %y = requantize %0 {{{rescale}}} : Nx3x3x2 x s8<0.5>
      return %y
    }}"""
    graph = RangeAnalysis().run(parse(text), PassContext())
    after, _ = repaired(graph, chip(""), Repair.SPLIT)
    assert is_free(after)
    assert [op.mnemonic for op in after.ops if op.mnemonic != "const"] == ["conv2d", "add", "requantize"]
    x = np.random.default_rng(0).integers(-128, 128, (9, 3, 3, 2)).astype(np.int8)
    np.testing.assert_array_equal(outputs(after, {"x": x}), outputs(exact_sums(graph), {"x": x}))


def test_what_a_repair_disproves_is_claimed_no_more() -> None:
    """Sums that wrap at 15 bits fit 15 bits; the exact ones do not."""
    rescale = "multiplier=s64 [1073741824], shift=s64 [1], form=single_round, input_shift=0"
    text = f"""
    graph @g stage=fixed {{input_rule=divide, input_rounding=half_away}} (%x: Nx2 x s8<0.5>) {{
      %w = const {{value=s8 2x1 [127, 127]}} : 2x1 x s8<0.5>
      %0 = matmul %x, %w {{accumulator=s15, overflow=wrap, order=khwc}} : Nx1 x s15
      %1 = requantize %0 {{{rescale}, overflow=saturate}} : Nx1 x s16<0.5>
      %y = requantize %1 {{{rescale}, overflow=none}} : Nx1 x s15<0.5>
      return %y
    }}"""
    graph = RangeAnalysis().run(parse(text), PassContext())
    verify(graph)
    after, _ = repaired(graph, chip(), Repair.WIDEN)
    modes = [getattr(op, "overflow", None) for op in after.ops]
    assert modes == [None, Overflow.NONE, Overflow.NONE, Overflow.SATURATE]
    assert outputs(after, {"x": np.array([[127, 127]], np.int8)}).item() == (1 << 14) - 1


# Options


def test_options_print_and_parse() -> None:
    for options in ("", "{repair=narrow}", "{repair=saturate,skip=widen;split}"):
        pipeline = parse_pipeline(f"insert-saturation{options}")
        assert str(pipeline) == f"insert-saturation{options}"
        assert pipeline[0].preserves_bits is (not options)
    with pytest.raises(PassError, match="option repair=clamp: there are: prove, widen, split, narrow, saturate"):
        parse_pipeline("insert-saturation{repair=clamp}")
    with pytest.raises(PassError, match="a proof is not skipped"):
        parse_pipeline("insert-saturation{skip=prove}")
    with pytest.raises(PassError, match="insert-saturation needs a target"):
        InsertSaturation(Repair.WIDEN).run(overflowing("wrap")[0], PassContext())


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ("", "repair it by insert-saturation{repair=widen}, or split, narrow, saturate"),
        ("{repair=widen}", "repair it by insert-saturation{repair=split}, or narrow, saturate"),
        ("{repair=narrow,skip=split;narrow}", "repair it by insert-saturation{repair=split}, or narrow, saturate"),
        (
            "{repair=saturate,skip=split;narrow;saturate}",
            "repair it by insert-saturation{repair=split}, or narrow, sat",
        ),
    ],
)
def test_warnings_offer_what_was_not_tried(options: str, mend: str) -> None:
    context = PassContext(load_target("arm-neon"))  # which has no wider accumulator
    parse_pipeline(f"insert-saturation{options}").run(overflowing("wrap")[0], context)
    assert len(context.diagnostics) == 3
    assert all(f"; {mend}" in d.message for d in context.diagnostics)


def test_the_command_line_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(model(TEXT, **WEIGHTS), "model.onnx")
    np.savez("calib.npz", x=random(64, 6, 6, 6, seed=6))
    Path("chip.toml").write_text(str(narrow_target("wrap")).replace('"arm-neon"', '"chip"'), encoding="utf-8")
    command = "compile model.onnx --target ./chip.toml --calibration calib.npz -o build"
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3
    text = " ".join(out.split())
    assert text.count("of s16, and then wrap; repair it by insert-saturation{repair=widen}") == 3
    assert err == ""
    assert main(["check", "build"]) == 0
    assert capsys.readouterr().out.count("counterexample: exact sum ") == 3
    repaired_pipeline = str(default_pipeline()).replace("insert-saturation", "insert-saturation{repair=split}")
    assert main([*command.split(), "--passes", repaired_pipeline]) == 0
    out, _ = capsys.readouterr()
    assert re.search(r"(\d+) of \1 layers are proved free of overflow", " ".join(out.split()))
    assert "its sum was cut into" in " ".join(out.split())
    assert not [line for line in out.splitlines() if line.startswith("warning")]
    assert main(["check", "build"]) == 0
    assert "MAY OVERFLOW" not in capsys.readouterr().out
    assert main(["opt", "build/graph.qir", "--passes", "insert-saturation", "-o", "again.qir"]) == 0
    assert capsys.readouterr() == ("", "")
    write_graph(overflowing("wrap")[0], "before.qir")
    assert main(["opt", "before.qir", "--passes", "insert-saturation", "-o", "again.qir"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("qir: warning: ") == 3


def test_what_cannot_be_skipped_is_refused() -> None:
    with pytest.raises(PassError, match=r"skip=split leaves nothing out of repair=widen; skip what comes before it"):
        InsertSaturation(Repair.WIDEN, (Repair.SPLIT,))
