"""The conformance kit: every check on a backend, and the report."""

from __future__ import annotations

import math
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from qir.backend import Backend, load_backend
from qir.errors import ConformanceError
from qir.pass_manager import Progress, no_progress
from qir.target_file import parse_target
from qir.testing.border import check_border
from qir.testing.compare import Compared, compare
from qir.testing.goldens import golden_texts, replay
from qir.testing.maker import Cases, NoForm, Widths, format_widths, width_pairs
from qir.testing.maps import other_cases
from qir.testing.pipeline import compiled_case, compiled_program
from qir.testing.rescaling import activation_cases, arithmetic_cases, requantize_cases
from qir.testing.sums import sum_cases

_WIDTH: Final = 84

#: Checks at every width of the activations.
_KINDS: Final[Mapping[str, Callable[..., Cases]]] = {
    "requantize": requantize_cases,
    "arithmetic": arithmetic_cases,
    "activations": activation_cases,
    "other ops": other_cases,
}

#: What a check finds: outputs that agree, or something worth a note.
Found = Compared | str
Check = Callable[[], Iterable[Found]]


@dataclass(frozen=True)
class CheckResult:
    """What a check did: outputs compared, kernels that made them, and what is worth a note."""

    name: str
    outputs: int
    kernels: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A backend that conforms: its checks, and the names of its own kernels that they ran. Prints as a table."""

    backend: str
    checks: tuple[CheckResult, ...]
    own_kernels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Outputs compared in all; none differs."""
        return sum(c.outputs for c in self.checks)

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.checks)
        lines = [
            f"{self.backend} conforms: {self.outputs:,} outputs compared, 0 differ",
            f"kernels of its own: {', '.join(self.own_kernels) or 'none'}",
            "",
            f"{'check':{width}}  {'outputs':>9}  kernels",
        ]
        for check in self.checks:
            head = f"{check.name:{width}}  {f'{check.outputs:,}' if check.outputs else '-':>9}  "
            shown = "; ".join(filter(None, (", ".join(check.kernels), *check.notes)))
            wrapped = textwrap.wrap(shown, _WIDTH, break_long_words=False, break_on_hyphens=False)
            lines += [f"{head if not place else ' ' * len(head)}{text}" for place, text in enumerate(wrapped)]
        return "\n".join(lines)


def check_backend(backend: Backend | str | Path, *, seed: int = 0, progress: Progress = no_progress) -> Report:
    """Hold a backend (or that of a name, or the target of a `.toml` file) to its contract.

    - The contract prints and reads back equal.
    - Vectors are made from it, for every kind of op at every pair of widths (of many, at the default and at the ends),
      and for sums in every format of weights: all pairs of ends, sums that overflow at every step and come back, biases
      at their ends, accumulators around the boundaries between outputs, left shifts, every entry of every table, no
      sample and one, odd and empty shapes. The program, with the backend's kernels, must give each bit that the
      interpreter gives.
    - Reals at the border become integers as exact fractions say.
    - A small network goes through the default pipeline.
    - The texts of qir's own tests give what they say, with the backend's kernels where it has some for them.
    - Where the backend has them: `kernels` are run, `cost` is finite and not negative, `export` writes files.

    `seed` chooses the random numbers among the vectors. Raises ConformanceError, which names every case that fails and
    says of the first in each check what op, kernel and input it was, what was expected and what was found; TargetError
    when there is no such backend.
    """
    kit = _Kit(backend if isinstance(backend, Backend) else load_backend(backend), seed)
    checks, done = kit.checks(), []
    for place, (name, run) in enumerate(checks):
        progress(name, place, len(checks))
        done.append(kit.result(name, run))
    if kit.faults:
        shown = "\n".join(f"- {_fault_text(check, faults)}" for check, faults in kit.faults.items())
        raise ConformanceError(f"backend {kit.backend.name!r} does not conform:\n{shown}")
    return Report(kit.backend.name, tuple(done), tuple(sorted(kit.own)))


def _fault_text(check: str, faults: Sequence[tuple[str, str]]) -> str:
    """The first fault of a check, and the names of the other cases that fail in it."""
    (case, text), *rest = faults
    also = f"\n  so do: {'; '.join(name for name, _ in rest)}" if rest else ""
    return f"{check}{f', {case}' if case else ''}: {text}{also}"


