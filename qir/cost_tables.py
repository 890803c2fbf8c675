"""The cost tables of a target: what multiply-accumulates, bytes and other work take on the chip.

Each class is a table of the target file, below `[costs]`; `qir.cost` applies them to a graph.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Final

from qir.errors import ContractError

#: The pair of widths that others are measured by where costs follow bit operations.
UNIT_PAIR: Final = "8x8"
#: Bits of reals, which no integer operand of products has.
FLOAT_BITS: Final = 32
FLOAT_PAIR: Final = f"{FLOAT_BITS}x{FLOAT_BITS}"
_LUTS: Final = ("lut_per_bit_operation", "lut_per_sum_bit", "lut_per_shift_bit", "lut_per_level_bit")
_PAIR: Final = re.compile(r"([1-9]\d*)x([1-9]\d*)")

Table = Mapping[str, float]


def no_table() -> Table:
    """The table of what is not stated."""
    return MappingProxyType({})


class CostRule(enum.StrEnum):
    """Where the cost of a multiply-accumulate comes from."""

    TABLE = "table"  # the table `mac`
    BIT_OPERATIONS = "bit_operations"  # the product of both widths, over that of 8 and 8


@dataclass(frozen=True)
class Cycles:
    """Cycles of work that is no multiply-accumulate: of each layer, and of each element."""

    layer: float = 0.0
    requantize: float = 0.0
    convert: float = 0.0
    element: float = 0.0
    floating: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            _not_negative(item.name, getattr(self, item.name), "cycles are")


@dataclass(frozen=True)
class Fabric:
    """Logic that is laid out for the model, as on an FPGA: each layer has multipliers of its own.

    One multiplier takes `reuse` weights in turn. `dsp` maps pairs of widths to slices a multiplier, less than 1 where
    a slice holds several; without it multipliers are of logic, `lut_per_bit_operation` for each product of two bits.
    Weights that are powers of two take a shifter in place of a multiplier, `lut_per_shift_bit` for each bit of the
    product and each of its stages. Every multiplier feeds an adder of `lut_per_sum_bit` for each bit of the
    accumulator, which negates too, and reads the weights of a codebook by a table of `lut_per_level_bit` for each bit
    of a level. A block of memory has `bram_bits`, of which `bram_port` are read in a cycle.
    """

    reuse: int
    dsp: Table = field(default_factory=no_table)
    lut_per_bit_operation: float = 0.0
    lut_per_sum_bit: float = 0.0
    lut_per_shift_bit: float = 0.0
    lut_per_level_bit: float = 0.0
    bram_bits: int | None = None
    bram_port: int | None = None

    def __post_init__(self) -> None:
        if self.reuse < 1:
            raise ContractError("reuse", f"a multiplier takes at least one weight, not {self.reuse}")
        check_pairs("dsp", self.dsp, "slices are", least_is_zero=False)
        for name in _LUTS:
            _not_negative(name, getattr(self, name), "numbers of LUTs are")
        for name, other in (("bram_bits", "bram_port"), ("bram_port", "bram_bits")):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ContractError(name, f"a block of memory has at least one bit, not {size}")
            if size is None and getattr(self, other) is not None:
                raise ContractError(name, f"a block of memory has both bram_bits and bram_port; state {name} too")

    @property
    def has_logic(self) -> bool:
        """Whether LUTs can be estimated."""
        return any(getattr(self, name) for name in _LUTS)

    def dsp_of(self, weight_bits: int, activation_bits: int) -> float:
        """Slices a multiplier."""
        return min(self.dsp[pair] for pair in holding(self.dsp, weight_bits, activation_bits))


@dataclass(frozen=True)
class Costs:
    """What work costs on the chip; parts that are not stated are not estimated.

    `mac` is relative, and what assign-bit-widths goes by. `macs_per_cycle` and `mac_energy` (pJ) map bits of weight and
    activation, such as `"8x16"`; widths that are not listed cost what the cheapest listed pair does that holds both,
    and `"32x32"` is of float32 alone. With `rule = bit_operations` they state `"8x8"`, and other pairs follow by the
    product of their widths.
    `clock` is in Hz. `load`, `store` (bytes a cycle) and `byte_energy` (pJ) go by the names of the contract's memories;
    a memory without `store` is read only. `weights` names the memory that holds all constants, where it is always the
    same.
    """

    rule: CostRule = CostRule.TABLE
    mac: Table = field(default_factory=no_table)
    clock: float | None = None
    weights: str | None = None
    macs_per_cycle: Table = field(default_factory=no_table)
    cycles: Cycles = field(default_factory=Cycles)
    load: Table = field(default_factory=no_table)
    store: Table = field(default_factory=no_table)
    mac_energy: Table = field(default_factory=no_table)
    byte_energy: Table = field(default_factory=no_table)
    fabric: Fabric | None = None

    def __post_init__(self) -> None:
        if self.rule is CostRule.BIT_OPERATIONS and self.mac:
            raise ContractError("mac", "a table belongs to rule = table")
        check_pairs("mac", self.mac, "a cost is")
        check_pairs("macs_per_cycle", self.macs_per_cycle, "a rate is", least_is_zero=False)
        check_pairs("mac_energy", self.mac_energy, "an energy is")
        if self.clock is not None and not (math.isfinite(self.clock) and self.clock > 0):
            raise ContractError("clock", f"a clock is finite and above zero, not {self.clock}")
        for name, table in (("load", self.load), ("store", self.store)):
            for memory, rate in table.items():
                if not (math.isfinite(rate) and rate > 0):
                    raise ContractError(f"{name}.{memory}", f"a rate is finite and above zero, not {rate}")
        for memory, energy in self.byte_energy.items():
            _not_negative(f"byte_energy.{memory}", energy, "an energy is")
        if self.fabric is not None and self.macs_per_cycle:
            raise ContractError("macs_per_cycle", "the rate of a fabric follows from its reuse; state one of the two")
        for name, table in (("macs_per_cycle", self.macs_per_cycle), ("mac_energy", self.mac_energy)):
            if self.rule is CostRule.BIT_OPERATIONS and table and set(table) != {UNIT_PAIR}:
                raise ContractError(name, f'with rule = bit_operations state "{UNIT_PAIR}" alone; the others follow')

    @property
    def has_latency(self) -> bool:
        """Whether cycles can be estimated."""
        return bool(self.macs_per_cycle) or self.fabric is not None

    def of_mac(self, weight_bits: int, activation_bits: int) -> float:
        """The relative cost of one multiply-accumulate."""
        if self.rule is CostRule.BIT_OPERATIONS:
            return weight_bits * activation_bits / 64
        return self.mac[f"{weight_bits}x{activation_bits}"]

    def rate(self, weight_bits: int, activation_bits: int) -> float:
        """Multiply-accumulates a cycle, of a chip without a fabric."""
        if self.rule is CostRule.BIT_OPERATIONS:
            return self.macs_per_cycle[UNIT_PAIR] / self.of_mac(weight_bits, activation_bits)
        listed = holding(self.macs_per_cycle, weight_bits, activation_bits)
        return max(self.macs_per_cycle[pair] for pair in listed)

    def energy_of_mac(self, weight_bits: int, activation_bits: int) -> float:
        """The energy of one multiply-accumulate in pJ."""
        if self.rule is CostRule.BIT_OPERATIONS:
            return self.mac_energy[UNIT_PAIR] * self.of_mac(weight_bits, activation_bits)
        return min(self.mac_energy[pair] for pair in holding(self.mac_energy, weight_bits, activation_bits))

    def uncovered(self, weight_bits: int, activation_bits: int) -> Iterator[str]:
        """The tables, by their keys, that say nothing of this pair of widths but should."""
        pair = f"{weight_bits}x{activation_bits}"
        if self.rule is CostRule.TABLE and pair not in self.mac:
            yield "mac"
        listed = {"fabric.dsp": self.fabric.dsp if self.fabric is not None else no_table()}
        if self.rule is CostRule.TABLE:
            listed |= {"macs_per_cycle": self.macs_per_cycle, "mac_energy": self.mac_energy}
        for name, table in listed.items():
            if table and not holding(table, weight_bits, activation_bits):
                yield name

    def memory_faults(self, memory: Mapping[str, int]) -> Iterator[ContractError]:
        """What does not go with the memories of the contract."""
        for name in ("load", "store", "byte_energy"):
            for unknown in (n for n in getattr(self, name) if n not in memory):
                yield ContractError(
                    f"costs.{name}.{unknown}", f"there is no memory of this name; [memory] has {_names(memory)}"
                )
        for name in (n for n in self.store if n not in self.load):
            yield ContractError(f"costs.store.{name}", "what is stored is loaded again; state costs.load of it too")
        if self.load and not self.store:
            yield ContractError("costs.load", "some memory must take results; state costs.store of it")
        if self.weights is not None and self.weights not in self.load:
            yield ContractError("costs.weights", f"names one of the memories of costs.load, {_names(self.load)}")
        for name in (n for n in self.load if self.mac_energy and n not in self.byte_energy):
            yield ContractError("costs.byte_energy", f"{name} is missing, as costs.mac_energy and costs.load are there")


def holding(table: Table, weight_bits: int, activation_bits: int) -> list[str]:
    """The pairs of a table that hold both widths; that of float32 holds no integers."""
    found = []
    for pair in table:
        weight, activation = map(int, pair.split("x"))
        fits_kind = pair != FLOAT_PAIR or FLOAT_BITS in (weight_bits, activation_bits)
        if weight >= weight_bits and activation >= activation_bits and fits_kind:
            found.append(pair)
    return found


def check_pairs(name: str, table: Table, what: str, *, least_is_zero: bool = True) -> None:
    """Raises ContractError for keys that are no pairs of widths, and for numbers that are no costs."""
    for pair, cost in table.items():
        if not _PAIR.fullmatch(pair):
            raise ContractError(f"{name}.{pair}", 'a cost is that of bits of weight and activation, such as "8x16"')
        if least_is_zero:
            _not_negative(f"{name}.{pair}", cost, what)
        elif not (math.isfinite(cost) and cost > 0):
            raise ContractError(f"{name}.{pair}", f"{what} finite and above zero, not {cost}")


def _not_negative(key: str, cost: float, what: str) -> None:
    if not (math.isfinite(cost) and cost >= 0):
        raise ContractError(key, f"{what} finite and not negative, not {cost}")


def _names(table: Mapping[str, object]) -> str:
    return ", ".join(table) or "none"
