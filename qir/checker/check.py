"""The walk of the checker: every claim of a certificate, op by op, against what follows from those before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qir.checker.arithmetic import kept_ends
from qir.checker.claims import MEND, Claim, Image, Span, between, channels, holds, hull, read_claims, text_of
from qir.checker.correlated import tightened
from qir.checker.functionals import Known
from qir.checker.rules import image
from qir.errors import QirError
from qir.ir import Graph, Value
from qir.types import storage_of


def check_certificate(graph: Graph, text: str, *, graph_sha256: str, weights_sha256: str | None) -> list[str]:
    """Every false, missing or unknown claim of a certificate, and every fact of the graph that it does not support.

    The hashes are those of the files that the graph was read from. A looser bound that is true may stand.
    """
    try:
        stated = read_claims(text)
    except QirError as fault:
        return [str(fault)]
    check = _Check(graph, dict(stated.entries))
    for key, expected in (("graph_sha256", graph_sha256), ("weights_sha256", weights_sha256)):
        if stated.hashes[key] != expected:
            check.faults.append(f"certificate: its {key} is {stated.hashes[key]}, the file's is {expected}; {MEND}")
    return check.run()


class _Check:
    """One walk over a graph. What is known is what is stated, so that one lie is one fault."""

    def __init__(self, graph: Graph, claims: dict[tuple[str, str], Claim]) -> None:
        self.graph, self.claims = graph, claims
        self.faults: list[str] = []
        self.known = Known(graph)
        self.tight: Image = (None, {})

    def run(self) -> list[str]:
        for value in self.graph.inputs:
            self.value(value, None, None)
        for op in self.graph.ops:
            found, lanes = image(self.graph, op, [self.known.spans.get(v, []) for v in op.operands])
            stops = self.stops(op, found, lanes)
            self.tight = (found, lanes) if stops is None else tightened(self.known, op, (found, lanes), stops)
            if "unsaturated" in lanes:
                self.known.free[op.results[0]] = self.tight[1]["unsaturated"]
            for value in op.results:
                self.value(value, op, found)
            self.registers(op, lanes)
        return self.faults + [f"{part} {name!r}: the graph has no such thing; {MEND}" for part, name in self.claims]

    def stops(self, op: Any, found: Span | None, lanes: dict[str, Span]) -> set[str] | None:
        """The names of the values that claims which do not follow from the operands are affine functions of, if any."""
        name, names = op.results[0].name, set[str]()
        places = (("values", name, found), ("accumulators", name, lanes.get("partial")))
        for part, key, plain in (*places, ("lanes", f"{name}:unsaturated", lanes.get("unsaturated"))):
            claim = self.claims.get((part, key))
            if claim is None or claim.facts.get("rule") != "affine" or not self.are_known(claim):
                continue
            if (
                plain
                and len(claim.span) in (1, len(plain))
                and all(holds(a, b) for a, b in channels(claim.span, plain))
            ):
                continue
            names.update(claim.facts["inputs"])
        return names or None

    def value(self, value: Value, op: Any, found: Span | None) -> None:
        storage, claim = storage_of(value.type.element), self.claims.get(("values", value.name))
        if storage is None:
            return
        if storage.levels is not None:
            held = set(op.value.data.reshape(-1).tolist()) if op is not None and op.mnemonic == "const" else None
            if held is None or not held <= set(storage.levels):
                self.faults.append(f"%{value.name}: its type has levels, and it holds others; {MEND}")
        if found is None or (claim is not None and claim.facts.get("rule") == "type"):
            op, found = None, [between(storage.lo, storage.hi)]
        found = found if value.type.sample_size else []  # of what has no elements anything is true
        width = value.type.concrete(1)[-1] if value.type.rank else 1
        span = self.claim("values", value.name, op, found, width)
        room = (storage.lo, storage.hi) if value.type.sample_size else (-(1 << 62), 1 << 62)
        is_stored = room[0] <= hull(span)[0] and hull(span)[1] <= room[1]  # else a fault, or of no element
        self.known.spans[value] = span if is_stored else [between(storage.lo, storage.hi)]
        if value.type.sample_size:
            self.fit(f"%{value.name}: its type", storage, span)
        if value.range is not None:
            self.fit(f"%{value.name}: its range in the text", value.range, span)

    def registers(self, op: Any, lanes: dict[str, Span]) -> None:
        """Lanes, the accumulator, and every claim of the op that nothing overflows."""
        name = op.results[0].name
        for lane, found in lanes.items():
            part, key = ("accumulators", name) if lane == "partial" else ("lanes", f"{name}:{lane}")
            lanes[lane] = self.claim(part, key, op, found, len(found))
        self.known.lanes[op.results[0]] = lanes
        if getattr(op, "partial", None) is not None:
            self.fit(f"%{name}: the bound of its partial sums in the text", op.partial, lanes.get("partial"))
        bits = getattr(op, "channel_bits", None)
        if bits is not None and not all(
            _fit_bits(r, b[0]) for r, b in channels(lanes["partial"], [range(b, 65) for b in bits.data.tolist()])
        ):
            self.faults.append(f"%{name}: its channel_bits do not hold what is certified of its partial sums; {MEND}")
        if getattr(op, "overflow", None) == "none":
            room = getattr(op, "accumulator", None) or storage_of(op.results[0].type.element)
            self.fit(f"%{name}: the room of its overflow=none", room, lanes.get("partial", lanes.get("unsaturated")))
        if getattr(op, "product_overflow", None) == "none":
            self.fit(f"%{name}: the room of its product_overflow=none", op.product, lanes.get("entering"))

    def claim(self, part: str, name: str, op: Any, found: Span, width: int) -> Span:
        """The span stated under a name, which is a fault unless it holds what follows by `op`; the latter for none."""
        stated = self.claims.pop((part, name), None)
        facts = {"rule": op.mnemonic if op else "type", "inputs": [v.name for v in op.operands] if op else []}
        if stated is not None and op is not None and stated.facts.get("rule") == "affine" and self.are_known(stated):
            facts = {"rule": "affine", "inputs": stated.facts["inputs"]}
            lane = "partial" if part == "accumulators" else name.rpartition(":")[2]
            found = (self.tight[0] if part == "values" else self.tight[1].get(lane)) or found
        if part == "accumulators" and stated is not None:
            (lo, hi), (least, most) = hull(stated.span), kept_ends(op.accumulator, op.overflow)
            facts |= {"type": str(op.accumulator), "overflow": op.overflow, "order": op.order}
            facts |= {"partial": [lo, hi], "bits": max(hi, ~lo).bit_length() + 1, "idle": least <= lo and hi <= most}
        fault = ""
        if stated is None or len(stated.span) not in (1, width):
            stated, fault = Claim(found, {}), f"must be there, with one bound or {width}, and hold"
        elif differences := _differences(facts, stated.facts):
            fault = f"{differences}, and must hold"
        elif found and not all(holds(a, b) for a, b in channels(stated.span, found)):
            fault = f"states {text_of(stated.span)}, which does not hold"
            if op is not None and op.results[0].name in self.known.skipped:
                fault = "is affine in too many elements to be followed (use method=interval), and does not hold"
        if fault:
            self.faults.append(f"{part} {name!r}: {fault} what follows, {text_of(found)}; {MEND}")
        return stated.span

    def are_known(self, claim: Claim) -> bool:
        """Whether the inputs of a claim are values of the graph that something is stated of."""
        inputs, names = claim.facts.get("inputs"), {v.name for v in self.known.spans}
        return isinstance(inputs, list) and all(isinstance(name, str) and name in names for name in inputs)

    def fit(self, place: str, room: Any, span: Span | None) -> None:
        """A fault unless `room` holds what is certified."""
        lo, hi = hull(span or [])
        if span is None or not room.lo <= lo <= hi <= room.hi:
            found = "nothing" if span is None else f"[{lo}, {hi}]"
            self.faults.append(f"{place} is [{room.lo}, {room.hi}], but {found} is certified; {MEND}")


def _differences(wanted: Mapping[str, Any], stated: Mapping[str, Any]) -> str:
    """What is not stated as it must be; to JSON 1 and true are not the same."""
    texts = [{key: json.dumps(facts[key]) for key in facts} for facts in (wanted, stated)]
    keys = [key for key in {**wanted, **stated} if texts[0].get(key) != texts[1].get(key)]
    pairs = [[side.get(key, "nothing") for side in texts] for key in keys]
    return ", ".join(f"{key} must be {must} and is {found}" for key, (must, found) in zip(keys, pairs, strict=True))


def _fit_bits(values: range, bits: int) -> bool:
    return -(1 << (bits - 1)) <= values[0] and values[-1] < 1 << (bits - 1)
