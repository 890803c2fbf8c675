"""Drawings as `.svg` or `.png` files, by matplotlib, which is imported where something is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qir.errors import QirError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Formats of drawings, by the ends of file names.
FORMATS: Final = (".svg", ".png")
#: Colours that the colour-blind tell apart (Okabe and Ito).
COLOURS: Final = ("#0072B2", "#999999", "#E69F00", "#009E73", "#CC79A7", "#D55E00")


def drawing_of(path: str | None) -> str:
    """The format of a drawing by its file name; empty for none.

    Raises QirError for any other end of the name, and where matplotlib is not installed: before work is done for it.
    """
    if path is None:
        return ""
    found = Path(path).suffix.lower()
    if found not in FORMATS:
        raise QirError(f"cannot draw {path}: the name must end in {' or '.join(FORMATS)}")
    figure_of(1, 1)
    return found


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of this size in inches. Raises QirError where matplotlib is not installed."""
    try:
        from matplotlib import figure
    except ImportError as fault:
        raise QirError("drawings need matplotlib; install it, or qir with the extra 'plot'") from fault
    return figure.Figure(figsize=(width, height), layout="constrained")


def drawn(figure: Figure, kind: str) -> bytes:
    """The figure as a file of one of `FORMATS`: the same drawing is the same file."""
    from matplotlib import rc_context

    made = io.BytesIO()
    with rc_context({"svg.hashsalt": "qir"}):
        figure.savefig(made, format=kind.removeprefix("."), metadata={"Date": None} if kind == ".svg" else None)
    return made.getvalue()
