"""Compares graphs of one op with ONNX Runtime, to the bit."""

from __future__ import annotations

from oracle.agreement import Agreement
from oracle.float32_graphs import Ints
from oracle.graph_to_onnx import OnnxRuntime, graph_to_onnx

from qir.ir import Graph


class Oracle(Agreement):
    """Runs graphs on ONNX Runtime and here."""

    def agree(self, graph: Graph, *feeds: Ints, sharp: bool = False) -> Ints:
        """The output of ONNX Runtime, which must be that of kernels and interpreter; `sharp` also rounds otherwise."""
        named = {f"x{i}": x for i, x in enumerate(feeds)}
        theirs = OnnxRuntime(graph_to_onnx(graph)).run(named)["y"]
        self.compare(graph, named, theirs, sharp)
        return theirs
