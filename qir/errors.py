"""The errors of qir: each is one sentence that names the place, the reason and the mend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class QirError(Exception):
    """Base of every error that bad input can cause; the command line prints it alone and exits with status 2."""


class ImportModelError(QirError):
    """A model file cannot be lowered: unreadable, malformed, unsupported or underspecified."""


class CalibrationError(QirError):
    """Calibration data is missing, has the wrong names, shapes or types, or holds non-finite values."""


class TargetError(QirError):
    """A target description is unknown, malformed or contradictory, or cannot express what a graph needs."""


class ContractError(QirError):
    """A contract that contradicts itself; `key` is the dotted path of the field at fault, within its table."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class ParseError(QirError):
    """A `.qir` text is malformed; the message starts with `line:column`."""

    def __init__(self, message: str, line: int, column: int, source: str = "<text>") -> None:
        super().__init__(f"{source}:{line}:{column}: {message}")
        self.line = line
        self.column = column


class ResourceError(QirError):
    """A sidecar of constants is missing, lacks an array, or holds one whose hash differs from the text's."""


class RewriteError(QirError):
    """A graph was built or rewritten wrongly, or an op cannot be lowered."""


class PassError(QirError):
    """A pass failed; `passes_done` ran before it and `last_good` is the graph that it was given."""

    def __init__(self, message: str, passes_done: Sequence[str] = (), last_good: object = None) -> None:
        super().__init__(message)
        self.passes_done = tuple(passes_done)
        self.last_good = last_good


class CertificateError(QirError):
    """A program's certificate is missing, cannot be read, or makes false claims; the message lists them all."""


class RunError(QirError):
    """A program was given feeds whose names, shapes or types do not fit, or it cannot run them."""


class ConformanceError(QirError):
    """A backend does not compute what its contract says; the message lists every failed check."""


@dataclass(frozen=True)
class Diagnostic:
    """One finding about a graph: `place` names the op or value, `message` the reason and the mend."""

    place: str
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.place}: {self.message}"


class VerifyError(QirError):
    """A graph breaks invariants; `diagnostics` lists every finding, in graph order."""

    def __init__(self, diagnostics: Sequence[Diagnostic], graph_name: str) -> None:
        self.diagnostics = tuple(diagnostics)
        shown = "\n".join(f"  {d}" for d in self.diagnostics[:20])
        rest = len(self.diagnostics) - 20
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        super().__init__(f"graph @{graph_name} is not legal, {len(self.diagnostics)} finding(s):\n{shown}{more}")
