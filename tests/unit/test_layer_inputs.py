"""What weights multiply: rows times patches are the layer, whatever its window; moments are those of the patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qir.ir import Graph
from qir.ops.float_nn import Conv, MatMul
from qir.passes import layer_inputs
from qir.passes.layer_inputs import Moments, from_rows, has_rows, patches, positions_of, rows_of
from qir.passes.layer_walk import Layer, Part
from qir.rewrite import GraphBuilder
from qir.types import BATCH, TensorType

RANDOM = np.random.default_rng(0)


def layer(source: tuple[int, ...], weight: tuple[int, ...], **window: Any) -> Layer:
    builder = GraphBuilder("one")
    x, w = builder.input("x", TensorType((BATCH, *source))), builder.input("w", TensorType(weight))
    builder.emit(Conv if window else MatMul, [x, w], **window)
    (op,) = builder.ops
    assert isinstance(op, Conv | MatMul)
    return op


LAYERS = {
    "1-d, strided, padded on one side": layer((3, 11), (4, 3, 3), strides=(2,), pads=(2, 0), dilations=(1,), groups=1),
    "padded": layer((3, 6, 5), (4, 3, 3, 2), strides=(1, 1), pads=(1, 0, 2, 1), dilations=(1, 1), groups=1),
    "dilated, strided": layer((2, 9, 9), (3, 2, 3, 3), strides=(2, 3), pads=(0,) * 4, dilations=(2, 1), groups=1),
    "grouped": layer((6, 5, 5), (4, 3, 3, 3), strides=(1, 1), pads=(1,) * 4, dilations=(1, 1), groups=2),
    "depthwise": layer((3, 5, 5), (6, 1, 3, 3), strides=(1, 1), pads=(1,) * 4, dilations=(1, 1), groups=3),
    "pointwise": layer((3, 4, 4), (5, 3, 1, 1), strides=(1, 1), pads=(0,) * 4, dilations=(1, 1), groups=1),
    "matmul": layer((7,), (7, 4)),
    "matmul of many rows": layer((2, 3, 7), (7, 4)),
}


def data(op: Layer, samples: int = 4) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    x, w = (RANDOM.uniform(-1, 1, v.type.concrete(samples)).astype(np.float32) for v in op.operands)
    return x, w


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_patches_are_the_layer(name: str) -> None:
    op = LAYERS[name]
    x, w = data(op)
    expected = op.compute(x, w)
    channels_last = np.moveaxis(expected, 1, -1) if isinstance(op, Conv) else expected
    flat = channels_last.reshape(-1, channels_last.shape[-1])
    assert len(flat) == len(x) * positions_of(op)
    rows = rows_of(op, w)
    found = np.einsum("pgi,goi->pgo", patches(op, x, None), rows).reshape(flat.shape)
    np.testing.assert_allclose(found, flat, rtol=0, atol=1e-5)
    assert np.array_equal(from_rows(op, rows), w)
    chosen = np.array([0, 3, len(flat) - 1])
    assert np.array_equal(patches(op, x, chosen), patches(op, x, None)[chosen])


def part(op: Layer, number: int, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> Part:
    return Part(number, len(x), {op.operands[0]: x}, {op.operands[0]: y})


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_all_patches(name: str) -> None:
    op = LAYERS[name]
    x, y = data(op)[0], data(op)[0]
    moments = Moments(op, samples=4)
    moments.add(part(op, 0, x[:1], y[:1]))
    moments.add(part(op, 1, x[1:], y[1:]))
    p, q = (patches(op, a, None).astype(np.float64) for a in (x, y))
    for found, expected in zip(moments.means, (p, q), strict=True):
        np.testing.assert_allclose(found[:, 0], expected.mean(axis=0), atol=1e-12)
    p, q = p - p.mean(axis=0), q - q.mean(axis=0)
    added = 0.5 * (q * q).mean(axis=(0, 2))[:, None, None] * np.eye(q.shape[-1])
    for found, other in zip(moments.covariances(0.5), (p, q), strict=True):
        np.testing.assert_allclose(found, np.einsum("pgi,pgj->gij", q, other) / len(q) + added, atol=1e-12)


def test_large_layers_take_the_same_part_of_the_positions_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "_POSITIONS", 30)
    monkeypatch.setattr(layer_inputs, "_POSITIONS_PER_WEIGHT", 1)
    op = LAYERS["depthwise"]
    x = data(op)[0]
    found = [Moments(op, samples=4) for _ in range(2)]
    for moments in found:
        moments.add(part(op, 0, x, x))
    assert all(np.array_equal(a, b) for a, b in zip(found[0].covariances(1), found[1].covariances(1), strict=True))
    whole = Moments(op, samples=1)  # 25 positions, which are fewer than 30
    whole.add(part(op, 0, x[:1], x[:1]))
    np.testing.assert_allclose(whole.means[0][:, 0], patches(op, x[:1], None).mean(axis=0), atol=1e-6)
    every = patches(op, x, None).mean(axis=0)
    assert 0 < np.abs(found[0].means[0][:, 0] - every).max() < 0.5


def test_what_has_no_rows() -> None:
    builder = GraphBuilder("none")
    x, fixed = builder.input("x", TensorType((BATCH, 3, 2, 4))), builder.input("y", TensorType((2, 4)))
    builder.emit(MatMul, [x, builder.input("v", TensorType((3, 4, 5)))])
    builder.emit(MatMul, [fixed, builder.input("w", TensorType((4, 5)))])
    graph: Graph = builder.finish([], [])
    assert [has_rows(op) for op in graph.ops if isinstance(op, MatMul)] == [False, False]
    assert all(map(has_rows, LAYERS.values()))
