"""What `qir cost` shows of a graph's cost: a table of its layers, JSON, and a drawing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from qir.cost import COMPUTE, OVERHEAD, Cost, GraphCost
from qir.drawing import COLOURS, drawn, figure_of
from qir.report import fields_text, size_text
from qir.table import columns

_NANO: Final = 1000.0  # pJ in a nJ
_MICRO: Final = 1e6

_COLUMNS: Final[Sequence[tuple[str, Callable[[Cost], str]]]] = (
    ("MACs", lambda c: f"{c.macs:,}" if c.macs else "-"),
    ("cycles", lambda c: _number(c.cycles)),
    ("bound by", lambda c: c.bound),
    ("nJ", lambda c: _number(None if c.energy is None else c.energy / _NANO)),
    ("constants", lambda c: f"{c.constant_bytes:,}"),
    ("moved", lambda c: f"{c.moved_bytes:,}"),
    ("bit operations", lambda c: f"{c.bit_operations:,}" if c.bit_operations else "-"),
    ("LUT", lambda c: _number(c.lut)),
    ("DSP", lambda c: _number(c.dsp)),
    ("BRAM", lambda c: _number(c.bram)),
)
_WORDS: Final = ("bound by",)  # columns that hold no numbers


def cost_text(cost: GraphCost) -> str:
    """A line for each layer, their sums, and what they come to on the chip."""
    shown = [c for c in _COLUMNS if any(c[1](layer.cost) not in ("", "-") for layer in cost.layers)]
    rows = [[name for name, _ in shown] + ["layer"]]
    rows += [[show(layer.cost) for _, show in shown] + [layer.name] for layer in cost.layers]
    rows.append([show(cost.total) for _, show in shown] + [f"total of {len(cost.layers)} layers"])
    words = {i for i, (name, _) in enumerate(shown) if name in _WORDS}
    lines = columns(rows, set(range(len(shown))) - words)
    return "\n".join([*lines, "", fields_text(_fields(cost))])


def parts_text(parts: Mapping[str, float]) -> str:
    """The parts that a backend's own function gives."""
    return fields_text([(name, f"{value:,.6g}") for name, value in parts.items()])


def cost_json(cost: GraphCost) -> str:
    """All numbers, as JSON; null is what the target says nothing of."""
    found = {
        "graph": cost.graph,
        "target": cost.target,
        "clock": cost.clock,
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "constants_in": cost.homes.constants,
        "activations_in": cost.homes.activations,
        "misfits": list(cost.misfits),
        "total": _cost_fields(cost.total),
        "layers": [
            {"name": layer.name, "ops": [op.describe() for op in layer.ops], **_cost_fields(layer.cost)}
            for layer in cost.layers
        ],
    }
    return json.dumps(found, indent=2) + "\n"


def draw_cost(cost: GraphCost, kind: str) -> bytes:
    """A drawing as `.svg` or `.png`: what each layer takes in cycles, energy and bytes, and what bounds it.

    Raises QirError where matplotlib is not installed.
    """
    panels = _panels(cost)
    colours = _colours(cost)
    height = max(2.5, 0.25 * len(cost.layers) + 1.2)
    figure = figure_of(4.5 * len(panels), height)
    figure.suptitle(f"{cost.graph} on {cost.target}")
    places = range(len(cost.layers))
    bars = [colours.get(layer.cost.bound, COLOURS[0]) for layer in cost.layers]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.barh(places, values, color=bars)
        axis.set_xlabel(title)
    axes[0].set_yticks(places, [layer.name for layer in cost.layers], fontsize=7)
    axes[0].invert_yaxis()
    if colours:
        from matplotlib.patches import Patch

        patches = [Patch(color=colour, label=f"bound by {name}") for name, colour in colours.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    return drawn(figure, kind)


def _fields(cost: GraphCost) -> list[tuple[str, str]]:
    total, fields = cost.total, list[tuple[str, str]]()
    if cost.seconds is not None and cost.clock is not None:
        fields.append(("latency", f"{cost.seconds * 1000:.4g} ms at {cost.clock / _MICRO:,.6g} MHz, by roofline"))
    if total.energy is not None:
        fields.append(("energy", f"{total.energy / _MICRO:,.4g} uJ"))
    for name, size, home in (
        ("constants", total.constant_bytes, cost.homes.constants),
        ("activations", cost.peak_bytes, cost.homes.activations),
    ):
        fields.append((name, f"{size_text(size)}{' at the peak' * (name == 'activations')}{f', {home}' * bool(home)}"))
    fields += [("does not fit", text) for text in cost.misfits]
    stated = {"latency": total.cycles, "energy": total.energy}
    if unknown := [name for name, value in stated.items() if value is None]:
        fields.append(("not estimated", f"{' and '.join(unknown)}: {cost.target} states no costs for it"))
    return fields


def _cost_fields(cost: Cost) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(cost).items()}


def _panels(cost: GraphCost) -> list[tuple[str, list[float]]]:
    """What is drawn side by side: a title, and a number for each layer."""
    costs = [layer.cost for layer in cost.layers]
    panels: list[tuple[str, Sequence[float | None]]] = [
        ("cycles", [c.cycles for c in costs]),
        ("energy, nJ", [None if c.energy is None else c.energy / _NANO for c in costs]),
        ("DSP slices", [c.dsp for c in costs]),
        ("LUTs", [c.lut for c in costs]),
        ("constants, bytes", [c.constant_bytes for c in costs]),
    ]
    known = [(title, [v for v in values if v is not None]) for title, values in panels]
    return [(title, values) for title, values in known if len(values) == len(costs)]


def _colours(cost: GraphCost) -> dict[str, str]:
    """The colours of what bounds the layers: computation, overhead and memories in order."""
    found = dict.fromkeys(layer.cost.bound for layer in cost.layers if layer.cost.bound)
    memories = [name for name in found if name not in (COMPUTE, OVERHEAD)]
    order = [COMPUTE, OVERHEAD, *memories]
    return {name: COLOURS[order.index(name) % len(COLOURS)] for name in order if name in found}


def _number(value: float | None) -> str:
    """Up to four digits behind which nothing is, or whole thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
