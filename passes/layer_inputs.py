"""What the weights of a layer multiply, as the rows of a matrix, and its moments over calibration samples."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.opdef import pad_spatial, window_view
from qir.ops.float_nn import Conv
from qir.passes.layer_walk import Layer, Part

Tensor = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

#: Positions that moments are taken over, in all: so many, and so many for each weight of an output where that is more.
_POSITIONS: Final = 1 << 16
_POSITIONS_PER_WEIGHT: Final = 16

#: The multiple of the mean variance that is added to variances where nothing else is asked for. Top-1 and errors of
#: outputs hardly depend on it from 1e-3 to 0.1.
DAMPING: Final = 0.03
_LEAST_VARIANCE: Final = 2.0**-20  # of the mean square


def has_rows(layer: Layer) -> bool:
    """Whether `rows_of` and `patches` take a layer: not a MatMul with matrices of its own for parts of its input, nor
    one whose input has no batch.
    """
    source, weight = layer.operands[:2]
    return source.type.is_batched and (isinstance(layer, Conv) or weight.type.rank == 2)


def rows_of(layer: Layer, weight: Tensor) -> Tensor:
    """Weights as [groups, outputs, inputs]: [M, C / groups, kernel] of Conv, [K, N] of MatMul."""
    if isinstance(layer, Conv):
        return np.reshape(weight, (layer.groups, weight.shape[0] // layer.groups, -1))
    return np.asarray(weight.T[None])


def from_rows(layer: Layer, rows: Tensor) -> Tensor:
    """The inverse of `rows_of`."""
    if isinstance(layer, Conv):
        return np.reshape(rows, layer.operands[1].type.concrete(1))
    return np.asarray(rows[0].T)


def positions_of(layer: Layer) -> int:
    """The number of outputs of each channel that a sample has, of a layer whose result is batched."""
    shape = layer.result.type.concrete(1)
    return math.prod(shape[2:] if isinstance(layer, Conv) else shape[1:-1])


def patches(layer: Layer, source: Tensor, chosen: npt.NDArray[np.int64] | None) -> Tensor:
    """What each output of a layer multiplies: [positions, groups, inputs], padding as zeros.

    Positions are numbered through samples, then rows and columns of the output; `chosen` are those wanted.
    """
    if not isinstance(layer, Conv):
        flat = source.reshape(-1, 1, source.shape[-1])
        return flat if chosen is None else flat[chosen]
    window = layer.window
    outputs = window.output(source.shape[2:])
    view = window_view(pad_spatial(source, window, source.shape[2:], outputs, 2, 0.0), window, outputs, 2)
    rank = len(outputs)
    view = view.transpose(0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    if chosen is not None:
        view = view[np.unravel_index(chosen, (source.shape[0], *outputs))]
    return view.reshape(-1, layer.groups, source.shape[1] // layer.groups * math.prod(window.kernel))


class Moments:
    """Means and covariances of what the weights of a layer multiply: in floating point (x), and rounded (y).

    Large layers take a part of the positions, the same ones in every run.
    """

    def __init__(self, layer: Layer, samples: int) -> None:
        self._layer = layer
        groups, _, inputs = rows_of(layer, np.empty(layer.operands[1].type.concrete(1), np.bool_)).shape
        most = max(_POSITIONS, _POSITIONS_PER_WEIGHT * inputs)
        self._share = most / (samples * positions_of(layer))
        self._count = 0
        self._x, self._y = np.zeros((2, groups, 1, inputs))
        self._yx, self._yy = np.zeros((2, groups, inputs, inputs))

    def add(self, part: Part) -> None:
        """Take some samples in."""
        source = self._layer.operands[0]
        total = len(part.real[source]) * positions_of(self._layer)
        chosen = None
        if self._share < 1:
            random = np.random.default_rng(part.number)
            chosen = np.sort(random.choice(total, math.ceil(total * self._share), replace=False))
        x, y = (
            patches(self._layer, values[source], chosen).transpose(1, 0, 2).astype(np.float64) for values in part.sides
        )
        self._count += x.shape[1]
        self._x += x.sum(axis=1, keepdims=True)
        self._y += y.sum(axis=1, keepdims=True)
        turned = y.transpose(0, 2, 1)
        added = turned @ y
        self._yy += added
        self._yx += added if part.real is part.rounded else turned @ x

    @property
    def means(self) -> tuple[Vector, Vector]:
        """Of x and of y: [groups, 1, inputs]."""
        return self._x / self._count, self._y / self._count

    def covariances(self, damping: float) -> tuple[Vector, Vector]:
        """Of y with x, and of y with itself: [groups, inputs, inputs], each with so many mean variances of y added to
        its diagonal.

        The sum of products is a difference of large numbers where inputs hardly vary: a variance counts as 2^-20 of the
        mean square at least, so that what is added exceeds the rounding and the latter is positive definite. Where all
        inputs are 0, a variance is 1.
        """
        x, y = self.means
        turned = y.transpose(0, 2, 1)
        both, own = self._yx / self._count - turned * x, self._yy / self._count - turned * y
        square, variance = (np.diagonal(a, axis1=1, axis2=2).mean(axis=-1) for a in (self._yy / self._count, own))
        variance = np.maximum(variance, square * _LEAST_VARIANCE)
        added = damping * np.where(variance > 0, variance, 1.0)[:, None, None] * np.eye(own.shape[-1])
        return both + added, own + added
