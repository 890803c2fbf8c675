"""The certificate of a program: every bound that its proof rests on, with the rule and the inputs it follows from.

`certificate.json` lies beside the text and the weights and names their sha256. It states, an entry a line, under

- `values`, for each integer value: that it is `lo` plus a multiple of `step`, at most `hi`;
- `accumulators`, for each sum: the same of every partial sum in the order of the op, before a step narrows it, and
  of all channels together `partial`; the type, the overflow mode and the order of the accumulator, the bits of two's
  complement that partial sums take, and whether the overflow mode is idle;
- `lanes`, for each other register on the way to a result, named `value:lane`: exact products (`product`), sums of two
  of them (`pair`), products before they are narrowed one by one (`entering`), the operand of requantize shifted left
  (`shifted`), a result before it is narrowed (`unsaturated`), the sum of a pooling window (`sum`).

Bounds are integers, or lists of one for each index of the last axis. `rule` is the op that makes them from the bounds
of `inputs`; `affine` says that they follow from a linear function of `inputs`, which may lie further back, and `type`
that nothing is known but the type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qir.checker import check_certificate
from qir.checker.claims import FORMAT, VERSION, read_claims
from qir.errors import CertificateError
from qir.idle import is_idle
from qir.interval import Bounds, Interval, bits_of_interval
from qir.ir import Graph, Op, OpBounds
from qir.ops.accumulate import Accumulating
from qir.proof import Proof
from qir.serialization import CERTIFICATE_FILE, sidecar_of, write_bytes
from qir.verifier import verify

Entry = dict[str, Any]

#: Findings that an error lists; one lie is one finding, but another program's certificate is nothing but lies.
_MOST_FINDINGS: Final = 20


def make_certificate(graph: Graph, proof: Proof, graph_sha256: str, weights_sha256: str | None) -> str:
    """The certificate of a fixed-stage graph as JSON; the hashes are of its text and of its sidecar, if it has one."""
    parts: dict[str, dict[str, Entry]] = {"values": {}, "accumulators": {}, "lanes": {}}
    producers = graph.producers
    for value in graph.values():
        if value in proof.bounds:
            op = producers.get(value)
            follows = _follows(op, proof.steps[op]) if op is not None and op in proof.steps else _follows(None)
            parts["values"][value.name] = follows | _bounds(proof.bounds[value])
    for op, step in proof.steps.items():
        name = op.results[0].name
        if isinstance(op, Accumulating):
            parts["accumulators"][name] = _accumulator(op, step)
        for lane, interval in _lanes(op, step):
            follows = _follows(op, step if lane == "unsaturated" else None)
            parts["lanes"][f"{name}:{lane}"] = follows | _bounds(Bounds.of(interval.lo, interval.hi))
    head = {"format": FORMAT, "version": VERSION, "graph_sha256": graph_sha256, "weights_sha256": weights_sha256}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for part, entries in parts.items():
        inside = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
        lines.append(f"{json.dumps(part)}: {{\n{inside}\n}}" if inside else f"{json.dumps(part)}: {{}}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _follows(op: Op | None, step: OpBounds | None = None) -> Entry:
    if step is not None and step.sources:
        return {"rule": "affine", "inputs": [*step.sources]}
    return {"rule": op.mnemonic if op else "type", "inputs": [v.name for v in op.operands] if op else []}


def _bounds(bounds: Bounds) -> Entry:
    return {"lo": bounds.lo.tolist(), "hi": bounds.hi.tolist(), "step": bounds.steps.tolist()}


def _accumulator(op: Accumulating, step: OpBounds) -> Entry:
    assert step.partial is not None
    partials = step.channel_partials or Bounds.of(step.partial.lo, step.partial.hi)
    return (
        _follows(op, step)
        | {"type": str(op.accumulator), "overflow": str(op.overflow), "order": str(op.order)}
        | {"partial": [int(step.partial.lo), int(step.partial.hi)]}
        | {"bits": bits_of_interval(step.partial), "idle": is_idle(op, step)}
        | _bounds(partials)
    )


def _lanes(op: Op, step: OpBounds) -> Iterator[tuple[str, Interval]]:
    yield from step.lanes.items()
    if step.product is not None:
        yield "entering", step.product
    if step.unsaturated is not None and not isinstance(op, Accumulating):
        yield "unsaturated", step.unsaturated


def write_certificate(graph: Graph, proof: Proof, text: Path) -> None:
    """Write `certificate.json` beside a text of the graph that is written. Raises QirError when it cannot be."""
    write_bytes(text.with_name(CERTIFICATE_FILE), make_certificate(graph, proof, *_hashes(text)).encode())


def hold_to_certificate(graph: Graph, text: Path) -> int:
    """Hold a graph to the certificate beside the text that it was read from, by the independent checker.

    Returns the number of claims. Raises VerifyError when the graph is not legal, and CertificateError when there is no
    certificate, it cannot be read, or something in it or in the text is false.
    """
    verify(graph)
    path = text.with_name(CERTIFICATE_FILE)
    try:
        certificate = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise CertificateError(f"cannot read {path}: {reason}; compile the model again") from fault
    graph_sha256, weights_sha256 = _hashes(text)
    found = check_certificate(graph, certificate, graph_sha256=graph_sha256, weights_sha256=weights_sha256)
    if found:
        lines = "".join(f"\n  {fault}" for fault in found[:_MOST_FINDINGS])
        if len(found) > _MOST_FINDINGS:
            lines += f"\n  and {len(found) - _MOST_FINDINGS} more"
        raise CertificateError(f"{path}: does not certify {text.name}, {len(found)} finding(s):{lines}")
    return len(read_claims(certificate).entries)


def _hashes(text: Path) -> tuple[str, str | None]:
    data = text.read_bytes()
    sidecar = sidecar_of(data.decode())
    weights = hashlib.sha256((text.parent / sidecar).read_bytes()).hexdigest() if sidecar else None
    return hashlib.sha256(data).hexdigest(), weights
