"""What `qir sensitivity` and `qir pareto` show: tables and drawings of losses by width and of the front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from qir.drawing import COLOURS, drawn, figure_of
from qir.mixed_precision import ORIGINS, Front, Point
from qir.passes.widths.costs import Metric
from qir.passes.widths.decisions import Kind
from qir.passes.widths.sensitivity import Loss, Sensitivity
from qir.report import fields_text
from qir.table import columns

_LEAST_LOSS: Final = 1e-9  # what is drawn of no loss at all
_BYTES: Final = (Metric.WEIGHTS, Metric.CONSTANTS, Metric.PEAK, Metric.MOVED)
_UNITS: Final[Mapping[str, tuple[str, float]]] = {
    **dict.fromkeys(_BYTES, ("bytes", 1.0)),
    Metric.LATENCY: ("us", 1e-6),
    Metric.ENERGY: ("uJ", 1e-6),
}


def sensitivity_text(found: Sensitivity) -> str:
    """The loss of each width of each decision, weights and activations in a table each."""
    blocks = []
    for kind, way in dict.fromkeys((e.kind, e.way) for e in found.losses):
        losses = [e for e in found.losses if (e.kind, e.way) == (kind, way)]
        names, choices, table = _matrix(losses)
        rows = [[*choices, f"{kind}, {way or 'as the contract has them'}"]]
        rows += [["" if np.isnan(v) else f"{v:.2g}" for v in row] + [n] for row, n in zip(table, names, strict=True)]
        blocks.append("\n".join(columns(rows, set(range(len(choices))))))
    fields = [
        ("loss", f"{found.quality}, on {found.samples:,} samples, of each width alone"),
        ("proxy", f"rank correlation with the measured loss {found.correlation:.3f}, by Spearman"),
    ]
    if found.is_estimated:
        fields[1] = ("proxy", "one width of each is measured, the others follow from the error where it arises")
    return "\n\n".join([*blocks, fields_text(fields)])


def front_text(front: Front) -> str:
    """The points of the front, then greedy and uniform ones: what they take, lose and score."""
    unit, scale = _UNITS.get(front.metric, ("", 1.0))
    head = [f"{front.metric}{f', {unit}' * bool(unit)}", "estimated", "measured", "score", "origin", "widths"]
    rows = [head]
    for origin in ORIGINS:
        for point in front.of(origin):
            score = "" if point.score is None else f"{point.score:.4f}"
            cost = f"{point.costs[front.metric] / scale:,.6g}"
            rows.append([cost, f"{point.loss:.3g}", f"{point.measured:.3g}", score, origin, _widths_text(point)])
    if front.float_score is None:
        rows = [row[:3] + row[4:] for row in rows]
    fields = [
        ("losses", f"{front.quality}, on {front.samples:,} samples, measured on the integer kernels"),
        ("estimates", f"rank correlation with the measured losses {front.correlation:.3f}, by Spearman"),
        ("best", f"proved: the relative gap is {max(p.gap for p in front.of('front')):g} at every point of the front"),
    ]
    if front.float_score is not None:
        fields.insert(1, ("score", f"{front.float_score:.4f} in floating point"))
    return "\n".join([*columns(rows, set(range(len(rows[0]) - 2))), "", fields_text(fields)])


def _widths_text(point: Point) -> str:
    """How many layers have each width: `2 of 8, 5 of 4`."""
    counts: dict[str, int] = {}
    for choice in point.widths[Kind.WEIGHTS].values():
        counts[choice] = counts.get(choice, 0) + 1
    return ", ".join(f"{count} of {choice}" for choice, count in counts.items())


def _matrix(losses: Sequence[Loss]) -> tuple[list[str], list[str], np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """Decisions, choices, and the loss of each: NaN where there is none."""
    names, choices = (
        list(dict.fromkeys(texts)) for texts in ((e.decision for e in losses), (e.choice for e in losses))
    )
    table = np.full((len(names), len(choices)), np.nan)
    for loss in losses:
        table[names.index(loss.decision), choices.index(loss.choice)] = loss.loss
    return names, choices, table


def draw_sensitivity(found: Sensitivity, kind: str) -> bytes:
    """Decisions by widths as a heat map of losses, one for weights and one for activations.

    Raises QirError where matplotlib is not installed.
    """
    panels = {k: [e for e in found.losses if e.kind is k and not e.way] for k in Kind}
    shown = {k: _matrix(losses) for k, losses in panels.items() if losses}
    height = 1.5 + 0.25 * max(len(names) for names, _, _ in shown.values())
    figure = figure_of(sum(4 + 0.6 * len(choices) for _, choices, _ in shown.values()), height)
    figure.suptitle(f"loss ({found.quality}) of each width alone: {found.graph} on {found.target}")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (panel, (names, choices, table)) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(np.log10(np.maximum(table, _LEAST_LOSS)), aspect="auto", cmap="cividis")
        axis.set_xticks(range(len(choices)), choices, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xlabel(f"bits of {panel}")
        figure.colorbar(image, ax=axis, label="log10 of the loss")
    return drawn(figure, kind)


def draw_front(front: Front, kind: str) -> bytes:
    """Scores where there are some, and measured losses on a logarithmic scale, over the metric, by origin.

    Raises QirError where matplotlib is not installed.
    """
    unit, scale = _UNITS.get(front.metric, ("", 1.0))
    panels: dict[str, Callable[[Point], float]] = {f"measured loss ({front.quality})": _drawn_loss}
    if front.float_score is not None:
        panels = {"score": lambda p: p.score if p.score is not None else float("nan"), **panels}
    figure = figure_of(5.5 * len(panels), 4.2)
    figure.suptitle(f"{front.graph} on {front.target}, {front.samples:,} samples")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, height) in zip(axes, panels.items(), strict=True):
        for origin, colour, mark in zip(ORIGINS, (COLOURS[0], COLOURS[2], COLOURS[3]), "os^", strict=True):
            places = [(p.costs[front.metric] / scale, height(p)) for p in front.of(origin)]
            style = mark if origin == "uniform" else f"{mark}-"
            axis.plot(*zip(*places, strict=True), style, color=colour, label=origin, markersize=5)
            for place, point in zip(places, front.of(origin), strict=True) if origin == "uniform" else ():
                name = next(iter(point.widths[Kind.WEIGHTS].values()))
                axis.annotate(name, place, textcoords="offset points", xytext=(4, -9), fontsize=7, color=colour)
        axis.set_xlabel(f"{front.metric}{f', {unit}' * bool(unit)}")
        axis.set_ylabel(title)
    if front.float_score is not None:
        axes[0].axhline(front.float_score, color=COLOURS[1], linestyle="--", label="float32")
    axes[-1].set_yscale("log")
    axes[0].legend()
    return drawn(figure, kind)


def _drawn_loss(point: Point) -> float:
    return max(point.measured, _LEAST_LOSS)
