"""The conformance kit: what conforms passes it, and every kind of fault that is planted in a backend is named by it."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qir_chip20 import backend as chip

from qir.backend import Backend, shipped_backends
from qir.backends.kernels.kernel import Facts, interpreted
from qir.errors import ConformanceError, TargetError
from qir.fixed_point import Rounding, round_divide
from qir.interpreter import evaluate_op
from qir.ir import Graph, Op
from qir.target import Target
from qir.testing import Report, check_backend, golden_texts, replay
from qir.testing.border import nearest_float32, round_fraction
from qir.testing.maker import Widths, format_widths, width_pairs

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tests" / "plugin_package" / "src" / "qir_chip20" / "kernels.py"


def checks_of(report: Report) -> dict[str, int]:
    return {c.name.split()[0]: c.outputs for c in report.checks}


# What conforms


@pytest.mark.parametrize("name", shipped_backends())
def test_shipped_targets_conform(name: str) -> None:
    report = check_backend(name)
    counts = checks_of(report)
    assert counts.keys() == {
        *("contract", "sums", "requantize", "arithmetic", "activations", "other", "border", "default", "golden")
    }
    assert report.outputs > 500_000
    assert min(count for check, count in counts.items() if check != "contract") > 500
    assert report.own_kernels == ()
    integer = ("sums", "requantize", "activations", "border")  # of these no op may be left to floating point
    assert [c.notes for c in report.checks if c.name.startswith(integer) and c.notes] == []


def test_what_is_left_to_floating_point_is_said() -> None:
    notes = {c.name: c.notes for c in check_backend("tensorrt").checks}
    assert notes["arithmetic 8"] == ("as float islands: Add, Sub",)
    assert notes["other ops 8"] == ("as float islands: AveragePool, BatchNormalization, MatMul, Softmax",)


@pytest.fixture(scope="module")
def conforming() -> Report:
    return check_backend(chip)


def test_the_invented_chip_conforms_with_its_own_kernels(conforming: Report) -> None:
    assert conforming.own_kernels == ("chip20_conv2d", "chip20_matmul", "chip20_shift")
    used = {c.name: set(c.kernels) for c in conforming.checks}
    assert {"chip20_conv2d", "chip20_matmul", "chip20_shift"} <= used["sums 6x12"] & used["default pipeline"]
    notes = [note for c in conforming.checks for note in c.notes if "has no form" in note]
    assert notes == ["Softmax has no form (the target has no integer softmax)"]


def test_a_report_is_a_table(conforming: Report) -> None:
    head, own, empty, title, *rows = str(conforming).splitlines()
    assert head == f"chip20 conforms: {conforming.outputs:,} outputs compared, 0 differ"
    assert own == "kernels of its own: chip20_conv2d, chip20_matmul, chip20_shift"
    assert (empty, title.split()) == ("", ["check", "outputs", "kernels"])
    assert max(map(len, rows)) < 120
    assert next(r for r in rows if r.startswith("cost")).split()[1:4] == ["-", "multiplier", "cycles"]


def test_a_contract_alone_conforms(conforming: Report) -> None:
    report = check_backend(chip.target_file)
    assert report.backend == "chip20"
    assert report.own_kernels == ()
    assert checks_of(report).keys() == checks_of(conforming).keys() - {"kernels", "cost", "export"}
    shared = [c.outputs for c in conforming.checks][: len(report.checks)]
    assert [c.outputs for c in report.checks] == shared  # the same vectors


def test_another_seed_makes_other_vectors() -> None:
    assert check_backend(chip, seed=1).outputs != check_backend(chip, seed=2).outputs


def test_progress_counts_the_checks(conforming: Report) -> None:
    seen: list[tuple[str, int, int]] = []
    check_backend(chip.target_file, progress=lambda *step: seen.append(step))
    assert [name for name, _, _ in seen][:2] == ["contract", "sums 6x12"]
    assert [(place, total) for _, place, total in seen] == [(i, len(seen)) for i in range(len(seen))]


def test_of_many_widths_the_ends_and_the_default_are_run() -> None:
    assert width_pairs(chip.target()) == [Widths(6, 12)]
    pairs = width_pairs(Backend("fpga", ROOT / "backends" / "fpga" / "target.toml").target())
    low = min(p.activations for p in pairs)
    assert low <= 2
    assert pairs == [Widths(8, 16), Widths(1, low), Widths(1, 16), Widths(16, low), Widths(16, 16)]


def test_of_every_format_the_widest_weights_are_run() -> None:
    assert format_widths(chip.target()) == []
    fpga = Backend("fpga", ROOT / "backends" / "fpga" / "target.toml")
    assert list(map(str, format_widths(fpga.target()))) == ["5x16 power_of_two", "6x16 codebook"]
    found = {c.name: c.outputs for c in check_backend(fpga).checks if c.name.startswith("sums")}
    assert min(found[f"sums {widths}"] for widths in format_widths(fpga.target())) > 10_000


# Wrong kernels, planted in a copy of the chip's


def planted(folder: Path, *changes: tuple[str, str]) -> Backend:
    """The chip with a copy of its kernels in which these texts, each of which stands there once, are replaced."""
    text = KERNELS.read_text(encoding="utf-8")
    for right, wrong in changes:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    file = folder / "wrong_kernels.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_kernels", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return replace(chip, kernels=module.choose)


def caught(backend: Backend) -> dict[str, str]:
    """What the kit says of a backend, by check."""
    with pytest.raises(ConformanceError) as error:
        check_backend(backend)
    head, *faults = str(error.value).split("\n- ")
    assert head == "backend 'chip20' does not conform:"
    return {re.split("[:,]", fault)[0]: fault for fault in faults}


def test_a_kernel_that_saturates_once_is_caught(tmp_path: Path) -> None:
    faults = caught(
        planted(
            tmp_path,
            ("sums[o] = min(max(total, low), high)", "sums[o] = total"),
            ("out[p, o] = sums[o]", "out[p, o] = min(max(sums[o], low), high)"),
        )
    )
    assert faults.keys() == {"sums 6x12", "golden texts"}  # and nothing else: all the rest is right
    first, kernel, given, others = faults["sums 6x12"].split("\n")
    assert first.startswith("sums 6x12, chains of products: %y0.acc = matmul %x0, %k {accumulator=s20, ")
    assert re.fullmatch(
        r"  kernel chip20_matmul: expected -?\d+, found -?\d+ at \[\d+, \d+\]; \d+ of 169 differ", kernel
    )
    assert re.fullmatch(r"  for %x0\[\d+\] = \[(-?\d+, ){12}\.\.\. 23 in all\]", given)
    assert others.startswith("  so do: conv 3x3; ")
    assert "conv2d_saturate.qir" in faults["golden texts"]


def test_a_kernel_that_takes_ties_away_from_zero_is_caught(tmp_path: Path) -> None:
    faults = caught(planted(tmp_path, ("twice == whole and floor & 1", "twice == whole and floor >= 0")))
    assert faults.keys() >= {"sums 6x12", "requantize 12", "arithmetic 12", "activations 12", "golden texts"}
    first, kernel, given, others = faults["requantize 12"].split("\n")
    assert first.startswith("requantize 12, behind conv: %y0 = requantize %x0 {")
    assert "rounding=half_even" in first
    found = re.fullmatch(r"  kernel chip20_shift: expected (-?\d+), found (-?\d+) at .* of [\d,]+ differ", kernel)
    assert found is not None
    assert abs(int(found[1]) - int(found[2])) == 1
    assert re.fullmatch(r"  for %x0\[\d+, \d+\] = -?\d+", given)
    assert others == "  so do: behind matmul; behind mean; behind mul; behind add"
    assert "matmul on ties; conv on ties" in faults["sums 6x12"]


@pytest.mark.parametrize(
    ("changes", "check", "case"),
    [
        ([("sums[o] = start[o]", "sums[o] = 0")], "sums 6x12", "conv on ties"),
        ([("rows[p, k])", "rows[p, rows.shape[1] - 1 - k])")], "sums 6x12", "chains of products"),
        ([("windows[...] = 0", "pass")], "sums 6x12", "conv 1x5 on a row"),
        ([("slice(group * per_group,", "slice(0,"), ("(group + 1) * per_g", "per_g")], "sums 6x12", "depthwise 3x3"),
        # Kernels that take ops which are not theirs
        ([(" and op.order is Order.BIAS_KHWC", "")], "golden texts", "conv2d_order_ckhw.qir"),
        ([(" or op.rounding is not Rounding.HALF_EVEN", "")], "golden texts", "requantize_shift.qir"),
        ([(" and not zero_array(v.type.element).any()", "")], "golden texts", "sums_of_centred.qir"),
    ],
)
def test_other_wrong_kernels_are_caught(tmp_path: Path, changes: list[tuple[str, str]], check: str, case: str) -> None:
    assert case in caught(planted(tmp_path, *changes))[check]


# Faults around the kernels


def fails(backend: Backend, message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        check_backend(backend)


def test_kernels_that_take_nothing_are_not_checked_and_so_refused() -> None:
    fails(replace(chip, kernels=lambda op, facts: None), "- kernels: .* took no op of any check")


def test_a_chooser_that_fails_is_named() -> None:
    def choose(op: Op, facts: Facts) -> Any:
        raise KeyError("weights")

    fails(replace(chip, kernels=choose), "TargetError: backend 'chip20' failed to choose a kernel for .*: 'weights'")


def test_a_chooser_that_gives_no_kernel_is_named() -> None:
    fails(replace(chip, kernels=lambda op, facts: "fast"), "backend 'chip20' gave 'fast' for .*, which is no Kernel")


def test_a_kernel_that_fails_is_named() -> None:
    def choose(op: Op, facts: Facts) -> Any:
        def bind(*arrays: Any) -> Callable[[], None]:
            raise IndexError("out of scratch")

        return replace(interpreted(op), bind=bind) if op.mnemonic == "max_pool2d" else None

    fails(replace(chip, kernels=choose), "- other ops 12, MaxPool: IndexError: out of scratch")


def test_a_kernel_that_adds_to_what_its_output_held_is_caught() -> None:
    def choose(op: Op, facts: Facts) -> Any:
        def bind(inputs: Any, output: Any, scratch: Any) -> Callable[[], None]:
            def call() -> None:
                output[...] += evaluate_op(op, inputs)[0]

            output[...] = 0
            return call

        return replace(interpreted(op), bind=bind) if op.mnemonic == "max_pool2d" else None

    fails(replace(chip, kernels=choose), "(?s)- other ops 12, MaxPool: .* expected ")


@pytest.mark.parametrize("parts", [{}, {"cycles": math.nan}, {"cycles": 1.0, "bytes": -1.0}, {"cycles": math.inf}])
def test_costs_are_finite_and_not_negative(parts: Mapping[str, float]) -> None:
    fails(replace(chip, kernels=None, cost=lambda graph, target: parts), "- cost: costs are finite and not negative")


def test_an_exporter_writes_something() -> None:
    fails(replace(chip, kernels=None, export=lambda graph, folder: None), "- export: export wrote nothing")


def test_what_an_exporter_and_a_cost_raise_is_a_fault() -> None:
    def cost(graph: Graph, target: Target) -> Mapping[str, float]:
        raise ZeroDivisionError("no multipliers")

    def export(graph: Graph, folder: Path) -> None:
        (folder / "missing" / "weights.h").write_text("")

    fails(
        replace(chip, kernels=None, cost=cost, export=export), "(?s)- cost: ZeroDivisionError.*- export: FileNotFound"
    )


def test_there_must_be_such_a_backend() -> None:
    with pytest.raises(TargetError, match="unknown target 'chip21'"):
        check_backend("chip21")


# The parts of the kit


@pytest.mark.parametrize("rounding", Rounding)
def test_fractions_round_as_integers_do(rounding: Rounding) -> None:
    for numerator in range(-40, 41):
        assert round_fraction(Fraction(numerator, 8), rounding) == round_divide(numerator, 8, rounding)


def test_the_nearest_float32_of_a_fraction() -> None:
    step = Fraction(1, 1 << 23)
    assert nearest_float32(1 + step / 2) == np.float32(1)
    assert nearest_float32(1 + step * 3 / 2) == np.float32(1 + 2 * step)
    assert nearest_float32(1 + step / 2 + Fraction(1, 1 << 90)) == np.float32(1 + step)  # rounded twice it is 1
    assert nearest_float32(Fraction(10) ** 40) == np.inf


def test_golden_texts_ship_with_the_package() -> None:
    assert golden_texts().keys() == {p.name for p in (ROOT / "tests" / "golden" / "run").iterdir()}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("// run: x=[3] -> y=[3]", r"@g, interpreter, x=\[3\]: y: expected 3, found 4 at \[0\]; 1 of 1 differ"),
        ("// run: x=[1] -> y=[2]\n// run: x=[3, 5] -> y=[4, 7]", r"x=\[3, 5\]: y: expected 7, found 6 at \[1\]"),
        ("// run: x=[1, 2] -> y=[2]", r"1 numbers, \[2\], do not fill \[2\] of %y"),
        ("// run: x=[1] -> z=[2]", r"the inputs are \['x'\] and the outputs \['y'\]"),
        ("// run: -> y=[2]", r"the inputs are \['x'\] and the outputs \['y'\]"),
        ("// ran: x=[1] -> y=[2]", "has a line `// run: "),
    ],
)
def test_a_run_that_is_not_so_is_refused(lines: str, message: str) -> None:
    graph = """
    graph @g stage=fixed (%x: N x s8) {
      %one = const {value=s8 1 [1]} : 1 x s8
      %y = add %x, %one {overflow=saturate} : N x s8
      return %y
    }
    """
    with pytest.raises(ConformanceError, match=message):
        replay(f"{graph}\n{lines}\n")
