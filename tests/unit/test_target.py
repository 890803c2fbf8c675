"""Contracts: the targets that ship, inheritance, and every refusal with its line in the user's file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from contract_files import case, child, marked_line, reached, refusal

import qir.target
from qir.backend import load_target, shipped_backends
from qir.cost_tables import CostRule
from qir.errors import TargetError
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.ops.accumulate import Order
from qir.ops.fixed_rescale import QuantizeRule
from qir.target import (
    AverageRule,
    FunctionRule,
    Granularity,
    ProductRule,
    Requantizer,
    Scales,
    Scheme,
    SumRule,
    Target,
    WeightFormat,
    Width,
)
from qir.target_file import parse_target
from qir.types import BINARY, integer

SHIPPED = sorted(shipped_backends())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, name: str = "mine.toml") -> Target:
    Path(name).write_text(text, encoding="utf-8")
    return load_target(name)


# The targets that ship


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_prints_as_toml_that_reads_back_equal(name: str) -> None:
    target = load_target(name)
    text = str(target)
    assert target.name == name
    assert parse_target(text) == target
    assert str(parse_target(text)) == text


#: What a name promises, by the path of a field: facts of the hardware or the runtime, not the whole file.
PROMISES: dict[str, dict[str, Any]] = {
    "arm-neon": {
        "activations.scheme": Scheme.AFFINE,
        "weights.conv": Granularity.PER_CHANNEL,
        "weights.matmul": Granularity.PER_TENSOR,
        "accumulator.bits": 32,
        "requantization.form": RequantizeForm.DOUBLE_ROUND,
        "addition.rule": SumRule.COMMON_SCALE,
        "addition.left_shift": 20,
        "pooling.rounding": Rounding.HALF_AWAY,
        "functions.rule": FunctionRule.TENSORFLOW_LITE,
    },
    "arm-neon-16x8": {
        "activations.bits": (16,),
        "activations.scheme": Scheme.SYMMETRIC,
        "weights.bits": (8,),
        "accumulator.bits": 64,
        "requantization.conv.form": RequantizeForm.REDUCED_16,
        "requantization.form": RequantizeForm.DOUBLE_ROUND,
        "addition.left_shift": 15,
    },
    "arm-neon-single-round": {"requantization.form": RequantizeForm.SINGLE_ROUND},
    "arm-neon-symmetric": {"activations.scheme": Scheme.SYMMETRIC},
    "arm-neon-xnnpack": {
        "requantization.form": RequantizeForm.FLOAT32,
        "requantization.reciprocal": False,
        "addition.rule": SumRule.MULTIPLIERS,
    },
    "arm-qnnpack": {
        "activations.signed": False,
        "weights.conv": Granularity.PER_TENSOR,
        "requantization.reciprocal": True,
        "input.rule": QuantizeRule.RECIPROCAL,
    },
    "asic": {
        "accumulator.bits": 20,
        "accumulator.overflow": Overflow.SATURATE_SYMMETRIC,
        "accumulator.rounding": Rounding.FLOOR,
        "requantization.rounding": Rounding.HALF_EVEN,
        "requantization.overflow": Overflow.SATURATE_SYMMETRIC,
        "activations.default": 8,
    },
    "cortex-m": {"floating_point": False, "requantization.form": RequantizeForm.DOUBLE_ROUND},
    "dsp16": {
        "activations.scales": Scales.POWER_OF_TWO,
        "product.shift": 1,  # L_mult doubles,
        "product.bits": 32,  # and saturates
        "product.overflow": Overflow.SATURATE,
        "accumulator.bits": 32,
        "accumulator.overflow": Overflow.SATURATE,
        "accumulator.guard_bits": 0,  # so that every L_mac saturates
        "accumulator.wider": (40,),  # L40_add
        "accumulator.order": Order.BIAS_KHWC,
        "requantization.rounding": Rounding.HALF_UP,  # round_fx
    },
    "dsp16-acc40": {
        "accumulator.bits": 32,
        "accumulator.guard_bits": 8,
        "product.bits": Width.EXACT,
        "product.shift": 1,
    },
    "fpga": {
        "accumulator.bits": Width.PROVED,
        "requantization.rounding": Rounding.FLOOR,  # AP_TRN
        "requantization.overflow": Overflow.WRAP,  # AP_WRAP
        "weights.scales": Scales.POWER_OF_TWO,
        "weights.bits": tuple(range(1, 17)),
        "weights.formats": tuple(WeightFormat),
        "floating_point": False,
    },
    "onnxruntime": {
        "activations.signed": True,
        "activations.scheme": Scheme.AFFINE,
        "requantization.form": RequantizeForm.FLOAT32,
        "addition.rule": SumRule.FLOAT32,
        "multiplication.rule": ProductRule.FLOAT32,
    },
    "tensorrt": {
        "activations.scheme": Scheme.SYMMETRIC,
        "weights.matmul": Granularity.PER_CHANNEL,
        "requantization.form": RequantizeForm.FLOAT32,
        "requantization.reciprocal": False,
        "input.rule": QuantizeRule.DIVIDE,
        "input.rounding": Rounding.HALF_EVEN,
        "weight_only.bits": (4,),
    },
    "x86-fbgemm": {"activations.signed": False, "activations.reduce_range": True, "weights.narrow_range": False},
}


def test_every_shipped_name_promises_something() -> None:
    assert sorted(PROMISES) == SHIPPED


def at(item: Any, path: str) -> Any:
    for name in path.split("."):
        item = getattr(item, name)
    return item


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_states_what_its_name_promises(name: str) -> None:
    target = load_target(name)
    assert {path: at(target, path) for path in PROMISES[name]} == PROMISES[name]


@pytest.mark.parametrize(
    ("name", "activations", "weights"),
    [
        ("arm-neon", (-128, 127), (-127, 127)),
        ("tensorrt", (-128, 127), (-127, 127)),
        ("x86-fbgemm", (0, 127), (-128, 127)),
        ("arm-qnnpack", (0, 255), (-128, 127)),
    ],
)
def test_integers_of_8_bits(name: str, activations: tuple[int, int], weights: tuple[int, int]) -> None:
    target = load_target(name)
    stored = [item.storage(8) for item in (target.activations, target.weights)]
    assert [(kind.lo, kind.hi) for kind in stored] == [activations, weights]


def test_no_16_bit_lane_saturates_on_fbgemm() -> None:
    target = load_target("x86-fbgemm")
    x, w = target.activations.storage(8), target.weights.storage(8)
    assert 2 * x.hi * -w.lo == 32512 < 1 << 15
    assert 2 * load_target("arm-qnnpack").activations.storage(8).hi * -w.lo >= 1 << 15


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        *(("arm-neon-16x8", "arm-neon"), ("arm-neon-single-round", "arm-neon"), ("arm-neon-symmetric", "arm-neon")),
        *(("arm-neon-xnnpack", "arm-neon"), ("cortex-m", "arm-neon"), ("arm-qnnpack", "x86-fbgemm")),
        *(("dsp16-acc40", "dsp16"), ("asic", "fpga"), ("onnxruntime", "tensorrt")),
    ],
)
def test_a_shipped_variant_inherits(name: str, parent: str) -> None:
    assert f'\ninherits = "{parent}"\n' in shipped_backends()[name].target_file.read_text(encoding="utf-8")


def test_costs() -> None:
    assert load_target("arm-neon-16x8").costs.of_mac(8, 16) == 1.0
    fpga = load_target("fpga").costs
    assert fpga.rule is CostRule.BIT_OPERATIONS
    assert [fpga.of_mac(8, 8), fpga.of_mac(2, 16), fpga.of_mac(16, 16)] == [1.0, 0.5, 4.0]


def test_kinds_of_ops_without_a_formula_of_their_own_take_the_general_one() -> None:
    requantization = load_target("arm-neon-16x8").requantization
    assert requantization.of("conv") == Requantizer(RequantizeForm.REDUCED_16)
    assert requantization.of("mean").form is RequantizeForm.DOUBLE_ROUND
    assert {key for key, _ in requantization.each()} == {"", "conv.", "matmul."}


def test_formats_of_weights_and_their_widths(here: Path) -> None:
    weights = load_target("asic").weights
    assert [weights.widths(item) for item in WeightFormat] == [tuple(range(1, 17)), (2, 3, 4, 5), (1, 2, 3, 4, 5, 6)]
    assert weights.formats_of(4) == tuple(WeightFormat)
    assert weights.formats_of(1) == (WeightFormat.UNIFORM, WeightFormat.CODEBOOK)
    assert weights.formats_of(8) == (WeightFormat.UNIFORM,)
    assert load_target("arm-neon").weights.formats_of(4) == ()
    few = load(child("asic", "[weights]", "bits = [3, 8]", 'formats = ["uniform", "power_of_two"]')).weights
    assert [few.formats_of(b) for b in (3, 4, 8)] == [
        (WeightFormat.UNIFORM, WeightFormat.POWER_OF_TWO),
        (),
        (WeightFormat.UNIFORM,),
    ]


def test_symmetric_weights_of_1_bit_are_binary(here: Path) -> None:
    assert load_target("fpga").weights.storage(1) == BINARY
    assert load(child("fpga", "[weights]", "narrow_range = true")).weights.storage(1) == BINARY
    lines = ["[weights]", "bits = [1, 8]", 'scheme = "affine"', "narrow_range = false"]
    affine = load(child("arm-neon", *lines, "[costs.mac]", '"1x8" = 1')).weights
    assert affine.storage(1) == integer(1)


# Inheritance


def test_a_variant_is_three_lines(here: Path) -> None:
    parent, target = load_target("dsp16"), load(child("dsp16"))
    assert (target.name, target.description) == ("mine", "a chip")
    assert str(target).splitlines()[2:] == str(parent).splitlines()[2:]


def test_tables_merge_key_by_key_and_all_else_is_replaced(here: Path) -> None:
    target = load(
        child("dsp16", "[accumulator]", "bits = 24", "[weights]", "bits = [8, 16]", "[costs.mac]", '"8x16" = 2')
    )
    assert (target.accumulator.bits, target.accumulator.overflow) == (24, Overflow.SATURATE)
    assert target.weights.bits == (8, 16)
    assert target.weights.scales is Scales.POWER_OF_TWO
    assert target.costs.mac == {"16x16": 1.0, "8x16": 2.0}


def test_a_chain_of_paths_each_from_its_own_file(here: Path) -> None:
    Path("shared/base").mkdir(parents=True)
    load(child("dsp16-acc40", "[accumulator]", "guard_bits = 4"), "shared/base/wide.toml")
    load(child("base/wide.toml", "[memory]", "data = 10"), "shared/middle.toml")
    target = load(child("shared/middle.toml", "floating_point = true"))
    assert (target.accumulator.guard_bits, target.memory["data"], target.floating_point) == (4, 10, True)
    assert target.product.bits is Width.EXACT
    assert load_target(here / "mine.toml") == target


def test_the_word_none_takes_an_inherited_field_away(here: Path) -> None:
    target = load(child("asic", "[accumulator]", 'bits = "proved"', 'rounding = "none"'))
    assert target.accumulator.rounding is None
    target = load(child("arm-neon", "[pooling]", 'average = "float32"', 'rounding = "none"'))
    assert target.pooling.average is AverageRule.FLOAT32
    target = load(child("tensorrt", 'weight_only = "none"'))
    assert target.weight_only is None
    target = load(child("arm-neon-16x8", "[requantization]", 'conv = "none"', 'matmul = "none"', 'form = "float32"',
                        "[addition]", 'rule = "float32"'))  # fmt: skip
    assert [key for key, _ in target.requantization.each()] == [""]
    target = load(
        child(
            "arm-neon",
            "[costs]",
            'rule = "bit_operations"',
            *(f'{n} = "none"' for n in ("mac", "macs_per_cycle", "mac_energy")),
        )
    )
    assert target.costs.mac == {}
    assert parse_target(str(target)) == target


def test_a_description_of_any_text_reads_back(here: Path) -> None:
    target = load(child("dsp16").replace("a chip", r"\"quoted\", C:\\chip,\ttab\nline \u007f é"))
    assert target.description == '"quoted", C:\\chip,\ttab\nline \x7f é'
    assert parse_target(str(target)) == target


# Refusals. Each case marks the line that the message must name by `# here`.


def check(text: str, message: str) -> None:
    line, found = refusal(text)
    assert (line, found[: len(message)]) == (marked_line(text), message)


def whole(replace: Iterable[tuple[str, str]] = ()) -> str:
    """The printed contract of dsp16, with lines replaced."""
    text = str(load_target("dsp16"))
    for old, new in replace:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


SCHEMA: dict[str, tuple[str, str]] = {
    "unknown field": (
        child("dsp16", "floating_pointt = true  # here"),
        "floating_pointt: unknown field; the fields here are name, description, floating_point, activations, ",
    ),
    "unknown field of a table": (
        child("dsp16", "[accumulator]", "bit = 24  # here"),
        "accumulator.bit: unknown field; the fields here are bits, overflow, order, guard_bits, rounding, wider",
    ),
    "unknown field of a table in a table": (
        child("dsp16", "[requantization.conv]", 'form = "shift"', "  round = 1  # here"),
        "requantization.conv.round: unknown field; the fields here are form, rounding, reciprocal",
    ),
    "unknown table": (child("dsp16", "[acumulator]  # here", "bits = 24"), "acumulator: unknown field"),
    "a field of a table in another": (
        child("dsp16", "[accumulator]", "bits = 24", "[addition]", "bits = 24  # here"),
        "addition.bits: unknown field",
    ),
    "wrong type": (child("dsp16", "[product]", 'shift = "1"  # here'), "product.shift: expected int, found '1'"),
    "a number for a truth value": (
        child("dsp16", "floating_point = 0  # here"),
        "floating_point: expected bool, found 0",
    ),
    "a truth value for a number": (
        child("dsp16", "bias_bits = true  # here"),
        "bias_bits: expected int, found True",
    ),
    "a fraction for a number": (child("dsp16", "bias_bits = 8.0  # here"), "bias_bits: expected int, found 8.0"),
    "wrong type in a list": (
        child("dsp16", "[weights]", 'bits = [16, "8"]  # here'),
        "weights.bits: expected int, found '8'",
    ),
    "no list": (child("dsp16", "[weights]", "bits = 16  # here"), "weights.bits: expected a list"),
    "a list of lists": (child("dsp16", "[weights]", "bits = [[16]]  # here"), "weights.bits: expected int, found [16]"),
    "no table": (child("dsp16", "accumulator = 24  # here"), "accumulator: expected a table"),
    "an array of tables": (child("dsp16", "[[memory]]  # here", "data = 1"), "memory: expected a table"),
    "a list for a table": (child("dsp16", "memory = [1]  # here"), "memory: expected a table"),
    "wrong type in a table of numbers": (
        child("dsp16", "[memory]", 'data = "64k"  # here'),
        "memory.data: expected int, found '64k'",
    ),
    "a text for a cost": (
        child("dsp16", "[costs.mac]", '"16x16" = "1"  # here'),
        "costs.mac.16x16: expected float, found '1'",
    ),
    "unknown word": (
        child("dsp16", "[accumulator]", 'overflow = "clamp"  # here'),
        "accumulator.overflow: 'clamp' is not one of wrap, saturate, none, saturate_zero, saturate_symmetric",
    ),
    "a list for a word": (
        child("dsp16", "[activations]", 'scheme = ["affine"]  # here'),
        "activations.scheme: ['affine'] is not one of affine, symmetric",
    ),
    "a number for a word": (
        child("dsp16", "[input]", "rule = 1  # here"),
        "input.rule: 1 is not one of divide, reciprocal",
    ),
    "an unknown word where a number may stand": (
        child("dsp16", "[accumulator]", 'bits = "wide"  # here'),
        "accumulator.bits: 'wide' is neither a number nor one of exact, proved, accumulator",
    ),
    "a list where a number or a word may stand": (
        child("dsp16", "[accumulator]", "bits = [24]  # here"),
        "accumulator.bits: expected int, found [24]",
    ),
    "none where a field must be": (
        child("dsp16", "[accumulator]", 'order = "none"  # here'),
        "accumulator.order: 'none' is not one of khwc, bias_khwc, ckhw, bias_ckhw",
    ),
    "inherits no name": (
        'name = "mine"\ndescription = "a chip"\n\ninherits = ["dsp16"]  # here\n',
        "inherits: expected the name of a target, or the path of a .toml file",
    ),
    "inherits an unknown name": (
        child("dsp61").replace('"dsp61"', '"dsp61"  # here'),
        "inherits: unknown target 'dsp61'; there are: arm-neon, ",
    ),
    "inherits a file that is not there": (
        child("gone.toml").replace('"gone.toml"', '"gone.toml"  # here'),
        "inherits: cannot read target gone.toml: No such file or directory",
    ),
    "no name of its own": (
        '# A file.\ndescription = "a chip"\ninherits = "dsp16"  # here\n',
        "inherits: a target that inherits needs a name of its own",
    ),
    "no description of its own": (
        'inherits = "dsp16"  # here\nname = "mine"\n',
        "inherits: a target that inherits needs a description of its own",
    ),
    "inherits itself": (
        child("mine.toml").replace('"mine.toml"', '"mine.toml"  # here'),
        "inherits: 'mine.toml' inherits from this target in turn",
    ),
    "a field missing in a table": (
        whole([("[accumulator]", "[accumulator]  # here"), ('order = "bias_khwc"\n', "")]),
        "accumulator.order: this field is missing",
    ),
    "a field missing": (
        whole([('name = "dsp16"\n', 'name = "dsp16"  # here\n'), ("floating_point = false\n", "")]),
        "floating_point: this field is missing",
    ),
    "a table missing": (
        whole(
            [
                ('name = "dsp16"\n', 'name = "dsp16"  # here\n'),
                ('[pooling]\naverage = "integer"\nrounding = "half_up"\n', ""),
            ]
        ),
        "pooling: this field is missing",
    ),
    "a dotted key": (
        child("dsp16", "floating_point = false", 'accumulator.bits = "24"  # here'),
        "accumulator.bits: '24' is neither a number nor one of exact, proved, accumulator",
    ),
    "a dotted table of dotted keys": (
        child("dsp16", "[requantization]", 'conv.form = "shift"', 'conv . "rounding" = "up"  # here'),
        "requantization.conv.rounding: 'up' is not one of",
    ),
    "a key of an inline table": (
        child("dsp16", "bias_bits = 16", 'accumulator = { bits = "24" }  # here'),
        "accumulator.bits: '24' is neither a number nor one of exact, proved, accumulator",
    ),
    "a quoted header with a comment": (
        child("dsp16", "[accumulator]", "bits = 32", '[ costs . "mac" ] # of each pair', "'16x16' = false # here"),
        "costs.mac.16x16: expected float, found False",
    ),
}


@pytest.mark.parametrize("case", SCHEMA)
def test_a_file_that_is_no_contract(case: str, here: Path) -> None:
    check(*SCHEMA[case])


def test_a_cycle_of_two(here: Path) -> None:
    Path("other.toml").write_text(child("mine.toml"))
    Path("mine.toml").write_text(child("other.toml"))
    with pytest.raises(TargetError) as caught:
        load_target("mine.toml")
    assert str(caught.value) == "other.toml:3: inherits: 'mine.toml' inherits from this target in turn"


def test_a_fault_of_the_parent_is_reported_where_it_stands(here: Path) -> None:
    Path("base.toml").write_text(child("dsp16", "", "[accumulator]", "bitz = 3"))
    Path("mine.toml").write_text(child("base.toml"))
    with pytest.raises(TargetError, match=r"^base\.toml:6: accumulator\.bitz: unknown field"):
        load_target("mine.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'name = "mine"\nbits = = 3\n', "mine.toml: not TOML: Invalid value (at line 2, column 8)"),
        (b"[a]\n[a]\n", "mine.toml: not TOML: Cannot declare ('a',) twice (at line 2, column 3)"),
        (b'name = "\xff"\n', "cannot read target mine.toml: it is not UTF-8 text"),
        (b"", "mine.toml:1: name: this field is missing"),
    ],
)
def test_a_file_that_is_no_toml(content: bytes, message: str, here: Path) -> None:
    Path("mine.toml").write_bytes(content)
    with pytest.raises(TargetError) as caught:
        load_target("mine.toml")
    assert str(caught.value) == message


def test_a_shipped_backend_describes_the_target_of_its_name(here: Path) -> None:
    load(child("dsp16"))
    backend = qir.Backend("other", here / "mine.toml")
    with pytest.raises(TargetError, match="describes 'mine', but is installed as 'other'"):
        backend.target()


WIDE = ["[activations]", "bits = [16]", '[requantization]\nform = "single_round"', "[costs.mac]", '"8x16" = 1']
NOT_STATED = ": none is what a proof says; state what the chip does"

CONTRADICTIONS: dict[str, tuple[str, str]] = {
    "no width": (case("dsp16", "[weights]", "bits = []  # here"), "weights.bits: at least one width must be listed"),
    "too wide": (
        case("dsp16", "[activations]", "bits = [16, 17]  # here"),
        "activations.bits: widths of 1 to 16 bits are supported, not 17",
    ),
    "no bits": (
        case("dsp16", "[weights]", "bits = [0]  # here"),
        "weights.bits: widths of 1 to 16 bits are supported, not 0",
    ),
    "narrow and unsigned": (
        case("x86-fbgemm", "[activations]", "narrow_range = true  # here"),
        "activations.narrow_range: only signed integers have a narrow range",
    ),
    "one integer": (
        case(
            "fpga", "[activations]", "bits = [2]  # here", "default = 2", "narrow_range = true", "reduce_range = true"
        ),
        "activations.bits: a width of 2 leaves but the integer 0; allow a wider range",
    ),
    "nothing positive": (
        case("fpga", "[activations]", "bits = [1, 2]  # here", "default = 2"),
        "activations.bits: a width of 1 leaves nothing above zero; allow a wider range",
    ),
    "default that is no width": (
        case("asic", "[weights]", "default = 17  # here"),
        "weights.default: 17 is none of the widths [1, 2, 3, ",
    ),
    "zero points of powers of two": (
        case("fpga", "[activations]", 'scheme = "affine"  # here'),
        "activations.scheme: power_of_two scales have no zero point; use scheme = symmetric",
    ),
    "unsigned weights": (
        case("arm-neon", "[weights]  # here", "signed = false", "narrow_range = false"),
        "weights.scheme: unsigned weights need a zero point; use scheme = affine",
    ),
    "no uniform weights": (
        case("fpga", "[weights]", 'formats = ["codebook"]  # here'),
        "weights.formats: uniform must be among them: weights have it where nothing asks for another",
    ),
    "levels with a zero point": (
        case("arm-neon", "[weights]", 'scheme = "affine"', 'formats = ["uniform", "power_of_two"]  # here'),
        "weights.formats: only uniform weights have zero points or leave a bit out; use scheme = symmetric without ",
    ),
    "levels with a bit left out": (
        case("fpga", "[weights]  # here", "bits = [4, 8]", "reduce_range = true"),
        "weights.formats: only uniform weights have zero points or leave a bit out; use scheme = symmetric without ",
    ),
    "binary weights with a bit left out": (
        case("dsp16", "[weights]", "bits = [1, 16]  # here", "reduce_range = true"),
        "weights.bits: a width of 1 leaves nothing above zero; allow a wider range",
    ),
    "an unknown format": (
        case("fpga", "[weights]", 'formats = ["uniform", "ternary"]  # here'),
        "weights.formats: 'ternary' is not one of uniform, power_of_two, codebook",
    ),
    "levels that are too wide for the costs": (
        case(
            "fpga",
            "[weights]\nbits = [4]\ndefault = 4",
            "[activations]\nbits = [4]\ndefault = 4",
            "[costs.fabric.dsp]  # here",
            '"8x8" = "none"',
            '"16x16" = "none"',
        ),
        'costs.fabric.dsp: "8x4" is missing, the cost of levels of weights of 8 bits times activations of 4',
    ),
    "a proved product": (
        case("dsp16", "[product]", 'bits = "proved"  # here'),
        "product.bits: a product has 1 to 64 bits, or is exact or cast to the accumulator",
    ),
    "a product too wide": (
        case("dsp16", "[product]", "bits = 65  # here"),
        "product.bits: a product has 1 to 64 bits, or is exact or cast to the accumulator",
    ),
    "products that claim a proof": (
        case("dsp16", "[product]", 'overflow = "none"  # here'),
        f"product.overflow{NOT_STATED}",
    ),
    "a product shifted right": (
        case("dsp16", "[product]", "shift = -1  # here"),
        "product.shift: a product is shifted left by 0 to 16 bits",
    ),
    "sums that claim a proof": (
        case("dsp16", "[accumulator]", 'overflow = "none"  # here'),
        f"accumulator.overflow{NOT_STATED}",
    ),
    "an accumulator of a product's width": (
        case("dsp16", "[accumulator]", 'bits = "exact"  # here'),
        "accumulator.bits: an accumulator has 2 to 64 bits, or is proved, not exact",
    ),
    "guard bits of a proved width": (
        case("fpga", "[accumulator]", "guard_bits = 8  # here"),
        "accumulator.guard_bits: an accumulator of the proved width needs none",
    ),
    "an accumulator too wide": (
        case("dsp16", "[accumulator]", "bits = 60", "guard_bits = 5  # here"),
        "accumulator.guard_bits: at most 64 bits with those of the accumulator, and not 5",
    ),
    "an accumulator of one bit": (
        case("dsp16", "[accumulator]", "bits = 1  # here"),
        "accumulator.bits: an accumulator has 2 to 64 bits, not 1",
    ),
    "further widths of a proved width": (
        case("fpga", "[accumulator]", "wider = [64]  # here"),
        "accumulator.wider: an accumulator of the proved width is as wide as it need be",
    ),
    "a further width that is none": (
        case("dsp16-acc40", "[accumulator]", "wider = [40, 64]  # here"),
        "accumulator.wider: further widths ascend from the accumulator's 40 bits to 64 at most, and [40, 64] do not",
    ),
    "further widths that descend": (
        case("dsp16", "[accumulator]", "wider = [64, 40]  # here"),
        "accumulator.wider: further widths ascend from the accumulator's 32 bits to 64 at most, and [64, 40] do not",
    ),
    "a further width too wide": (
        case("dsp16", "[accumulator]", "wider = [40, 80]  # here"),
        "accumulator.wider: further widths ascend from the accumulator's 32 bits to 64 at most, and [40, 80] do not",
    ),
    "rounded sums with guard bits": (
        case("dsp16-acc40", "[accumulator]", 'rounding = "floor"  # here'),
        "accumulator.rounding: an accumulator of guard bits or of the proved width keeps all fraction bits",
    ),
    "rounded sums of the proved width": (
        case("asic", "[accumulator]  # here", 'bits = "proved"'),
        "accumulator.rounding: an accumulator of guard bits or of the proved width keeps all fraction bits",
    ),
    "the reciprocal of integers": (
        case("arm-neon", "[requantization]", "reciprocal = true  # here"),
        "requantization.reciprocal: only the factor of form = float32 may be by the reciprocal",
    ),
    "a shift without rounding": (
        case("dsp16", "[requantization.add]  # here", 'form = "shift"'),
        "requantization.add.rounding: a rounding belongs to form = shift, and only to it",
    ),
    "a rounding of another form": (
        case("dsp16", "[requantization]  # here", 'form = "single_round"'),
        "requantization.rounding: a rounding belongs to form = shift, and only to it",
    ),
    "results that claim a proof": (
        case("dsp16", "[requantization]", 'overflow = "none"  # here'),
        f"requantization.overflow{NOT_STATED}",
    ),
    "a large left shift": (
        case("arm-neon", "[addition]", "left_shift = 21  # here"),
        "addition.left_shift: a common scale is at a left shift of 0 to 20 bits",
    ),
    "averages of integers without rounding": (
        case("tensorrt", "[pooling]  # here", 'average = "integer"'),
        "pooling.rounding: a rounding belongs to average = integer, and only to it",
    ),
    "a rounding of real averages": (
        case("arm-neon", "[pooling]  # here", 'average = "float32"'),
        "pooling.rounding: a rounding belongs to average = integer, and only to it",
    ),
    "a table too large": (
        case("dsp16", "[functions]", "index_bits = 17  # here"),
        "functions.index_bits: a table has an index of 2 to 16 bits",
    ),
    "another table of TensorFlow Lite": (
        case("arm-neon", "[functions]", "index_bits = 10  # here"),
        "functions.index_bits: the algorithms of TensorFlow Lite fill tables of 8-bit operands",
    ),
    "weights alone of 8 bits": (
        case("tensorrt", "[weight_only]", "bits = [8]  # here"),
        "weight_only.bits: weights alone are quantized to [4] bits, not [8]",
    ),
    "an empty block": (
        case("tensorrt", "[weight_only]", "block = 0  # here"),
        "weight_only.block: a block has at least one weight",
    ),
    "a table of costs for a rule": (
        case("fpga", "[costs.mac]  # here", '"8x8" = 1'),
        "costs.mac: a table belongs to rule = table",
    ),
    "a cost of no pair": (
        case("dsp16", "[costs.mac]", '"8*8" = 1  # here'),
        'costs.mac.8*8: a cost is that of bits of weight and activation, such as "8x16"',
    ),
    "a negative cost": (
        case("dsp16", "[costs.mac]", '"16x16" = -1  # here'),
        "costs.mac.16x16: a cost is finite and not negative, not -1.0",
    ),
    "a cost that is no number": (
        case("dsp16", "[costs.mac]", '"16x16" = nan  # here'),
        "costs.mac.16x16: a cost is finite and not negative, not nan",
    ),
    "a missing cost": (
        case("dsp16", "[weights]", "bits = [8, 16]"),
        'costs.mac: "8x16" is missing, the cost of weights of 8 bits times activations of 16',
    ),
    "a bias wider than the accumulator": (
        case("dsp16", "bias_bits = 33  # here"),
        "bias_bits: a bias has 2 bits or more and is no wider than the accumulator",
    ),
    "an accumulator as narrow as activations": (
        case("dsp16", "[accumulator]", "bits = 17  # here"),
        "accumulator.bits: 17 bits hold no sums of activations of 16 bits",
    ),
    "a form of 32 bits on more": (
        case("arm-neon", "[accumulator]", "bits = 33"),
        "requantization.form: double_round takes 32 bits, the accumulator has 33",
    ),
    "a form of 32 bits of a kind": (
        case("fpga", "[requantization.conv]", 'form = "neon"  # here'),
        "requantization.conv.form: neon takes 32 bits, the accumulator has proved",
    ),
    "a product cast to what is to be proved": (
        case("fpga", "[product]", 'bits = "accumulator"  # here'),
        "product.bits: a product cannot be cast to an accumulator whose width is to be proved",
    ),
    "narrowed products of a proved sum": (
        case("fpga", "[product]  # here", "bits = 16"),
        "product.overflow: an accumulator of the proved width takes products that are exact or wrap",
    ),
    "a width of both kinds": (
        case("tensorrt", "[weights]", "bits = [4, 8]", "[costs.mac]", '"4x8" = 1'),
        "weight_only.bits: a width is either for integer products or for weights alone",
    ),
    "a reduced range that wraps": (
        case("fpga", "[activations]", "bits = [16]", "reduce_range = true  # here"),
        "activations.reduce_range: results that wrap use all of their bits",
    ),
    "a narrow range that wraps": (
        case("fpga", "[activations]", "narrow_range = true  # here"),
        "activations.narrow_range: results that wrap use all of their bits",
    ),
    "a memory of nothing": (
        case("dsp16", "[memory]", "data = 0  # here"),
        "memory.data: a memory has at least one byte, not 0",
    ),
    "two kinds of scales": (
        case("arm-neon", "[weights]", 'scales = "power_of_two"  # here'),
        "weights.scales: weights and activations must have the same kind of scales",
    ),
    "a shift between real scales": (
        case("arm-neon", "[requantization]", 'form = "shift"  # here', 'rounding = "floor"'),
        "requantization.form: shift needs power_of_two scales",
    ),
    "a shift of a kind between real scales": (
        case("arm-neon", "[requantization.mean]", 'form = "shift"  # here', 'rounding = "floor"'),
        "requantization.mean.form: shift needs power_of_two scales",
    ),
    "functions with zero points": (
        case("dsp16", "[functions]", 'rule = "tensorflow_lite"  # here', "index_bits = 8"),
        "functions.rule: tensorflow_lite has zero points, which power_of_two scales have not",
    ),
    "rounded sums of real scales": (
        case("arm-neon", "[accumulator]", 'rounding = "floor"  # here'),
        "accumulator.rounding: only power_of_two scales have fraction bits to round",
    ),
    "a product cast to exact sums": (
        case("dsp16", "[product]", 'bits = "accumulator"  # here'),
        "product.bits: a product that is cast to the accumulator needs accumulator.rounding",
    ),
    "binary points of real scales": (
        case("arm-neon", "[addition]", 'rule = "binary_point"  # here'),
        "addition.rule: binary_point needs power_of_two scales",
    ),
    "a formula for sums that have none": (
        case("tensorrt", "[requantization.add]  # here", 'form = "float32"'),
        "requantization.add: addition.rule = float32 requantizes no sums",
    ),
    "a formula for products that have none": (
        case("onnxruntime", "[requantization]", 'mul = { form = "float32" }  # here'),
        "requantization.mul: multiplication.rule = float32 requantizes no products",
    ),
    "multipliers of wide activations": (
        case("arm-neon-xnnpack", *WIDE[:2], *WIDE[3:]),
        "addition.rule: multipliers takes activations of 8 bits at most, not 16",
    ),
    "a common scale without multipliers": (
        case("arm-neon", "[requantization]", 'form = "float32"'),
        "addition.rule: common_scale rescales by integer multipliers, not by float32",
    ),
    "a common scale that does not fit": (
        case("arm-neon", *WIDE),
        "addition.left_shift: 16 bits at a left shift of 20 do not fit 32 bits",
    ),
    "a float form without floating point": (
        case("cortex-m", "[requantization.mul]", 'form = "double_away"  # here'),
        "requantization.mul.form: double_away needs floating_point = true",
    ),
    "float sums without floating point": (
        case("cortex-m", "[addition]", 'rule = "float32"  # here'),
        "addition.rule: float32 needs floating_point = true",
    ),
    "float products without floating point": (
        case("cortex-m", "[multiplication]", 'rule = "float32"  # here'),
        "multiplication.rule: float32 needs floating_point = true",
    ),
    "float averages without floating point": (
        case("cortex-m", "[pooling]", 'average = "float32"  # here', 'rounding = "none"'),
        "pooling.average: float32 needs floating_point = true",
    ),
    "weights alone without floating point": (
        case("cortex-m", "[weight_only]  # here", "bits = [4]", "block = 32"),
        "weight_only: products in floating point need floating_point = true",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contract_that_contradicts_itself(name: str, here: Path) -> None:
    check(*CONTRADICTIONS[name])


def test_every_contradiction_has_a_case(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, untested = reached(qir.target, [text for text, _ in CONTRADICTIONS.values()], monkeypatch)
    assert calls > 40
    assert untested == []
