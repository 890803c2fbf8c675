"""A target: what a chip computes, as data. `qir.target_file` reads it; docs/add-a-backend.md lists the fields.

Every class here is a table of the file, and its fields are the keys. What contradicts itself is refused with the key.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from qir.cost_tables import Costs
from qir.errors import ContractError
from qir.fixed_point import FLOAT_FORMS, Overflow, RequantizeForm, Rounding
from qir.levels import CODEBOOK_GRID, power_of_two_levels
from qir.ops.accumulate import STEPWISE, Order
from qir.ops.dequantize_blocks import Packing
from qir.ops.fixed_rescale import QuantizeRule
from qir.types import BINARY, IntegerType, integer

#: Activations and weights have at most this many bits.
MOST_BITS: Final = 16
#: Forms that take a register of 32 bits, and wrap what is wider.
FORMS_OF_32_BITS: Final = frozenset({RequantizeForm.DOUBLE_ROUND, RequantizeForm.NEON})


class Scheme(enum.StrEnum):
    """Whether a zero point may differ from 0."""

    AFFINE = "affine"
    SYMMETRIC = "symmetric"


class Granularity(enum.StrEnum):
    """Whether each output channel of the weights has a scale of its own."""

    PER_CHANNEL = "per_channel"
    PER_TENSOR = "per_tensor"


class Scales(enum.StrEnum):
    """Which scales there are: any float32, or powers of two, so that rescaling is a shift."""

    REAL = "real"
    POWER_OF_TWO = "power_of_two"


class WeightFormat(enum.StrEnum):
    """Which integers weights of a width are of."""

    UNIFORM = "uniform"  # all that the width holds; of 1 bit -1 and 1
    POWER_OF_TWO = "power_of_two"  # 0 and plus or minus powers of two: a product is a shift
    CODEBOOK = "codebook"  # as many integers of 8 bits as indices of the width tell apart, chosen for each tensor


#: The widths that weights of a format may have, where the contract lists them.
FORMAT_BITS: Final[Mapping[WeightFormat, range]] = {
    WeightFormat.UNIFORM: range(1, MOST_BITS + 1),
    WeightFormat.POWER_OF_TWO: range(2, 6),
    WeightFormat.CODEBOOK: range(1, 7),
}


class Width(enum.StrEnum):
    """Widths that no number states."""

    EXACT = "exact"  # a product as wide as its factors together
    PROVED = "proved"  # an accumulator as wide as the sums of each layer are proved to need
    ACCUMULATOR = "accumulator"  # a product that is cast to the accumulator before it is added


class SumRule(enum.StrEnum):
    """How two tensors of different scales are added."""

    COMMON_SCALE = "common_scale"  # both to twice the larger scale at a left shift, then the sum to its scale
    FLOAT32 = "float32"  # dequantized, added in float32, quantized: one IEEE operation each
    BINARY_POINT = "binary_point"  # both shifted to the finer binary point, then the sum to its own
    MULTIPLIERS = "multipliers"  # times integer multipliers, then one shift with ties up: XNNPACK


class ProductRule(enum.StrEnum):
    """How two tensors are multiplied element by element."""

    INTEGER = "integer"  # the exact product, requantized
    FLOAT32 = "float32"  # dequantized, multiplied in float32, quantized


class AverageRule(enum.StrEnum):
    """How the average of a window is taken."""

    INTEGER = "integer"  # the exact sum of its integers over their number, rounded
    FLOAT32 = "float32"  # dequantized, averaged in float32, quantized


class FunctionRule(enum.StrEnum):
    """Where the entries of the tables of unary functions come from."""

    TENSORFLOW_LITE = "tensorflow_lite"  # its integer algorithms; softmax too
    REAL = "real"  # the function in float32, divided by the output scale and rounded


@dataclass(frozen=True)
class Operand:
    """Base of activations and weights: integers of some widths, and the reals that they stand for.

    `default` is the width that is taken where nothing asks for another; without one it is the cheapest.
    `reduce_range` leaves the top bit unused; `narrow_range` leaves out the least value of a signed width.
    """

    bits: tuple[int, ...]
    signed: bool
    scheme: Scheme
    default: int | None = None
    scales: Scales = Scales.REAL
    narrow_range: bool = False
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if not self.bits:
            raise ContractError("bits", "at least one width must be listed")
        for bits in self.bits:
            if not 1 <= bits <= MOST_BITS:
                raise ContractError("bits", f"widths of 1 to {MOST_BITS} bits are supported, not {bits}")
            if self.narrow_range and not self.signed:
                raise ContractError("narrow_range", "only signed integers have a narrow range")
            low, high = self._bounds(bits)
            if low >= high:
                raise ContractError("bits", f"a width of {bits} leaves but the integer {high}; allow a wider range")
            if high <= 0 and self.scheme is Scheme.SYMMETRIC:
                raise ContractError("bits", f"a width of {bits} leaves nothing above zero; allow a wider range")
        if self.default is not None and self.default not in self.bits:
            raise ContractError("default", f"{self.default} is none of the widths {list(self.bits)}")
        if self.scales is Scales.POWER_OF_TWO and self.scheme is Scheme.AFFINE:
            raise ContractError("scheme", "power_of_two scales have no zero point; use scheme = symmetric")

    def _bounds(self, bits: int) -> tuple[int, int]:
        kind = integer(bits, self.signed)
        lo, hi = kind.lo, kind.hi
        if self.reduce_range:
            lo, hi = lo // 2, hi // 2
        return (-hi, hi) if self.narrow_range else (lo, hi)

    @property
    def leaves_out(self) -> str:
        """The field by which some integers of the width are never used, or nothing."""
        return "reduce_range" if self.reduce_range else "narrow_range" if self.narrow_range else ""

    def storage(self, bits: int) -> IntegerType:
        """The integer type of this width."""
        return integer(bits, self.signed).narrowed(*self._bounds(bits))


@dataclass(frozen=True)
class Activations(Operand):
    """Integers between layers, one scale a tensor."""


@dataclass(frozen=True)
class Weights(Operand):
    """Constant operands of convolutions and matrix products, and whether each output channel has its own scale.

    Symmetric weights of 1 bit are binary: -1 and 1. `formats` are those that weights come in; a format has those of the
    listed widths that `FORMAT_BITS` gives it.
    """

    conv: Granularity = Granularity.PER_CHANNEL
    matmul: Granularity = Granularity.PER_TENSOR
    formats: tuple[WeightFormat, ...] = (WeightFormat.UNIFORM,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.signed and self.scheme is Scheme.SYMMETRIC:
            raise ContractError("scheme", "unsigned weights need a zero point; use scheme = affine")
        if WeightFormat.UNIFORM not in self.formats:
            raise ContractError("formats", "uniform must be among them: weights have it where nothing asks for another")
        if self.formats != (WeightFormat.UNIFORM,) and (self.scheme is Scheme.AFFINE or self.reduce_range):
            message = "only uniform weights have zero points or leave a bit out; use scheme = symmetric"
            raise ContractError("formats", f"{message} without reduce_range")

    def widths(self, format: WeightFormat) -> tuple[int, ...]:
        """The listed widths that a format has."""
        return tuple(b for b in self.bits if b in FORMAT_BITS[format]) if format in self.formats else ()

    def formats_of(self, bits: int) -> tuple[WeightFormat, ...]:
        """The formats that weights of a width come in, uniform first; none where the width is not listed."""
        return tuple(item for item in WeightFormat if bits in self.widths(item))

    def _bounds(self, bits: int) -> tuple[int, int]:
        return (BINARY.lo, BINARY.hi) if self._is_binary(bits) else super()._bounds(bits)

    def _is_binary(self, bits: int) -> bool:
        return bits == 1 and self.signed and self.scheme is Scheme.SYMMETRIC and not self.reduce_range

    def storage(self, bits: int) -> IntegerType:
        """The integer type of uniform weights of this width."""
        return BINARY if self._is_binary(bits) else super().storage(bits)


@dataclass(frozen=True)
class Product:
    """What a product is before it is added: shifted left, then narrowed by `overflow` to `bits`, or `exact`.

    A product that is cast to the `accumulator` overflows as that does.
    """

    bits: int | Width = Width.EXACT
    overflow: Overflow = Overflow.SATURATE
    shift: int = 0

    def __post_init__(self) -> None:
        if self.bits is Width.PROVED or (isinstance(self.bits, int) and not 1 <= self.bits <= 64):
            raise ContractError("bits", "a product has 1 to 64 bits, or is exact or cast to the accumulator")
        if self.overflow is Overflow.NONE:
            raise ContractError("overflow", "none is what a proof says; state what the chip does")
        if not 0 <= self.shift <= MOST_BITS:
            raise ContractError("shift", f"a product is shifted left by 0 to {MOST_BITS} bits")


@dataclass(frozen=True)
class Accumulator:
    """The register that sums products.

    Without guard bits `overflow` acts at every step, in `order`. With them the register is `guard_bits` wider and
    wraps, and `overflow` acts once, when it is read out to `bits`. `rounding` is there where a sum may keep fewer
    fraction bits than the products and is rounded at every step. `wider` lists the further widths of registers that
    the chip can sum in, ascending: what insert-saturation may take for sums that do not fit.
    """

    bits: int | Width
    overflow: Overflow
    order: Order
    guard_bits: int = 0
    rounding: Rounding | None = None
    wider: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.overflow is Overflow.NONE:
            raise ContractError("overflow", "none is what a proof says; state what the chip does")
        if isinstance(self.bits, Width):
            if self.bits is not Width.PROVED:
                raise ContractError("bits", f"an accumulator has 2 to 64 bits, or is proved, not {self.bits}")
            if self.guard_bits:
                raise ContractError("guard_bits", "an accumulator of the proved width needs none")
        elif not 2 <= self.bits <= 64:
            raise ContractError("bits", f"an accumulator has 2 to 64 bits, not {self.bits}")
        elif not 0 <= self.guard_bits <= 64 - self.bits:
            raise ContractError(
                "guard_bits", f"at most 64 bits with those of the accumulator, and not {self.guard_bits}"
            )
        if self.rounding is not None and (self.guard_bits or self.bits is Width.PROVED):
            raise ContractError(
                "rounding", "an accumulator of guard bits or of the proved width keeps all fraction bits"
            )
        if self.wider and isinstance(self.bits, Width):
            raise ContractError("wider", "an accumulator of the proved width is as wide as it need be")
        if isinstance(self.bits, int):
            widths = (self.bits + self.guard_bits, *self.wider)
            if any(a >= b for a, b in itertools.pairwise(widths)) or widths[-1] > 64:
                message = f"further widths ascend from the accumulator's {widths[0]} bits to 64 at most"
                raise ContractError("wider", f"{message}, and {list(self.wider)} do not")


@dataclass(frozen=True)
class Requantizer:
    """A formula of `qir.fixed_point.requantize`; the rounding belongs to the form `shift`.

    `reciprocal` belongs to the form `float32`: its factor is then `sx * sw * (1 / so)` and not `sx * sw / so`, each
    operation rounded to float32.
    """

    form: RequantizeForm
    rounding: Rounding | None = None
    reciprocal: bool = False

    def __post_init__(self) -> None:
        if self.reciprocal and self.form is not RequantizeForm.FLOAT32:
            raise ContractError("reciprocal", "only the factor of form = float32 may be by the reciprocal")
        if (self.form is RequantizeForm.SHIFT) != (self.rounding is not None):
            raise ContractError("rounding", "a rounding belongs to form = shift, and only to it")


@dataclass(frozen=True)
class Requantization(Requantizer):
    """How accumulators are brought to the scale of their output, and what becomes of results that do not fit.

    Kinds of ops that differ have a table of their own; `rescale` is every change of scale without a sum before it.
    """

    overflow: Overflow = Overflow.SATURATE
    conv: Requantizer | None = None
    matmul: Requantizer | None = None
    mean: Requantizer | None = None
    add: Requantizer | None = None
    mul: Requantizer | None = None
    rescale: Requantizer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overflow is Overflow.NONE:
            raise ContractError("overflow", "none is what a proof says; state what the chip does")

    def of(self, kind: str) -> Requantizer:
        """The formula for a kind of op: the name of a field."""
        own: Requantizer | None = getattr(self, kind)
        return own or self

    def each(self) -> Iterator[tuple[str, Requantizer]]:
        """Every formula with the key of its table, the general one under the empty key."""
        yield "", self
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Requantizer):
                yield f"{item.name}.", value


@dataclass(frozen=True)
class Addition:
    """How two tensors are added; `left_shift` belongs to the rule `common_scale`."""

    rule: SumRule
    left_shift: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.left_shift <= 20:
            raise ContractError("left_shift", "a common scale is at a left shift of 0 to 20 bits")


@dataclass(frozen=True)
class Multiplication:
    """How two tensors are multiplied; the requantization of the rule `integer` is that of the kind `mul`."""

    rule: ProductRule = ProductRule.INTEGER


@dataclass(frozen=True)
class Pooling:
    """How an average is taken; `rounding` is that of the rule `integer`."""

    average: AverageRule
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if (self.average is AverageRule.INTEGER) != (self.rounding is not None):
            raise ContractError("rounding", "a rounding belongs to average = integer, and only to it")


@dataclass(frozen=True)
class Functions:
    """Tables of unary functions: 2**index_bits entries; wider operands are rounded to the index first."""

    rule: FunctionRule
    index_bits: int = 8
    rounding: Rounding = Rounding.HALF_AWAY

    def __post_init__(self) -> None:
        if not 2 <= self.index_bits <= MOST_BITS:
            raise ContractError("index_bits", f"a table has an index of 2 to {MOST_BITS} bits")
        if self.rule is FunctionRule.TENSORFLOW_LITE and self.index_bits != 8:
            raise ContractError("index_bits", "the algorithms of TensorFlow Lite fill tables of 8-bit operands")


@dataclass(frozen=True)
class InputQuantization:
    """How real inputs become integers at the border of the program."""

    rule: QuantizeRule
    rounding: Rounding


@dataclass(frozen=True)
class WeightOnly:
    """Widths of weights that are dequantized block by block before a product in floating point.

    A block is `block` neighbours along the summed axis, which share a float32 scale. Two 4-bit weights share a byte.
    """

    bits: tuple[int, ...]
    block: int
    packing: Packing = Packing.LOW_FIRST

    def __post_init__(self) -> None:
        if self.bits != (4,):
            raise ContractError("bits", f"weights alone are quantized to [4] bits, not {list(self.bits)}")
        if self.block < 1:
            raise ContractError("block", "a block has at least one weight")


@dataclass(frozen=True)
class Target:
    """The executable arithmetic contract of a chip.

    `floating_point` says whether the chip computes in floating point: ops without an integer form may then stay as
    float islands. `bias_bits` is the width of constants that are added to an accumulator (default: its own).
    `memory` holds sizes in bytes by name.
    """

    name: str
    description: str
    floating_point: bool
    activations: Activations
    weights: Weights
    accumulator: Accumulator
    requantization: Requantization
    addition: Addition
    pooling: Pooling
    functions: Functions
    input: InputQuantization
    costs: Costs
    bias_bits: int | None = None
    product: Product = field(default_factory=Product)
    multiplication: Multiplication = field(default_factory=Multiplication)
    weight_only: WeightOnly | None = None
    memory: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for fault in (*self._widths(), *self._scales(), *self._sums(), *self._floats()):
            raise fault

    def _widths(self) -> Iterator[ContractError]:
        for a in self.activations.bits:
            for w in self.weights.bits:
                for key in self.costs.uncovered(w, a):
                    pair = f"weights of {w} bits times activations of {a}"
                    yield ContractError(f"costs.{key}", f'"{w}x{a}" is missing, the cost of {pair}')
            for w in self._level_bits():
                for key in (k for k in self.costs.uncovered(w, a) if k != "mac"):
                    pair = f"levels of weights of {w} bits times activations of {a}"
                    yield ContractError(f"costs.{key}", f'"{w}x{a}" is missing, the cost of {pair}')
        bits = self.accumulator.bits
        if self.bias_bits is not None and not 2 <= self.bias_bits <= (bits if isinstance(bits, int) else 64):
            yield ContractError("bias_bits", "a bias has 2 bits or more and is no wider than the accumulator")
        for kind in ("conv", "matmul"):
            form = self.requantization.of(kind).form
            if form in FORMS_OF_32_BITS and (isinstance(bits, Width) or bits > 32):
                key = "form" if getattr(self.requantization, kind) is None else f"{kind}.form"
                yield ContractError(f"requantization.{key}", f"{form} takes 32 bits, the accumulator has {bits}")
        narrowest = min(self.activations.bits)
        if isinstance(bits, int) and self.accumulator.rounding is None and bits < narrowest + 2:
            yield ContractError("accumulator.bits", f"{bits} bits hold no sums of activations of {narrowest} bits")
        own_product = self.product.bits is not Width.EXACT
        if self.product.bits is Width.ACCUMULATOR and bits is Width.PROVED:
            yield ContractError(
                "product.bits", "a product cannot be cast to an accumulator whose width is to be proved"
            )
        if bits is Width.PROVED and own_product and self.product.overflow in STEPWISE:
            message = "an accumulator of the proved width takes products that are exact or wrap"
            yield ContractError("product.overflow", message)
        if self.weight_only is not None and set(self.weight_only.bits) & set(self.weights.bits):
            yield ContractError("weight_only.bits", "a width is either for integer products or for weights alone")
        if self.requantization.overflow is Overflow.WRAP and self.activations.leaves_out:
            key = f"activations.{self.activations.leaves_out}"
            yield ContractError(
                key, "results that wrap use all of their bits; requantization.overflow says that they do"
            )
        for name, size in self.memory.items():
            if size < 1:
                yield ContractError(f"memory.{name}", f"a memory has at least one byte, not {size}")
        yield from self.costs.memory_faults(self.memory)

    def _level_bits(self) -> set[int]:
        """The widths of the levels of weights, which are multiplied with, where they differ from those listed."""
        found = {self.weights.storage(b).bits for b in self.weights.bits}
        found |= {power_of_two_levels(b).bits for b in self.weights.widths(WeightFormat.POWER_OF_TWO)}
        found |= {CODEBOOK_GRID.bits} if self.weights.widths(WeightFormat.CODEBOOK) else set()
        return found - set(self.weights.bits)

    def _scales(self) -> Iterator[ContractError]:
        powers = self.activations.scales is Scales.POWER_OF_TWO
        if self.weights.scales is not self.activations.scales:
            yield ContractError("weights.scales", "weights and activations must have the same kind of scales")
        for key, rule in self.requantization.each():
            if rule.form is RequantizeForm.SHIFT and not powers:
                yield ContractError(f"requantization.{key}form", "shift needs power_of_two scales")
        if self.functions.rule is FunctionRule.TENSORFLOW_LITE and powers:
            yield ContractError("functions.rule", "tensorflow_lite has zero points, which power_of_two scales have not")
        if self.accumulator.rounding is not None and not powers:
            yield ContractError("accumulator.rounding", "only power_of_two scales have fraction bits to round")
        if self.product.bits is Width.ACCUMULATOR and self.accumulator.rounding is None and powers:
            yield ContractError("product.bits", "a product that is cast to the accumulator needs accumulator.rounding")

    def _sums(self) -> Iterator[ContractError]:
        rule, own = self.addition.rule, self.requantization
        if rule is SumRule.BINARY_POINT and self.activations.scales is not Scales.POWER_OF_TWO:
            yield ContractError("addition.rule", "binary_point needs power_of_two scales")
        if own.add is not None and rule in (SumRule.FLOAT32, SumRule.MULTIPLIERS):
            yield ContractError("requantization.add", f"addition.rule = {rule} requantizes no sums")
        if own.mul is not None and self.multiplication.rule is ProductRule.FLOAT32:
            yield ContractError("requantization.mul", "multiplication.rule = float32 requantizes no products")
        bits, form = min(self.activations.bits), self.requantization.of("add").form
        if rule is SumRule.MULTIPLIERS and bits > 8:
            yield ContractError("addition.rule", f"multipliers takes activations of 8 bits at most, not {bits}")
        if rule is SumRule.COMMON_SCALE and form in (RequantizeForm.SHIFT, *FLOAT_FORMS):
            yield ContractError("addition.rule", f"common_scale rescales by integer multipliers, not by {form}")
        if rule is SumRule.COMMON_SCALE and bits + self.addition.left_shift > 31:
            shift = self.addition.left_shift
            yield ContractError("addition.left_shift", f"{bits} bits at a left shift of {shift} do not fit 32 bits")

    def _floats(self) -> Iterator[ContractError]:
        if self.floating_point:
            return
        for key, rule in self.requantization.each():
            if rule.form in FLOAT_FORMS:
                yield ContractError(f"requantization.{key}form", f"{rule.form} needs floating_point = true")
        if self.addition.rule is SumRule.FLOAT32:
            yield ContractError("addition.rule", "float32 needs floating_point = true")
        if self.multiplication.rule is ProductRule.FLOAT32:
            yield ContractError("multiplication.rule", "float32 needs floating_point = true")
        if self.pooling.average is AverageRule.FLOAT32:
            yield ContractError("pooling.average", "float32 needs floating_point = true")
        if self.weight_only is not None:
            yield ContractError("weight_only", "products in floating point need floating_point = true")

    def __str__(self) -> str:
        """The whole contract as TOML: `qir.target_file.parse_target` gives the target back."""
        lines: list[str] = []
        _print_fields(self, "", lines)
        return "\n".join([*lines, ""])


def _print_fields(item: Any, section: str, lines: list[str]) -> None:
    """TOML text of a dataclass: plain fields first, then its tables; what is absent is left out."""
    nested: list[tuple[str, Any]] = []
    for column in dataclasses.fields(item):
        value = getattr(item, column.name)
        if value is None or value == ():
            continue
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            nested.append((column.name, value))
        else:
            lines.append(f"{column.name} = {_toml(value)}")
    for name, value in nested:
        if isinstance(value, Mapping) and not value:
            continue
        lines += ["", f"[{section}{name}]"]
        if isinstance(value, Mapping):
            lines += [f"{_toml(k)} = {_toml(v)}" for k, v in value.items()]
        else:
            _print_fields(value, f"{section}{name}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        escaped = re.sub(r'[\x00-\x1f"\\\x7f]', lambda found: f"\\u{ord(found[0]):04x}", value)
        return f'"{escaped}"'
    return repr(value)