class _Kit:
    """Runs checks and collects what they find: counts, kernels, faults."""

    def __init__(self, backend: Backend, seed: int) -> None:
        self.backend = backend
        self.target = backend.target()
        self.random = np.random.default_rng(seed)
        self.faults: dict[str, list[tuple[str, str]]] = {}  # by check: case and text
        self.own: set[str] = set()

    def checks(self) -> list[tuple[str, Check]]:
        """Every check by name, in the order in which they run."""
        pairs = width_pairs(self.target)
        found: list[tuple[str, Check]] = [("contract", self._contract)]
        for widths in (*pairs, *format_widths(self.target)):
            name = f"sums {widths}"
            found.append((name, self._cases(name, sum_cases, widths, thorough=widths is pairs[0])))
        for widths in {p.activations: p for p in reversed(pairs)}.values():
            for kind, make in _KINDS.items():
                name = f"{kind} {widths.activations}"
                found.append((name, self._cases(name, make, widths)))
            border = partial(check_border, self.backend, self.target, widths, self.random)
            found.append((f"border {widths.activations}", border))
        found += [("default pipeline", self._pipeline), ("golden texts", self._goldens)]
        optional: list[tuple[Any, str, Check]] = [
            (self.backend.kernels, "kernels", self._kernels),
            (self.backend.cost, "cost", self._cost),
            (self.backend.export, "export", self._export),
        ]
        return [*found, *((name, check) for given, name, check in optional if given is not None)]

    def result(self, name: str, run: Check) -> CheckResult:
        """Run one check. Whatever it raises is a fault of the backend, under the name of the check."""
        outputs, kernels, islands, notes = 0, set[str](), set[str](), list[str]()
        try:
            for found in run():
                if isinstance(found, str):
                    notes.append(found)
                    continue
                outputs += found.outputs
                kernels |= found.kernels
                islands |= found.islands
                self.own |= found.own
        except Exception as fault:  # noqa: BLE001 - code of others may raise anything
            self._fault(name, "", fault)
        if islands:
            notes.append(f"as float islands: {', '.join(sorted(islands))}")
        return CheckResult(name, outputs, tuple(sorted(kernels)), tuple(notes))

    def _fault(self, check: str, case: str, fault: Exception) -> None:
        kind = "" if isinstance(fault, ConformanceError) else f"{type(fault).__name__}: "
        self.faults.setdefault(check, []).append((case, f"{kind}{fault}"))

    def _cases(self, check: str, make: Callable[..., Cases], widths: Widths, **options: Any) -> Check:
        """Vectors as a check: a case that fails does not keep the others from running."""

        def run() -> Iterator[Found]:
            for name, case in make(self.target, widths, self.random, **options):
                try:
                    yield compare(case(), self.backend)
                except NoForm as reason:
                    yield f"{name} has no form ({reason})"
                except Exception as fault:  # noqa: BLE001 - code of others may raise anything
                    self._fault(check, name, fault)

        return run

    def _contract(self) -> Iterator[Found]:
        if parse_target(str(self.target)) != self.target:
            raise ConformanceError("the contract does not read back as it prints")
        yield f"{self.backend.target_file}"

    def _pipeline(self) -> Iterator[Found]:
        yield compare(compiled_case(self.target, self.random), self.backend)

    def _goldens(self) -> Iterator[Found]:
        for name, text in golden_texts().items():
            try:
                yield replay(text, self.backend)
            except Exception as fault:  # noqa: BLE001 - code of others may raise anything
                self._fault("golden texts", name, fault)

    def _kernels(self) -> Iterator[Found]:
        """Kernels that no check reaches have not been checked."""
        if not self.own:
            raise ConformanceError("the backend has kernels of its own, but they took no op of any check")
        yield ", ".join(sorted(self.own))

    def _cost(self) -> Iterator[Found]:
        assert self.backend.cost is not None
        found = self.backend.cost(compiled_program(self.target, self.random).graph, self.target)
        bad = {k: v for k, v in found.items() if not (math.isfinite(v) and v >= 0)}
        if bad or not found:
            raise ConformanceError(f"costs are finite and not negative, one or more parts, not {bad or dict(found)}")
        yield ", ".join(f"{k} {v:,.6g}" for k, v in found.items())

    def _export(self) -> Iterator[Found]:
        assert self.backend.export is not None
        with tempfile.TemporaryDirectory() as folder:
            self.backend.export(compiled_program(self.target, self.random).graph, Path(folder))
            written = sorted(p for p in Path(folder).rglob("*") if p.is_file())
            if not any(p.stat().st_size for p in written):
                raise ConformanceError("export wrote nothing into the folder that it was given")
            yield ", ".join(f"{p.relative_to(folder)} {p.stat().st_size:,} bytes" for p in written)
