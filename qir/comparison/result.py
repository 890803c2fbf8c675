"""What `qir.compare` found: numbers layer by layer, as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from qir.comparison.attribution import Cause
from qir.table import columns

_LAYER_WIDTH: Final = 34
_CAUSE_WIDTH: Final = 80


@dataclass(frozen=True)
class Gap:
    """How far data are from what they are compared with.

    `differing` elements of all differ, by `largest` steps of their scale at most; both are None where a step is another
    real on either side. `sqnr` is the signal-to-noise ratio of the reals in dB, infinite where they are equal.
    """

    elements: int
    differing: int | None
    largest: float | None
    sqnr: float

    @property
    def is_none(self) -> bool:
        """Whether nothing differs."""
        return self.differing == 0 if self.differing is not None else self.sqnr == math.inf


@dataclass(frozen=True)
class LayerComparison:
    """A layer on the first target and on another; where there are two of something, the first target's comes first.

    `layer` is the name of its result, `location` that of its node in the model; `op` is "input" for an input of the
    graph. `gap` is that of the layer alone, on the inputs of the first target; `accumulated` is that of both programs
    when each runs on its own. `float_sqnr` holds the SQNR in dB of the layer alone to the same op in float32, None
    where the result stands for no reals. `cause` says why the layer differs, where it does.
    """

    layer: str
    location: str
    op: str
    types: tuple[str, str]
    gap: Gap
    accumulated: Gap
    float_sqnr: tuple[float, float] | None
    cause: Cause | None


@dataclass(frozen=True)
class TargetComparison:
    """Every layer of the model, in order, on the first target and on `target`."""

    target: str
    layers: tuple[LayerComparison, ...]

    @property
    def differing(self) -> tuple[LayerComparison, ...]:
        """The layers that differ."""
        return tuple(layer for layer in self.layers if not layer.gap.is_none)


@dataclass(frozen=True)
class OutputComparison:
    """An output of the whole program on a target.

    `gap` is that to the first target's; `float_sqnr` is the SQNR in dB to float32, None where the output stands for no
    reals. Of `choices` - the greatest class of each sample in an output [N, C], or each number of an output of plain
    integers - so many are the same as on the first target, and as in float32; None where there are no choices.
    """

    target: str
    output: str
    gap: Gap
    float_sqnr: float | None
    choices: int
    same_choice: int | None
    same_choice_float: int | None


@dataclass(frozen=True)
class Comparison:
    """One model on several targets, on the same samples. Prints as tables."""

    graph: str
    samples: int
    targets: tuple[str, ...]
    outputs: tuple[OutputComparison, ...]
    others: tuple[TargetComparison, ...]

    def __str__(self) -> str:
        """A summary of the targets, then a table of layers for each that differs from the first."""
        first = self.targets[0]
        parts = [
            f"@{self.graph} on {len(self.targets)} targets, {self.samples:,} samples. Each layer is replayed on the "
            f"inputs that it has on {first}:\nhow many elements then differ, by up to how many steps of their scale; "
            "where steps are not the same, the SQNR in dB.\n"
            "'accumulated' is the difference when each program runs on its own.",
            _table(list(self._summary()), right=(1, 2, 3, 4)),
        ]
        for other in self.others:
            if other.differing:
                count = f"{len(other.differing)} of {len(other.layers)} layers differ"
                parts.append(f"{first} and {other.target}: {count}\n{_layer_table(other)}")
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """All of it as JSON; an infinite SQNR, where nothing differs or all is lost, is null."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False) + "\n"

    def _summary(self) -> Iterator[tuple[str, ...]]:
        several = len({o.output for o in self.outputs}) > 1
        classes = f"class as {self.targets[0]}", "class as float32"
        yield "target", "layers differ", *classes, "dB to float32", "first that differs"
        for number, target in enumerate(self.targets):
            other = self.others[number - 1] if number else None
            differing = other.differing if other is not None else ()
            count = f"{len(differing)} of {len(other.layers)}" if other is not None else ""
            where = f"{_short(_place(differing[0]))}, {_cause_text(differing[0])}" if differing else ""
            for place, output in enumerate(o for o in self.outputs if o.target == target):
                yield (
                    (f"{target} %{output.output}" if several else target) if not place or several else "",
                    count if not place else "",
                    _count(output.same_choice, output.choices) if number else "",
                    _count(output.same_choice_float, output.choices),
                    "" if output.float_sqnr is None else _decibels(output.float_sqnr),
                    where if not place else "",
                )


def _count(count: int | None, total: int) -> str:
    return "" if count is None else f"{count:,} of {total:,}"


def _layer_table(other: TargetComparison) -> str:
    rows = [("layer", "op", "differs", "by up to", "accumulated", "dB to float32", "first op and rule")]
    for layer in other.layers:
        share, largest = _gap_texts(layer.gap)
        floats = "" if layer.float_sqnr is None else " / ".join(map(_decibels, layer.float_sqnr))
        total = _gap_texts(layer.accumulated)
        rows.append((_short(_place(layer)), layer.op, share, largest, total[1] or total[0], floats, _cause_text(layer)))
    return _table(rows, right=(2, 3, 4, 5))


def _place(layer: LayerComparison) -> str:
    return layer.location or f"%{layer.layer}"


def _short(name: str) -> str:
    """The end of a long name, which says more than its beginning."""
    return name if len(name) <= _LAYER_WIDTH else f"...{name[3 - _LAYER_WIDTH :]}"


def _cause_text(layer: LayerComparison) -> str:
    text = str(layer.cause or "")
    return text if len(text) <= _CAUSE_WIDTH else f"{text[: _CAUSE_WIDTH - 3]}..."


def _gap_texts(gap: Gap) -> tuple[str, str]:
    """How many elements differ and by how many steps; where steps are others, the SQNR alone."""
    if gap.differing is None or gap.largest is None:
        return f"{_decibels(gap.sqnr)} dB", ""
    if not gap.differing:
        return "-", ""
    share = gap.differing / gap.elements
    return f"{share:.2%}" if share >= 0.0001 else f"{gap.differing:,} of {gap.elements:,}", f"{gap.largest:,g}"


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else "none" if value == -math.inf else f"{value:.1f}"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Columns two blanks apart; those of `right` are aligned to the right. Empty columns are left out."""
    kept = [c for c in range(len(rows[0])) if any(row[c] for row in rows[1:])]
    numbers = [place for place, column in enumerate(kept) if column in right]
    return "\n".join(columns([[row[c] for c in kept] for row in rows], numbers))


def _finite(item: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_finite(value) for value in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item
