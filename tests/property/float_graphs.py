"""Random float graphs made of what canonical passes, calibration and legalization look for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from qir.arrays import Array
from qir.ir import Graph, Op, Value
from qir.ops.float_elementwise import Add, Clip, Div, HardSigmoid, Mul, Relu, Sub
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool
from qir.ops.movement import Concat, Pad, Reshape, Slice, Transpose
from qir.rewrite import GraphBuilder
from qir.types import BATCH, F32, TensorType


class GraphMaker:
    """Builds a random float graph step by step; every number comes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.builder = GraphBuilder("random")
        self.value = self.builder.input("x", TensorType((BATCH, 2, 6, 5)))
        self.earlier = [self.value]

    def constant(self, *shape: int, low: float = -1.0, high: float = 1.0, data: Any = None) -> Value:
        numbers = self.random.uniform(low, high, shape) if data is None else data
        array = np.asarray(numbers, np.float32)
        return self.builder.constant(Array(array), TensorType(array.shape, F32), "k")

    def factor(self) -> Value:
        """One for all, per channel (as often as all others), column or element; of either sign and not near 0."""
        c, h, w = self.sizes
        shapes: list[tuple[int, ...]] = [(), (1, 1, 1, 1), (w,), (h, 1), (c, h, w), *[(c, 1, 1), (1, c, 1, 1)] * 3]
        shape = shapes[self.random.integers(len(shapes))]
        return self.constant(data=self.random.uniform(0.5, 2, shape) * self.random.choice([-1, 1], shape))

    @property
    def channels(self) -> int:
        channels = self.value.type.shape[1]
        assert isinstance(channels, int)
        return channels

    @property
    def sizes(self) -> tuple[int, int, int]:
        c, h, w = (d for d in self.value.type.shape[1:] if isinstance(d, int))
        return c, h, w

    def emit(self, op_class: type[Op], *operands: Value, **attributes: Any) -> None:
        self.value = self.builder.emit(op_class, operands, location=op_class.mnemonic.lower(), **attributes)
        self.earlier.append(self.value)

    def conv(self, *, depthwise: bool = False, bias: bool = False) -> None:
        groups = self.channels if depthwise else 1
        kernel, outputs = (
            int(self.random.choice([1, 3])),
            self.channels if depthwise else int(self.random.integers(1, 5)),
        )
        weight = self.constant(outputs, self.channels // groups, kernel, kernel)
        self.emit(
            Conv,
            self.value,
            weight,
            *([self.constant(outputs)] if bias else []),
            groups=groups,
            strides=(1, 1),
            pads=(kernel // 2,) * 4,
            dilations=(1, 1),
        )

    def padded_conv(self) -> None:
        pads = [0, 0, *self.random.integers(0, 3, 2), 0, 0, *self.random.integers(0, 3, 2)]
        self.emit(Pad, self.value, pads=tuple(map(int, pads)), value=0.0)
        self.conv()

    def shared_conv(self) -> None:
        """Two convolutions with one weight, the first of them scaled."""
        weight = self.constant(self.channels, self.channels, 1, 1)
        for _ in range(2):
            self.emit(Conv, self.value, weight, groups=1, strides=(1, 1), pads=(0,) * 4, dilations=(1, 1))
            self.arithmetic(Mul)

    def norm(self) -> None:
        c = self.channels
        parameters = [self.constant(c), self.constant(c), self.constant(c), self.constant(c, low=0.25, high=4)]
        self.emit(BatchNormalization, self.value, *parameters, epsilon=1e-5)

    def arithmetic(self, op_class: type[Op]) -> None:
        operands = [self.value, self.factor()]
        if op_class is not Div and self.random.integers(2):
            operands.reverse()
        self.emit(op_class, *operands, clip=(-0.75, 1.25) if self.random.integers(3) == 0 else None)

    def hard_swish(self) -> None:
        x = self.value
        sixth, six = self.constant(data=1 / 6), self.constant(data=6.0)
        spelling = self.random.integers(4)
        if spelling == 0:
            self.emit(HardSigmoid, x, alpha=1 / 6, beta=0.5)
            self.emit(Mul, x, self.value)
            return
        self.emit(Add, x, self.constant(data=3.0))
        self.emit(Clip, self.value, minimum=0.0, maximum=6.0)
        if spelling == 1:
            self.emit(Mul, x, self.value)
            self.emit(Div, self.value, six)
        elif spelling == 2:
            self.emit(Mul, self.value, sixth)
            self.emit(Mul, x, self.value)
        else:
            self.emit(Mul, self.value, x)
            self.emit(Mul, sixth, self.value)

    def movement(self) -> None:
        c, h, w = self.sizes
        kind = self.random.integers(6)
        if kind <= 1:
            for _ in range(2):
                self.emit(Transpose, self.value, perm=(0, *map(int, self.random.permutation([1, 2, 3]))))
        elif kind == 2:
            self.emit(Reshape, self.value, shape=(c * h * w,))
            self.emit(Reshape, self.value, shape=(c, h, w))
        elif kind == 3:
            self.emit(Slice, self.value, starts=(0,), ends=(h,), axes=(2,), steps=(1,))
        elif kind == 4:
            self.emit(Concat, self.value, axis=1)
        else:
            self.emit(Slice, self.value, starts=(w - 1,), ends=(-1,), axes=(3,), steps=(-1,))

    def folded(self) -> None:
        """An offset that constants compute."""
        self.builder.emit(Add, [self.constant(self.channels), self.constant(1)])
        offset = self.builder.emit(Reshape, [self.builder.ops[-1].result], shape=(self.channels, 1, 1))
        self.emit(Add, self.value, offset)

    def pool(self) -> None:
        self.emit(MaxPool, self.value, kernel=(2, 2), strides=(1, 1), pads=(0, 0, 1, 1), dilations=(1, 1))

    def residual(self) -> None:
        partners = [v for v in self.earlier if v.type == self.value.type]
        self.emit(Add, self.value, partners[self.random.integers(len(partners))])

    def twin(self) -> None:
        """The same op on the same constants twice."""
        x = self.value
        self.emit(Mul, x, self.constant(data=0.5))
        first = self.value
        self.emit(Mul, x, self.constant(data=0.5))
        self.emit(Add, first, self.value)

    def neutral(self) -> None:
        self.emit(Mul, self.value, self.constant(data=np.ones((1, 1, 1))))
        self.emit(Sub, self.value, self.constant(data=0.0), clip=(-0.5, 1.0))

    def head(self) -> None:
        """The end of a classifier: a mean over the map, a matrix product, a bias of its own."""
        c, h, w = self.sizes
        self.emit(AveragePool, self.value, kernel=(h, w), strides=(1, 1), pads=(0,) * 4, dilations=(1, 1))
        self.emit(Reshape, self.value, shape=(c,))
        self.emit(MatMul, self.value, self.constant(c, 3))
        self.emit(Add, self.constant(3), self.value)

    def finish(self, second: int) -> Graph:
        outputs = [self.value, self.earlier[second % len(self.earlier)]]
        return self.builder.finish(outputs, ["y", "other"])


STEPS: dict[str, Callable[[GraphMaker], None]] = {
    "conv": GraphMaker.conv,
    "conv with bias": lambda m: m.conv(bias=True),
    "depthwise": lambda m: m.conv(depthwise=True),
    "padded conv": GraphMaker.padded_conv,
    "shared conv": GraphMaker.shared_conv,
    "norm": GraphMaker.norm,
    "add": lambda m: m.arithmetic(Add),
    "sub": lambda m: m.arithmetic(Sub),
    "mul": lambda m: m.arithmetic(Mul),
    "div": lambda m: m.arithmetic(Div),
    "relu": lambda m: m.emit(Relu, m.value),
    "clip": lambda m: m.emit(Clip, m.value, minimum=-0.5, maximum=1.5),
    "hard sigmoid": lambda m: m.emit(HardSigmoid, m.value, alpha=0.2, beta=0.5),
    "hard swish": GraphMaker.hard_swish,
    "movement": GraphMaker.movement,
    "folded": GraphMaker.folded,
    "pool": GraphMaker.pool,
    "residual": GraphMaker.residual,
    "twin": GraphMaker.twin,
    "neutral": GraphMaker.neutral,
}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, npt.NDArray[np.float32]]:
    """A float graph of up to ten steps, and a batch for its input."""
    maker = GraphMaker(draw(st.integers(0, 2**32 - 1)))
    for step in draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=10)):
        STEPS[step](maker)
    if draw(st.booleans()):
        maker.head()
    x = maker.random.uniform(-2, 2, (2, 2, 6, 5)).astype(np.float32)
    return maker.finish(draw(st.integers(0, 40))), x
