"""fold-constants: evaluates float ops whose operands are all constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.interpreter import evaluate_op
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.pass_manager import Pass, PassContext
from qir.rewrite import Rewriter, rewrite

#: Results over this many elements (64 MiB of float32) stay computed: a constant would bloat the program.
LARGEST_RESULT: Final = 1 << 24

Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replaces float ops on constants by constants, with the bits that the op itself computes.

    An op stays where its result would be too large, or not finite: calibration then names the value.
    """

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The folded graph; the same object where nothing folds."""
        folded = dict(_folded(graph))
        context.note(f"{len(folded)} ops folded")
        if not folded:
            return graph

        def visit(rewriter: Rewriter, op: Op) -> bool:
            if op not in folded:
                return False
            for value, array in zip(op.results, folded[op], strict=True):
                data = Array(array, value.name)
                name = rewriter.claim(value)
                new = rewriter.emit(Const, (), value=data, types=(value.type,), name=name, location=op.location)
                rewriter.set(value, new)
            return True

        return rewrite(graph, visit)


def _folded(graph: Graph) -> Iterator[tuple[Op, tuple[Tensor, ...]]]:
    known: dict[Value, Tensor] = {value: array.data for value, array in graph.constants.items()}
    for op in graph.ops:
        if isinstance(op, Const) or not all(v in known for v in op.operands):
            continue
        if sum(v.type.sample_size for v in op.results) > LARGEST_RESULT:
            continue
        with np.errstate(all="ignore"):  # what comes out not finite is left alone
            arrays = evaluate_op(op, [known[v] for v in op.operands])
        if all(np.isfinite(a).all() for a in arrays):
            known.update(zip(op.results, arrays, strict=True))
            yield op, arrays
