"""A small network, compiled for a target by the default pipeline."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.compiler import compile as compile_graph
from qir.ir import Graph, Value
from qir.ops.float_elementwise import Add, Relu
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import MaxPool
from qir.ops.movement import Reshape
from qir.pass_manager import integer_feeds
from qir.program import Program
from qir.rewrite import GraphBuilder
from qir.target import Target
from qir.testing.maker import Case, batches
from qir.testing.numbers import patterns
from qir.types import BATCH, TensorType, storage_of

Tensor = npt.NDArray[Any]

_SHAPE: Final = (2, 8, 6)
_WINDOW: Final[dict[str, Any]] = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}


def compiled_case(target: Target, random: np.random.Generator) -> Case:
    """The program on images like those that calibrated it, and on adversarial integers."""
    graph = compiled_program(target, random).graph
    (x,) = graph.inputs
    storage = storage_of(x.type.element)
    assert storage is not None
    real = integer_feeds(graph, {x.name: _images(random)})[x.name]
    rows = patterns(storage, x.type.sample_size, 0, random).astype(storage.dtype).reshape(-1, *_SHAPE)
    return Case(graph, batches({x.name: np.concatenate([real, rows])}))


def compiled_program(target: Target, random: np.random.Generator) -> Program:
    """Convolutions with a shortcut around the depthwise one, pooling and a classifier."""
    return compile_graph(_network(random), target, [{"x": _images(random)} for _ in range(4)])


def _images(random: np.random.Generator) -> Tensor:
    return random.normal(0, 1, (8, *_SHAPE)).astype(np.float32)


def _network(random: np.random.Generator) -> Graph:
    b = GraphBuilder("conformance")

    def constant(*shape: int) -> Value:
        fan_in = max(1, int(np.prod(shape[1:])))
        data = random.normal(0, fan_in**-0.5, shape).astype(np.float32)
        return b.constant(Array(data), TensorType(shape), "k")

    x = b.input("x", TensorType((BATCH, *_SHAPE)))
    first = b.emit(Relu, [b.emit(Conv, [x, constant(5, 2, 3, 3), constant(5)], groups=1, **_WINDOW)])
    own = b.emit(Conv, [first, constant(5, 1, 3, 3), constant(5)], groups=5, **_WINDOW)
    added = b.emit(Relu, [b.emit(Add, [first, own])])
    halved = b.emit(MaxPool, [added], kernel=(2, 2), **(_WINDOW | {"strides": (2, 2), "pads": (0, 0, 0, 0)}))
    logits = b.emit(MatMul, [b.emit(Reshape, [halved], shape=(60,)), constant(60, 7), constant(7)])
    return b.finish([logits], ["y"])
