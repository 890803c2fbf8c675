"""Compares what another runtime gives with kernels and interpreter, and sees that the comparison could have failed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from oracle.float32_graphs import Ints, both, rounded_otherwise

from qir.interpreter import interpret
from qir.ir import Graph

LEAST_OUTPUTS = 10_000


class Agreement:
    """Counts the outputs, all of which agreed, and those that another rounding would have changed."""

    def __init__(self) -> None:
        self.outputs = 0
        self.differ: list[list[int]] = []

    def compare(self, graph: Graph, feeds: Mapping[str, Ints], theirs: Ints, sharp: bool = False) -> None:
        """The output y of kernels and interpreter must be `theirs`; `sharp` also rounds otherwise."""
        ours = both(graph, feeds)
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        assert int((theirs != ours).sum()) == 0
        if sharp:
            self.differ.append([int((interpret(g, feeds)["y"] != theirs).sum()) for g in rounded_otherwise(graph)])
        self.outputs += theirs.size

    def finish(self) -> None:
        """Enough was compared, and where it was sharp, each other rounding would have given other outputs."""
        assert self.outputs >= LEAST_OUTPUTS
        differ = np.sum(self.differ, axis=0)
        changes = f"ties away from zero, lesser and greater multipliers change {differ} outputs"
        assert not self.differ or np.all(differ > 0), changes
