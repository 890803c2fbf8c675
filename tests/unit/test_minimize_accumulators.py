"""minimize-accumulators: the narrowest proved sums of a layer or a channel, the same bits, and claims that are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import compiled, labelled_images

import qir
from qir.arrays import Array
from qir.backend import load_target
from qir.cli import main
from qir.errors import PassError
from qir.interval import bits_of_interval
from qir.ir import Graph
from qir.ops.accumulate import Accumulating
from qir.parser import parse
from qir.pass_manager import PassContext, integer_feeds
from qir.passes.minimize_accumulators import MinimizeAccumulators, Per
from qir.passes.pipelines import parse_pipeline
from qir.passes.range_analysis import RangeAnalysis
from qir.printer import print_graph, resources
from qir.program import Program
from qir.proof import channel_bits, prove
from qir.rewrite import map_values
from qir.verifier import find_faults, verify

FPGA = load_target("fpga")


def layers(graph: Graph) -> list[Accumulating]:
    return [op for op in graph.ops if isinstance(op, Accumulating)]


def minimized(graph: Graph, per: Per = Per.LAYER) -> tuple[Graph, list[str]]:
    context = PassContext(FPGA)
    after = MinimizeAccumulators(per).run(graph, context)
    verify(after)
    return after, context.notes


@pytest.mark.parametrize("per", Per)
@pytest.mark.parametrize("name", ["fm_cnn", "fm_mobile"])
def test_models_on_fpga_keep_every_bit(name: str, per: Per) -> None:
    program = compiled(name, "fpga").program
    after, notes = minimized(program.graph, per)
    narrower = Program(after)
    x, labels = labelled_images()
    feeds = integer_feeds(after, {"x": x[:500]})
    expected, found = program.trace(feeds), narrower.trace(feeds)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key)
    logits = [p.run({"x": x[:2000]})["logits"] for p in (program, narrower)]
    np.testing.assert_array_equal(logits[1], logits[0])
    assert np.mean(logits[1].argmax(axis=1) == labels[:2000]) > 0.9
    old, new = layers(program.graph), layers(after)
    bits = [sum(op.accumulator.bits for op in ops) for ops in (old, new)]
    channels = [int(op.result.type.shape[-1]) for op in old]
    assert bits[1] <= bits[0] < 32 * len(old)
    share = f"{bits[1] / (32 * len(old)):.0%} of the {32 * len(old):,} of 32 each"
    assert notes[0] == f"one accumulator a layer: {bits[0]:,} bits became {bits[1]:,}, {share}"
    steps = prove(after).steps
    for op in new:
        partial, widths = steps[op].partial, channel_bits(steps[op])
        assert partial is not None
        assert widths is not None
        assert op.accumulator.bits == max(bits_of_interval(partial), 2) == widths.max()
        assert (op.channel_bits is not None) is (per is Per.CHANNEL)
        if op.channel_bits is not None:
            np.testing.assert_array_equal(op.channel_bits.data, widths)
    total = sum(o.accumulator.bits * c for o, c in zip(new, channels, strict=True))
    if per is Per.CHANNEL:
        stated = [op.channel_bits.data for op in new if op.channel_bits is not None]
        each = sum(int(np.broadcast_to(b, c).sum()) for b, c in zip(stated, channels, strict=True))
        assert each < total
        total = each
    assert f"became {total:,}, {total / (32 * sum(channels)):.0%} of the" in notes[1]


_DOWN = "multiplier=s64 [1], shift=s64 [-4], form=shift, input_shift=0, rounding=floor"
TEXT = f"""
graph @g stage=fixed target="fpga" {{input_rule=divide, input_rounding=floor}} (%x: Nx2 x s8<2^-3>) {{
  %w = const {{value=s8 2x2 [100, 3, 4, 1]}} : 2x2 x s8<2^-3>
  %r = requantize %x {{{_DOWN}, overflow=none}} : Nx2 x s8<2^1>
  %0 = matmul %r, %w {{accumulator=s17, overflow=wrap, order=bias_khwc}} : Nx2 x s17
  %y = requantize %0 {{{_DOWN}, overflow=saturate}} : Nx2 x s8<2^2>
  return %y
}}"""


def test_proved_ranges_count_and_not_types() -> None:
    """The operand is in [-8, 7]: sums in [-832, 728] take 11 bits and [-32, 28] take 6."""
    graph = RangeAnalysis().run(parse(TEXT), PassContext())
    after, notes = minimized(graph, Per.CHANNEL)
    (op,) = layers(after)
    assert (str(op.accumulator), str(op.overflow)) == ("s11", "none")
    assert op.channel_bits == Array(np.array([11, 6]))
    assert notes == [
        "one accumulator a layer: 17 bits became 11, 34% of the 32 of 32 each",
        "one accumulator a channel: 34 bits became 17, 27% of the 64 of 32 each",
    ]
    text = print_graph(after)
    assert "channel_bits=s64 2 [11, 6]" in text
    assert parse(text, resources(after)) == after
    again = MinimizeAccumulators(Per.CHANNEL).run(after, PassContext(FPGA))
    assert again is after


def test_a_program_of_narrow_channels_is_saved_loaded_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = RangeAnalysis().run(parse(TEXT), PassContext())
    after, _ = minimized(graph, Per.CHANNEL)
    Program(after).save(tmp_path / "build")
    assert qir.load(tmp_path / "build").graph == after
    assert main(["check", str(tmp_path / "build")]) == 0
    assert "proved free of overflow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ([11, 5], "states channel_bits that are not proved"),
        ([10], "states channel_bits that are not proved"),
        ([11, 6, 6], "channel_bits are widths"),
        ([11, 65], "channel_bits are widths"),
        ([0, 11], "channel_bits are widths"),
        ([[11, 11]], "channel_bits are widths"),
        ([11.0, 11.0], "channel_bits are widths"),
        ([11, 6], ""),
        ([64, 12], ""),
        ([11], ""),
    ],
)
def test_channel_bits_are_held_to_the_proof(bits: list[Any], words: str) -> None:
    graph = RangeAnalysis().run(parse(TEXT), PassContext())
    stated = {"channel_bits": Array(np.array(bits))}
    found = find_faults(
        map_values(graph, lambda v: {}, attributes=lambda op: stated if isinstance(op, Accumulating) else {})
    )
    assert [words in str(d) for d in found] == ([True] if words else [])


def test_sums_that_no_accumulator_holds_stay() -> None:
    graph = parse("""
        graph @g stage=fixed (%x: Nx2 x u64) {
          %t = reduce_sum %x {accumulator=s64, overflow=saturate, order=khwc, axes=[1], keepdims=true} : Nx1 x s64
          %y = requantize %t {multiplier=s64 [1], shift=s64 [-60], form=shift, input_shift=0, rounding=floor,
            overflow=saturate} : Nx1 x s8
          return %y
        }""")
    assert minimized(graph, Per.CHANNEL)[0] is graph


def test_outputs_keep_their_type() -> None:
    graph = RangeAnalysis().run(parse(TEXT.replace("return %y", "return %y, %0")), PassContext())
    after, _ = minimized(graph)
    assert after is graph


def test_only_targets_of_free_widths() -> None:
    with pytest.raises(PassError, match='20 bits; state bits = "proved" in its table'):
        MinimizeAccumulators().run(parse(TEXT), PassContext(load_target("asic")))
    with pytest.raises(PassError, match="minimize-accumulators needs a target"):
        MinimizeAccumulators().run(parse(TEXT), PassContext())
    text = "minimize-accumulators{per=channel}"
    assert str(parse_pipeline(text)) == text
    assert MinimizeAccumulators().preserves_bits
