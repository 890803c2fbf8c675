"""The demand engine: how much of each integer value later ops read, the other way round than `qir.proof`.

One backward walk applies each op's own rule (`Op.asked`); an op without one asks for everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qir.interval import EVERYTHING, Bounds
from qir.ir import Graph, Value
from qir.proof import Proof
from qir.types import storage_of


def demands(graph: Graph, proof: Proof) -> Mapping[Value, Bounds]:
    """For each integer value of a fixed-stage graph, bounds that it may be clamped to without a change of any output.

    They are per channel of the last axis or for the whole tensor. An end beyond the type says that all is asked for on
    that side, as outputs do; a value that nothing reads has no entry.
    """
    found: dict[Value, Bounds] = {v: EVERYTHING for v in graph.outputs if storage_of(v.type.element) is not None}
    for op in reversed(graph.ops):
        integers = [v for v in op.operands if storage_of(v.type.element) is not None]
        if not integers or not any(r in found or storage_of(r.type.element) is None for r in op.results):
            continue
        if op.is_float or len(op.results) != 1 or op.result not in found:
            parts: tuple[Bounds, ...] = (EVERYTHING,) * len(op.operands)
        else:
            parts = op.asked(found[op.result], [proof.bounds.get(v, EVERYTHING) for v in op.operands])
        for value, part in zip(op.operands, parts, strict=True):
            if value in integers:
                found[value] = found[value].union(part) if value in found else part
    return MappingProxyType(found)
