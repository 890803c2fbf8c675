"""The ap_fixed headers that ship with hls4ml, compiled with g++ and called with NumPy arrays of raw integers.

The raw integer of a number is its bits, `value * 2**fraction_bits`, as in qir.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.fixed_point import Overflow, Rounding

Array = npt.NDArray[np.int64]

ROUNDINGS = {
    Rounding.FLOOR: "AP_TRN",
    Rounding.TOWARD_ZERO: "AP_TRN_ZERO",
    Rounding.HALF_UP: "AP_RND",
    Rounding.HALF_TOWARD_ZERO: "AP_RND_ZERO",
    Rounding.HALF_AWAY: "AP_RND_INF",
    Rounding.HALF_DOWN: "AP_RND_MIN_INF",
    Rounding.HALF_EVEN: "AP_RND_CONV",
}
OVERFLOWS = {
    Overflow.WRAP: "AP_WRAP",
    Overflow.SATURATE: "AP_SAT",
    Overflow.SATURATE_ZERO: "AP_SAT_ZERO",
    Overflow.SATURATE_SYMMETRIC: "AP_SAT_SYM",
}

_OPERATIONS = Path(__file__).with_name("ap_fixed_operations.h")
#: Templates instantiated by one run of g++: enough to make up for its start, few enough to keep two cores busy.
_BATCH = 64


@dataclass(frozen=True)
class FixedType:
    """`ap_fixed<width, int_bits, rounding, overflow>`, or `ap_ufixed`. Raw integers must fit int64."""

    width: int
    int_bits: int
    signed: bool = True
    rounding: Rounding = Rounding.FLOOR
    overflow: Overflow = Overflow.WRAP

    @property
    def fraction_bits(self) -> int:
        return self.width - self.int_bits

    @property
    def lo(self) -> int:
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        return (1 << (self.width - self.signed)) - 1

    def __str__(self) -> str:
        """The type as C++ has it."""
        modes = f"{ROUNDINGS[self.rounding]}, {OVERFLOWS[self.overflow]}"
        return f"ap_{'' if self.signed else 'u'}fixed<{self.width}, {self.int_bits}, {modes}>"


@dataclass(frozen=True)
class Operation:
    """One function template of ap_fixed_operations.h with its arguments."""

    name: str
    inputs: tuple[FixedType, ...]
    outputs: tuple[FixedType, ...] = ()
    flags: tuple[bool, ...] = ()

    def __str__(self) -> str:
        """The instantiation as C++ has it."""
        arguments = [*map(str, self.inputs + self.outputs), *(str(flag).lower() for flag in self.flags)]
        return f"{self.name}<{', '.join(arguments)}>"


def cast(source: FixedType, target: FixedType) -> Operation:
    """An assignment of a number of one type to a variable of another."""
    return Operation("cast", (source,), (target,))


def add(left: FixedType, right: FixedType) -> Operation:
    """A sum that keeps every bit."""
    return Operation("sum", (left, right))


def multiply(left: FixedType, right: FixedType) -> Operation:
    """A product that keeps every bit."""
    return Operation("product", (left, right))


def dense(
    x: FixedType, w: FixedType, bias: FixedType, acc: FixedType, out: FixedType, cast_products: bool = False
) -> Operation:
    """`acc = bias; for k: acc += x[k] * w[k]; out = acc`: a cast to the type of acc at every step.

    `cast_products` assigns each product to that type before it is added, which is what hls4ml's layers do.
    """
    return Operation("dense", (x, w, bias), (acc, out), (cast_products,))


@dataclass
class ApFixed:
    """Compiles operations into shared libraries in a folder, each only once, and runs them."""

    folder: Path
    _compiled: dict[Operation, tuple[Any, int]] = field(default_factory=dict, init=False, repr=False)

    def compile(self, operations: Iterable[Operation]) -> None:
        """Compiles those that are not compiled yet, many at a time: much faster than one by one."""
        missing = [operation for operation in dict.fromkeys(operations) if operation not in self._compiled]
        if not missing:
            return
        self._precompile_header()
        batches = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
        first = len(list(self.folder.glob("*.cpp")))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch, library in zip(
                batches, pool.map(self._build, range(first, first + len(batches)), batches), strict=True
            ):
                self._compiled.update((operation, (library, index)) for index, operation in enumerate(batch))

    def cast(self, source: FixedType, target: FixedType, values: Array) -> Array:
        """Each of `values`, raw integers of the type `source`, assigned to the type `target`."""
        operation = cast(source, target)
        return self._run(operation, [values], [values.size], values.size).reshape(values.shape)

    def binary(self, operation: Operation, a: Array, b: Array) -> tuple[FixedType, Array]:
        """Results of `add` or `multiply` on two arrays of one shape, and the type that the headers give to them."""
        if a.shape != b.shape:
            raise ValueError(f"operands of the shapes {a.shape} and {b.shape}")
        result = self._run(operation, [a, b], [a.size], a.size + 3)
        width, int_bits, signed = result[:3].tolist()
        return FixedType(width, int_bits, bool(signed)), result[3:].reshape(a.shape)

    def dense(self, operation: Operation, x: Array, w: Array, bias: Array) -> Array:
        """A layer made by the function `dense`: x [rows, depth], w [depth, columns], bias [columns]."""
        (rows, depth), (_, columns) = x.shape, w.shape
        if w.shape != (depth, columns) or bias.shape != (columns,):
            raise ValueError(f"x {x.shape}, w {w.shape} and bias {bias.shape} do not fit together")
        sizes = [rows, depth, columns]
        return self._run(operation, [x, w, bias], sizes, rows * columns).reshape(rows, columns)

    def _run(self, operation: Operation, arrays: Sequence[Array], sizes: Sequence[int], count: int) -> Array:
        self.compile([operation])
        for array, kind in zip(arrays, operation.inputs, strict=True):
            if np.min(array, initial=0) < kind.lo or np.max(array, initial=0) > kind.hi:
                raise ValueError(f"an operand of {operation} is outside {kind}")
        library, index = self._compiled[operation]
        kept = [np.ascontiguousarray(array, np.int64) for array in arrays]
        inputs = (ctypes.c_void_p * len(kept))(*(array.ctypes.data for array in kept))
        out = np.empty(count, np.int64)
        library.run(index, inputs, (ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_void_p(out.ctypes.data))
        return out

    def _precompile_header(self) -> None:
        header = self.folder / _OPERATIONS.name
        if not header.exists():
            shutil.copy(_OPERATIONS, header)
            _gxx("-x", "c++-header", str(header), "-o", f"{header}.gch")

    def _build(self, number: int, batch: Sequence[Operation]) -> ctypes.CDLL:
        source, library = self.folder / f"{number}.cpp", self.folder / f"{number}.so"
        table = ",\n    ".join(map(str, batch))
        source.write_text(
            f'#include "{_OPERATIONS.name}"\n\n'
            f"static const Function functions[] = {{\n    {table},\n}};\n\n"
            'extern "C" void run(int index, Inputs inputs, Sizes sizes, int64_t* out) {\n'
            "    functions[index](inputs, sizes, out);\n}\n"
        )
        _gxx("-shared", str(source), "-o", str(library))
        return ctypes.CDLL(str(library))


def headers() -> Path:
    """The folder of ap_fixed.h in the installed hls4ml, which is not imported: it is slow and warns."""
    spec = importlib.util.find_spec("hls4ml")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the ap_fixed headers come with hls4ml: pip install -e '.[test]'")
    return Path(spec.origin).parent / "templates" / "vivado" / "ap_types"


def _gxx(*arguments: str) -> None:
    """Without assertions: the headers handle a shift right by more than the width, and assert that there is none."""
    subprocess.run(["g++", "-std=c++17", "-O1", "-DNDEBUG", "-w", "-fPIC", f"-I{headers()}", *arguments], check=True)
