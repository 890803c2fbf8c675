"""How kernels are compiled: without the interpreter lock, and kept on disk between processes.

Numba keeps compiled code beside the source, or in the user's cache folder where the package cannot be written. What it
has kept is thrown away when the file of the kernel changes, but not when another file does: a kernel therefore calls
only functions of its own file, and takes constants from elsewhere as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def kernel(function: Function) -> Function:
    """Compile on first call, per combination of argument types; division is that of the machine, not Python's."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # neither folder can be written: compile anew in every process
        return numba.njit(**options)(function)
