"""What a certificate says, read from its JSON, and the ranges that it speaks of. Nothing here judges what is true."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qir.errors import QirError
from qir.ir import Value
from qir.types import zero_array

FORMAT: Final = "qir certificate"
VERSION: Final = 1
PARTS: Final = ("values", "accumulators", "lanes")
MEND: Final = "compile the model again"

#: The integers that a tensor may hold: one range for all of it, or one for each index of its last axis.
Span = list[range]
#: What follows of a result (None: there is no rule), and of the registers and sums on the way to it, by name.
Image = tuple[Span | None, dict[str, Span]]


@dataclass(frozen=True)
class Claim:
    """The bounds stated under a name, and what is stated beside them: the rule, its inputs and more."""

    span: Span
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Claims:
    """All that a certificate states: the sha256 of the files that it belongs to, and claims by part and name."""

    hashes: Mapping[str, Any]
    entries: Mapping[tuple[str, str], Claim]


def read_claims(text: str) -> Claims:
    """The claims of a certificate.

    Raises QirError for what is no JSON of this format and version, for a name that stands twice, and for bounds that
    are not integers with lo <= hi and a step, which is 0 only for a single value.
    """
    try:
        stated = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as fault:
        raise QirError(f"certificate: is no JSON that can be read, {fault}; {MEND}") from fault
    head = ("format", "version", "graph_sha256", "weights_sha256")
    if not isinstance(stated, dict) or set(stated) != {*head, *PARTS}:
        raise QirError(f"certificate: must state {', '.join((*head, *PARTS))} and nothing else; {MEND}")
    if stated["format"] != FORMAT or type(stated["version"]) is not int or stated["version"] != VERSION:
        raise QirError(f"certificate: is not {FORMAT!r} of version {VERSION}; {MEND}")
    entries = {}
    for part in PARTS:
        if not isinstance(stated[part], dict):
            raise QirError(f"certificate: {part} must be entries by name; {MEND}")
        for name, entry in stated[part].items():
            span = _span(entry) if isinstance(entry, dict) else None
            if span is None:
                raise QirError(
                    f"certificate: {part} {name!r} must state integers lo, hi and step, one of each or one a channel, "
                    f"with lo <= hi and a step that is 0 for a single value; {MEND}"
                )
            entries[part, name] = Claim(span, {k: v for k, v in entry.items() if k not in _BOUNDS})
    return Claims({key: stated[key] for key in head[2:]}, entries)


_BOUNDS = ("lo", "hi", "step")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _span(entry: Mapping[str, Any]) -> Span | None:
    ends = [e if isinstance(e := entry.get(field), list) else [e] for field in _BOUNDS]
    if any(type(number) is not int for end in ends for number in end) or len({len(end) for end in ends}) > 1:
        return None
    bounds = list(zip(*ends, strict=True))
    if not all((step > 0 and lo <= hi) or (step == 0 and lo == hi) for lo, hi, step in bounds):
        return None
    return [range(lo, hi + 1, step or 1) for lo, hi, step in bounds]


def between(lo: int, hi: int, step: int = 1) -> range:
    """The integers from lo on, in steps, up to hi."""
    return range(int(lo), int(hi) + 1, max(int(step), 1))


def hull(span: Span) -> tuple[int, int]:
    """The least and the greatest integer of all channels; 0 where there are none."""
    return min((r[0] for r in span), default=0), max((r[-1] for r in span), default=0)


def step_of(values: range) -> int:
    """The step of a range; 0 where it holds one integer."""
    return 0 if values[0] == values[-1] else values.step


def union(parts: Sequence[range]) -> range:
    """The smallest range that holds all of these."""
    lo, hi = hull([*parts])
    return between(lo, hi, math.gcd(*map(step_of, parts), *(r[0] - lo for r in parts)))


def channels(*spans: Span) -> list[tuple[range, ...]]:
    """The ranges of each channel side by side; a single range is that of every channel."""
    count = next((len(s) for s in spans if len(s) != 1), 1)
    return list(zip(*(s * count if len(s) == 1 else s for s in spans), strict=True))


def holds(stated: range, found: range) -> bool:
    """Whether all of `found` is in `stated`."""
    return found[0] in stated and found[-1] in stated and step_of(found) % stated.step == 0


def text_of(span: Span) -> str:
    """Bounds and steps of the first channels, for messages."""
    shown = ", ".join(f"[{r[0]}, {r[-1]}]" + (f" by {r.step}" if step_of(r) > 1 else "") for r in span[:8])
    return f"{shown} and {len(span) - 8} more" if len(span) > 8 else shown or "nothing"


def centred(value: Value, span: Span) -> Span:
    """The ranges of q - zero_point; channels of another axis than the last are not told apart."""
    zeros = zero_array(value.type.element).reshape(-1).tolist()
    if getattr(value.type.element, "axis", None) in (None, value.type.rank - 1):
        shifts = [range(z, z + 1) for z in zeros]
        return [between(r[0] - z[0], r[-1] - z[0], r.step) for r, z in channels(span, shifts)]
    return [between(r[0] - max(zeros), r[-1] - min(zeros)) for r in span]


def ends_of(span: Span, place: int) -> Any:
    """The first or the last integers of all channels, as Python ints."""
    return np.array([r[place] for r in span], object)
