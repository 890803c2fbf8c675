"""Budgets as text: `weights:0.5x`, half of what the default widths take, `latency:120us`, `dsp:96`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from qir.errors import PassError
from qir.passes.widths.costs import Metric
from qir.passes.widths.quality import Quality, loss_of_floor, quality_of

_BYTES: Final = {"B": Fraction(1), "KiB": Fraction(1024), "MiB": Fraction(1 << 20)}
_PREFIXES: Final = {"": Fraction(1), "m": Fraction(1, 10**3), "u": Fraction(1, 10**6), "n": Fraction(1, 10**9)}
_UNITS: Final = {
    **dict.fromkeys((Metric.WEIGHTS, Metric.CONSTANTS, Metric.PEAK, Metric.MOVED), _BYTES),
    Metric.LATENCY: {f"{p}s": f for p, f in _PREFIXES.items()},
    Metric.ENERGY: {f"{p}J": f for p, f in _PREFIXES.items()},
}
_RELATIVE: Final = "x"
_BUDGET: Final = re.compile(r"(?:(?P<metric>[a-z_]+):)?(?P<amount>\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?P<unit>[A-Za-z]*)")


@dataclass(frozen=True)
class BudgetText:
    """The most of a metric: in its unit, or `relative` to what the default widths take."""

    metric: Metric
    amount: Fraction
    relative: bool


def parse_budget(text: str) -> BudgetText:
    """The budget that a text gives: `metric:amount` and a unit, or `x`; a bare number is `weights:` so many `x`.

    Raises PassError for an unknown metric or unit and for any other text.
    """
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise PassError(
            f"budget {text!r} is not of the form metric:amount, such as weights:0.5x, latency:120us or dsp:96"
        )
    metric, unit = metric_of(match["metric"] or Metric.WEIGHTS), match["unit"]
    if match["metric"] is None and unit not in ("", _RELATIVE):
        raise PassError(f"budget {text!r} names no metric; write weights:{text}, or another of: {', '.join(Metric)}")
    relative = unit == _RELATIVE or match["metric"] is None
    units = {"": Fraction(1), _RELATIVE: Fraction(1), **_UNITS.get(metric, {})}
    if unit not in units:
        listed = ", ".join(u for u in units if u)
        raise PassError(f"budget {text!r}: {metric} has no unit {unit!r}; there are: {listed}")
    return BudgetText(metric, Fraction(match["amount"]) * units[unit], relative)


def metric_of(name: str) -> Metric:
    """The metric of this name. Raises PassError, which lists those there are."""
    if name not in tuple(Metric):
        raise PassError(f"unknown metric {name!r}; there are: {', '.join(Metric)}")
    return Metric(name)


def parse_floor(text: str) -> tuple[Quality, Fraction]:
    """A measure of quality and the most loss that `sqnr:30`, in dB, or `kl:0.01`, in nats, leaves.

    Raises PassError for an unknown measure and for any other text.
    """
    name, _, amount = text.partition(":")
    quality = quality_of(name)
    try:
        return quality, loss_of_floor(quality, float(amount))
    except (ValueError, OverflowError) as fault:
        raise PassError(f"floor {text!r} is not of the form measure:amount, such as sqnr:30 or kl:0.01") from fault
