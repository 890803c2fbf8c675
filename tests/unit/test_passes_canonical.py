"""The canonical passes: what they leave alone, what they refuse and what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from property.float_graphs import GraphMaker

from qir.arrays import Array
from qir.errors import PassError
from qir.ir import Graph, Op
from qir.ops.float_elementwise import Add, Clip, Div, HardSigmoid, HardSwish, Mul, Relu
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.ops.float_pool import AveragePool, ReduceMean
from qir.ops.movement import Pad
from qir.pass_manager import Pass, PassContext
from qir.passes import fold_constants
from qir.passes.canonicalize import Canonicalize
from qir.passes.dead_code import EliminateDeadCode
from qir.passes.fold_constants import FoldConstants
from qir.passes.fuse_activation import FuseActivation
from qir.passes.fuse_batch_norm import FuseBatchNorm
from qir.rewrite import GraphBuilder
from qir.types import BATCH, F32, TensorType

CANONICAL: tuple[Pass, ...] = (
    FoldConstants(),
    Canonicalize(),
    FuseBatchNorm(),
    FuseActivation(),
    EliminateDeadCode(),
)


def one_op(op_class: type[Op], *operands: Any, **attributes: Any) -> Graph:
    """A graph of one op on x [N, 2] and constants."""
    builder = GraphBuilder("one")
    x = builder.input("x", TensorType((BATCH, 2)))
    values = [x]
    for number in operands:
        array = np.asarray(number, np.float32)
        values.append(builder.constant(Array(array), TensorType(array.shape, F32), "k"))
    return builder.finish([builder.emit(op_class, values, name="y", **attributes)], ["y"])


@pytest.mark.parametrize("item", CANONICAL, ids=lambda p: p.name)
def test_what_is_canonical_comes_back_as_it_is(item: Pass) -> None:
    graph = one_op(Mul, [2.0, 3.0])
    assert item.run(graph, PassContext()) is graph


def test_a_neutral_constant_that_broadcasts_stays() -> None:
    builder = GraphBuilder("broadcast")
    x = builder.input("x", TensorType((BATCH, 1)))
    ones = builder.constant(Array(np.ones((1, 3), np.float32)), TensorType((1, 3)), "k")
    graph = builder.finish([builder.emit(Mul, [x, ones])], ["y"])
    assert Canonicalize().run(graph, PassContext()) is graph


def test_a_division_by_zero_is_left_to_calibration() -> None:
    graph = one_op(Div, [2.0, 0.0])
    assert Canonicalize().run(graph, PassContext()) is graph


@pytest.mark.parametrize("offset", [2.9, -3.0])
@pytest.mark.parametrize("factor", [0.16, 1 / 3])
def test_what_only_looks_like_a_hard_swish_stays(offset: float, factor: float) -> None:
    for add, times in ((3.0, factor), (offset, 1 / 6)):
        builder = GraphBuilder("almost")
        x = builder.input("x", TensorType((BATCH, 2)))
        three, sixth = (builder.constant(Array(np.float32(k)), TensorType(()), "k") for k in (add, times))
        gate = builder.emit(Clip, [builder.emit(Add, [x, three])], minimum=0.0, maximum=6.0)
        product = builder.emit(Mul, [builder.emit(Mul, [gate, sixth]), x])
        graph = builder.finish([product], ["y"])
        assert Canonicalize().run(graph, PassContext()) is graph


def test_a_hard_swish_of_two_values_stays() -> None:
    builder = GraphBuilder("two")
    x, z = (builder.input(n, TensorType((BATCH, 2))) for n in "xz")
    product = builder.emit(Mul, [builder.emit(HardSigmoid, [x], alpha=1 / 6, beta=0.5), z])
    graph = builder.finish([product], ["y"])
    assert not any(isinstance(op, HardSwish) for op in Canonicalize().run(graph, PassContext()).ops)


@pytest.mark.parametrize(("kernel", "pads"), [((3, 2), (0, 0, 0, 0)), ((3, 3), (0, 0, 1, 0))])
def test_an_average_of_anything_but_the_map_stays(kernel: tuple[int, ...], pads: tuple[int, ...]) -> None:
    builder = GraphBuilder("part")
    x = builder.input("x", TensorType((BATCH, 1, 3, 3)))
    pool = builder.emit(AveragePool, [x], kernel=kernel, strides=(2, 2), pads=pads, dilations=(1, 1))
    graph = builder.finish([pool], ["y"])
    assert pool.type.shape == (BATCH, 1, 1, 1)
    assert not any(isinstance(op, ReduceMean) for op in Canonicalize().run(graph, PassContext()).ops)


def test_a_pad_with_another_number_stays_before_its_conv() -> None:
    builder = GraphBuilder("pad")
    x = builder.input("x", TensorType((BATCH, 1, 3, 3)))
    weight = builder.constant(Array(np.ones((1, 1, 2, 2), np.float32)), TensorType((1, 1, 2, 2)), "w")
    for pads, value in (((0, 0, 1, 1, 0, 0, 1, 1), 1.0), ((0, 0, 1, 1, 0, 0, 1, 1), 0.0)):
        padded = builder.emit(Pad, [x], pads=pads, value=value)
        builder.emit(Conv, [padded, weight], groups=1, strides=(1, 1), pads=(0,) * 4, dilations=(1, 1))
    convs = [op.result for op in builder.ops if isinstance(op, Conv)]
    after = Canonicalize().run(builder.finish(convs, ["one", "zero"]), PassContext())
    assert [op.pads for op in after.ops if isinstance(op, Conv)] == [(0, 0, 0, 0), (1, 1, 1, 1)]


def test_folding_stops_at_results_that_would_bloat_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_constants, "LARGEST_RESULT", 3)
    builder = GraphBuilder("large")
    a, b = (builder.constant(Array(np.ones(s, np.float32)), TensorType(s), "k") for s in ((2, 1), (1, 2)))
    graph = builder.finish([builder.emit(Add, [a, b])], ["y"])
    assert FoldConstants().run(graph, PassContext()) is graph


def norm(scale: float, variance: float, epsilon: float) -> Graph:
    """A BatchNormalization of x [N, 1]."""
    builder = GraphBuilder("norm")
    x = builder.input("x", TensorType((BATCH, 1)))
    numbers = [scale, 0.0, 0.0, variance]
    constants = [builder.constant(Array(np.array([k], np.float32)), TensorType((1,)), "k") for k in numbers]
    y = builder.emit(BatchNormalization, [x, *constants], epsilon=epsilon, name="y", location="bn1")
    return builder.finish([y], ["y"])


@pytest.mark.parametrize(("scale", "variance", "epsilon"), [(1.0, 0.0, 0.0), (1.0, -1.0, 1e-5), (3e38, 1e-8, 0.0)])
def test_a_norm_without_a_finite_factor_is_an_error_that_names_it(
    scale: float, variance: float, epsilon: float
) -> None:
    with pytest.raises(PassError, match=r'BatchNormalization %y \(from node "bn1"\): .* is not finite'):
        FuseBatchNorm().run(norm(scale, variance, epsilon), PassContext())


def test_a_norm_with_computed_parameters_stays() -> None:
    builder = GraphBuilder("computed")
    x, scale = builder.input("x", TensorType((BATCH, 1))), builder.input("scale", TensorType((1,)))
    one = builder.constant(Array(np.array([1], np.float32)), TensorType((1,)), "k")
    graph = builder.finish([builder.emit(BatchNormalization, [x, scale, one, one, one], epsilon=0.0)], ["y"])
    assert FuseBatchNorm().run(graph, PassContext()) is graph


def test_what_overflows_float32_is_not_fused() -> None:
    builder = GraphBuilder("huge")
    x = builder.input("x", TensorType((BATCH, 1)))
    weight = builder.constant(Array(np.array([[1e30]], np.float32)), TensorType((1, 1)), "w")
    factor = builder.constant(Array(np.float32(1e30)), TensorType(()), "k")
    graph = builder.finish([builder.emit(Mul, [builder.emit(MatMul, [x, weight]), factor])], ["y"])
    assert FuseBatchNorm().run(graph, PassContext()) is graph


def test_a_product_of_two_activations_takes_a_bias_but_no_factor() -> None:
    builder = GraphBuilder("attention")
    a, b = builder.input("a", TensorType((BATCH, 2, 3))), builder.input("b", TensorType((BATCH, 3, 2)))
    offset = builder.constant(Array(np.array([1, 2], np.float32)), TensorType((2,)), "offset")
    factor = builder.constant(Array(np.float32(0.5)), TensorType(()), "factor")
    shifted = builder.emit(Add, [builder.emit(MatMul, [a, b]), offset])
    graph = builder.finish([builder.emit(Mul, [shifted, factor])], ["y"])
    after = EliminateDeadCode().run(FuseBatchNorm().run(graph, PassContext()), PassContext())
    kinds = [op.mnemonic for op in after.ops if op.mnemonic != "const"]
    assert kinds == ["MatMul", "Mul"]
    (product,) = (op for op in after.ops if isinstance(op, MatMul))
    assert after.constants[product.operands[2]].data.tolist() == [1.0, 2.0]


def test_passes_say_what_they_changed() -> None:
    maker = GraphMaker(0)
    maker.conv()
    maker.norm()
    maker.emit(Relu, maker.value)
    maker.hard_swish()
    context = PassContext()
    graph = maker.finish(len(maker.earlier) - 1)
    for item in CANONICAL:
        graph = item.run(graph, context)
    assert "1 HardSwish recognized" in context.notes
    assert "1 ops fused into 1 Conv and MatMul" in context.notes
    assert "1 activations fused" in context.notes
