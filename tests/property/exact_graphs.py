"""Random typed graphs whose every real value is a whole number, so that no integer op has anything to round.

On them the integer program must give exactly what the typed graph gives: whatever differs is a wrong layout, operand,
bound or zero point, never a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from qir.arrays import Array
from qir.errors import RewriteError
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.float_elementwise import Add, Clip, Div, HardSigmoid, LeakyRelu, Mul, PRelu, Relu, Sub
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.ops.float_pool import ArgMax, AveragePool, MaxPool, ReduceMean
from qir.ops.movement import Concat, Gather, Pad, Reshape, Slice, Transpose
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, S8, S32, S64, AffineType, ElementType, TensorType, affine

WEIGHTS = S8.narrowed(-127, 127)
SHAPES = [(4, 6, 5), (3, 1, 7), (1, 4, 4), (5, 8), (2, 1), (6,)]


class ExactMaker:
    """Builds a random graph step by step on scale 1; every number comes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.builder = GraphBuilder("exact", Stage.TYPED)
        self.x = self.builder.input("x", TensorType((BATCH, *self.pick(SHAPES)), self.whole()))
        self.values = [self.x]

    def pick(self, choices: Any) -> Any:
        return choices[self.random.integers(len(choices))]

    def whole(self) -> AffineType:
        """Whole numbers, about a zero point or another."""
        return affine(S8, 1.0, self.pick([0, 0, -7, 20]))

    @property
    def value(self) -> Value:
        """The value that the next step takes: mostly the last one."""
        return self.values[-1] if self.random.integers(4) else self.pick(self.values)

    def emit(
        self, op_class: type[Op], *operands: Value, element: ElementType | None = None, **attributes: Any
    ) -> Value:
        name = f"{op_class.mnemonic.lower()}{len(self.builder.ops)}"
        kinds = [element or self.whole()]
        value = self.builder.emit(op_class, operands, elements=kinds, name=name, location=name, **attributes)
        if element is None:
            self.values.append(value)
        return value

    def constant(self, data: Any, element: AffineType | None = None) -> Value:
        array = np.asarray(data, np.float32)
        return self.builder.constant(Array(array), TensorType(array.shape, element or self.whole()), "k")

    def numbers(self, low: int, high: int, *shape: int) -> npt.NDArray[np.float32]:
        return self.random.integers(low, high, shape, endpoint=True).astype(np.float32)

    def clip(self) -> tuple[float, float] | None:
        bounds = [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (3.0, 3.4e38), (-5.0, 200.0)]
        return bounds[self.random.integers(len(bounds))] if self.random.integers(4) else None

    @staticmethod
    def sizes(value: Value) -> tuple[int, ...]:
        return tuple(int(d) for d in value.type.shape[1:])

    # Steps; those that do not suit the value leave it alone

    def conv(self) -> None:
        x = self.value
        if x.type.rank not in (3, 4):
            return
        (channels, *spatial), rank = self.sizes(x), x.type.rank - 2
        groups = self.pick([g for g in range(1, channels + 1) if channels % g == 0])
        outputs = groups * int(self.random.integers(1, 4))
        kernel = [int(self.random.integers(1, 4)) for _ in spatial]
        pads = [int(p) for p in self.random.integers(0, 3, 2 * rank)]
        dilations = [int(d) for d in self.random.integers(1, 3, rank)]
        if any(s + pads[i] + pads[rank + i] < (kernel[i] - 1) * dilations[i] + 1 for i, s in enumerate(spatial)):
            return
        axis = self.pick([None, 0])
        scales = np.full(outputs if axis == 0 else (), 1.0)
        weight = self.constant(
            self.numbers(-1, 1, outputs, channels // groups, *kernel), affine(WEIGHTS, scales, 0, axis)
        )
        bias = [self.constant(self.numbers(-9, 9, outputs), affine(S32, scales, 0, axis))]
        self.emit(
            Conv,
            x,
            weight,
            *bias[: self.random.integers(2)],
            groups=groups,
            strides=tuple(int(s) for s in self.random.integers(1, 3, rank)),
            pads=tuple(pads),
            dilations=tuple(dilations),
            clip=self.clip(),
        )

    def matmul(self) -> None:
        x = self.value
        if x.type.rank < 2 or x.type.shape[-1] == BATCH:
            return
        depth, outputs = int(x.type.shape[-1]), int(self.random.integers(1, 6))
        axis = self.pick([None, 1])
        scales = np.full(outputs if axis == 1 else (), 1.0)
        weight = self.constant(self.numbers(-1, 1, depth, outputs), affine(WEIGHTS, scales, 0, axis))
        bias_axis = None if axis is None else 0
        bias = [self.constant(self.numbers(-9, 9, outputs), affine(S32, scales, 0, bias_axis))]
        self.emit(MatMul, x, weight, *bias[: self.random.integers(2)], clip=self.clip())

    def square(self) -> None:
        """A product of two activations, of a constant and an activation, or of an activation and itself, turned."""
        x = self.value
        rank = x.type.rank
        if rank < 3:
            return
        turned = self.emit(Transpose, x, perm=(*range(rank - 2), rank - 1, rank - 2))
        rows = int(x.type.shape[-2])
        left = self.pick([x, self.constant(self.numbers(-1, 1, 3, int(x.type.shape[-1])))])
        product = self.emit(MatMul, left, turned, clip=self.clip())
        assert product.type.shape[-1] == rows

    def arithmetic(self) -> None:
        x, op_class = self.value, self.pick([Add, Sub, Mul])
        other = self.constant(self.numbers(-3, 3, *self.broadcast(x)))
        partners = [v for v in self.values if v.type.shape == x.type.shape]
        operands = [x, self.pick([other, *partners])]
        self.emit(op_class, *(operands if self.random.integers(2) else operands[::-1]), clip=self.clip())

    def broadcast(self, x: Value) -> tuple[int, ...]:
        """A shape of any rank up to that of x, which broadcasts to it."""
        sizes = (1, *self.sizes(x))
        kept = [s if self.random.integers(2) else 1 for s in sizes]
        return tuple(kept[int(self.random.integers(len(kept) + 1)) :])

    def partial_sum(self) -> None:
        """Operands of which the one broadcasts to the other, or each to the result."""
        x = self.value
        rank = x.type.rank
        if rank < 3:
            return
        axes = [a for a in range(1, rank) if self.random.integers(2)]
        zeros, ones = (0,) * len(axes), (1,) * len(axes)
        reduced = self.emit(Slice, x, starts=zeros, ends=ones, axes=tuple(axes), steps=ones)
        self.emit(self.pick([Add, Sub]), reduced, x, clip=None)

    def divide(self) -> None:
        x = self.value
        self.emit(Div, x, self.constant(self.random.choice([-1, 1], self.broadcast(x))), clip=self.clip())

    def activation(self) -> None:
        x = self.value
        kind = self.random.integers(5)
        if kind == 0:
            self.emit(Relu, x)
        elif kind == 1:
            low, high = self.pick([(-3.0, 2.0), (0.0, 6.0), (-math.inf, 4.0), (-2.0, 3.4e38), (5.0, 4.0)])
            self.emit(Clip, x, minimum=low, maximum=high)
        elif kind == 2:
            self.emit(LeakyRelu, x, alpha=self.pick([2.0, -1.0, 0.0]))
        elif kind == 3:
            self.emit(HardSigmoid, x, alpha=1.0, beta=0.0)
        else:
            channels = int(x.type.shape[1]) if x.type.rank > 1 else 1
            shape = self.pick([(), (channels, *(1,) * (x.type.rank - 2))]) if x.type.rank > 1 else ()
            self.emit(PRelu, x, self.constant(self.numbers(-2, 2, *shape)))

    def pool(self) -> None:
        x = self.value
        if x.type.rank not in (3, 4):
            return
        spatial = self.sizes(x)[1:]
        kernel = tuple(int(self.random.integers(1, 4)) for _ in spatial)
        pads = tuple(int(self.random.integers(0, k)) for k in kernel * 2)
        if any(s < k for s, k in zip(spatial, kernel, strict=True)):
            return
        strides = tuple(int(s) for s in self.random.integers(1, 4, len(kernel)))
        with suppress(RewriteError):  # a window on padding alone
            self.emit(
                MaxPool,
                x,
                kernel=kernel,
                strides=strides,
                pads=pads,
                dilations=(1,) * len(kernel),
                ceil_mode=bool(self.random.integers(2)),
            )

    def average(self) -> None:
        """Multiples of four, four at a time; where padding does not count, there is none."""
        x = self.value
        if x.type.rank not in (3, 4) or any(s < 4 for s in self.sizes(x)[1:]):
            return
        rank = x.type.rank - 2
        kernel = (2, 2) if rank == 2 else (4,)
        small = self.emit(Clip, x, minimum=-24.0, maximum=24.0)
        fours = self.emit(Mul, small, self.constant(4.0), clip=self.pick([None, (8.0, 80.0)]))
        counted = bool(self.random.integers(2))
        self.emit(
            AveragePool,
            fours,
            kernel=kernel,
            strides=tuple(int(s) for s in self.random.integers(1, 3, rank)),
            pads=tuple(int(p) for p in self.random.integers(0, 2, 2 * rank)) if counted else (0,) * 2 * rank,
            dilations=(1,) * rank,
            count_include_pad=counted,
        )

    def movement(self) -> None:
        x = self.value
        rank, sizes = x.type.rank, self.sizes(x)
        kind = self.random.integers(6)
        axis = int(self.random.integers(1, rank)) if rank > 1 else 0
        if kind == 0:
            perm = self.random.permutation(range(1, rank))
            self.emit(Transpose, x, perm=(0, *(int(p) for p in perm)))
        elif kind == 1:
            total = math.prod(sizes)
            first = self.pick([d for d in range(1, total + 1) if total % d == 0])
            self.emit(
                Reshape, x, shape=self.pick([(total,), (first, total // first), (first, 1, total // first), sizes])
            )
        elif kind == 2 and axis:
            start, end = sorted(int(i) for i in self.random.integers(0, sizes[axis - 1] + 1, 2))
            forward = (start, max(end, start + 1), int(self.random.integers(1, 3)))
            backward = (sizes[axis - 1] - 1, int(self.random.integers(-1, sizes[axis - 1] - 1)), -1)
            start, end, step = self.pick([forward, backward])
            if start < sizes[axis - 1]:
                self.emit(Slice, x, starts=(start,), ends=(end,), axes=(axis,), steps=(step,))
        elif kind == 3 and axis:
            shape = self.pick([(3,), (2, 2), ()])
            indices = Array(self.random.integers(0, sizes[axis - 1], shape))
            self.emit(Gather, x, indices=indices, axis=axis)
        elif kind == 4:
            pads = [0, *self.random.integers(0, 3, rank - 1), 0, *self.random.integers(0, 3, rank - 1)]
            self.emit(Pad, x, pads=tuple(map(int, pads)), value=self.pick([0.0, 2.0, -300.0]))
        elif axis:
            fitting = [v for v in self.values if self._beside(v, x, axis)]
            partners = [x, *(self.pick(fitting) for _ in range(self.random.integers(1, 3)))]
            self.emit(Concat, *partners, axis=axis)

    @staticmethod
    def _beside(a: Value, b: Value, axis: int) -> bool:
        first, second = (v.type.shape[:axis] + v.type.shape[axis + 1 :] for v in (a, b))
        return a.type.rank == b.type.rank and first == second

    def island(self) -> None:
        x = self.value
        if x.type.rank < 2:
            return
        channels = int(x.type.shape[1])
        parameters = [
            self.numbers(1, 2, channels),
            self.numbers(-5, 5, channels),
            np.zeros(channels),
            np.ones(channels),
        ]
        self.emit(BatchNormalization, x, *(self.constant(p) for p in parameters), epsilon=0.0)

    # Ends, whose formats nothing else takes

    def mean(self, x: Value) -> Value:
        axes = tuple(a for a in range(1, x.type.rank) if self.random.integers(2))
        count = math.prod(int(x.type.shape[a]) for a in axes)
        if not axes or count & (count - 1):
            return x
        keep = bool(self.random.integers(2))
        return self.emit(ReduceMean, x, element=affine(S8, 1.0 / count, 9), axes=axes, keepdims=keep)

    def argmax(self, x: Value) -> Value:
        if x.type.rank < 2:
            return x
        flags = {name: bool(self.random.integers(2)) for name in ("keepdims", "select_last_index")}
        return self.emit(ArgMax, x, element=S64, axis=int(self.random.integers(1, x.type.rank)), **flags)

    def finish(self) -> Graph:
        ends = {
            "last": self.values[-1],
            "any": self.value,
            "mean": self.mean(self.value),
            "index": self.argmax(self.value),
        }
        graph = self.builder.finish(list(ends.values()), list(ends))
        return map_values(graph, lambda v: {} if v.type.element == S64 else {"range": Interval(-1.0, 1.0)})


STEPS: dict[str, Callable[[ExactMaker], None]] = {
    name: getattr(ExactMaker, name)
    for name in (
        "activation",
        "arithmetic",
        "average",
        "conv",
        "divide",
        "island",
        "matmul",
        "movement",
        "partial_sum",
        "pool",
        "square",
    )
}


@st.composite
def exact_graphs(draw: st.DrawFn) -> tuple[Graph, npt.NDArray[np.float32]]:
    """A typed graph of up to twelve steps, and a batch of whole numbers for its input."""
    maker = ExactMaker(draw(st.integers(0, 2**32 - 1)))
    for step in draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12)):
        STEPS[step](maker)
    return maker.finish(), maker.numbers(-9, 9, 3, *maker.sizes(maker.x))
