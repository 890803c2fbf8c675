"""An invented chip as a backend of qir: `qir compile --target chip20` finds it by its entry point."""

from __future__ import annotations

from pathlib import Path

from qir import Backend, Op
from qir.backends.kernels.kernel import Facts, Kernel
from qir_chip20.cost import cost
from qir_chip20.export import export


def _kernels(op: Op, facts: Facts) -> Kernel | None:
    from qir_chip20.kernels import choose  # Numba is loaded when a program is bound, not when targets are listed

    return choose(op, facts)


backend = Backend(
    name="chip20",
    target_file=Path(__file__).with_name("target.toml"),
    kernels=_kernels,
    cost=cost,
    export=export,
)
