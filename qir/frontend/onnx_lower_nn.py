"""Lowering of convolutions, matrix products, normalization and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from qir.errors import QirError
from qir.frontend.onnx_context import Known, Node, Tensor
from qir.ir import Value
from qir.opdef import known_dim, normalize_axis
from qir.ops.float_elementwise import Add, Mul
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool, ReduceMean
from qir.ops.movement import Transpose
from qir.types import Shape, shape_text

_F32: Final = np.dtype(np.float32)


def spatial_sizes(value: Value) -> tuple[int, ...]:
    """The sizes of the 1 or 2 spatial dimensions. Raises QirError for other ranks and for open sizes."""
    shape = value.type.shape
    if len(shape) not in (3, 4):
        raise QirError(f"takes [N, C, W] or [N, C, H, W] here, not an input of shape {shape_text(shape) or 'scalar'}")
    return tuple(known_dim(d, "a spatial dimension") for d in shape[2:])


def window_attributes(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> dict[str, Any]:
    """Strides, explicit pads and dilations."""
    ones = (1,) * len(sizes)
    strides, dilations = node.integers("strides", ones), node.integers("dilations", ones)
    pads = node.integers("pads", (0,) * (2 * len(sizes)))
    if not len(kernel) == len(strides) == len(dilations) == len(sizes) == len(pads) / 2:
        raise QirError(f"its kernel, strides, pads or dilations do not fit {len(sizes)} spatial dimensions")
    if min(*strides, *dilations, *kernel) < 1:
        raise QirError("its kernel, strides and dilations must be at least 1")
    mode = node.number("auto_pad")
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise QirError(f"its auto_pad {mode!r} is none of NOTSET, VALID, SAME_UPPER and SAME_LOWER")
    if mode == "VALID":
        pads = (0,) * (2 * len(sizes))
    elif mode != "NOTSET":
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        totals = [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(sizes, strides, extents, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = (*small, *large) if mode == "SAME_UPPER" else (*large, *small)
    return {"strides": strides, "pads": pads, "dilations": dilations}


def lower_conv(node: Node) -> Known:
    """Conv with explicit pads."""
    source, weight = node.value(0), node.value(1)
    sizes = spatial_sizes(source)
    if weight.type.rank != source.type.rank:
        raise QirError(f"its weight has rank {weight.type.rank}, its input {source.type.rank}")
    kernel = tuple(known_dim(d, "a kernel dimension") for d in weight.type.shape[2:])
    stated = node.integers("kernel_shape", kernel)
    if stated != kernel:
        raise QirError(f"its kernel_shape is {list(stated)}, its weight's is {list(kernel)}")
    window = window_attributes(node, sizes, kernel)
    operands = [source, weight, *([node.value(2)] if node.has(2) else [])]
    return node.emit(Conv, operands, groups=node.number("group"), **window)


def lower_gemm(node: Node) -> Known:
    """Gemm as a MatMul; alpha, beta and the transpositions go into constants where they can."""
    alpha, beta = node.number("alpha"), node.number("beta")
    scaled = bool(alpha == 1)
    a = _transposed(node, 0, node.number("transA"), "a")
    right = node.given(1)
    if isinstance(right, Value):
        b = _transposed(node, 1, node.number("transB"), "b")
    else:
        matrix = right.T if node.number("transB") else right
        if matrix.dtype == _F32 and not scaled:
            matrix, scaled = matrix * np.float32(alpha), True
        b = node.value(1) if matrix is right else node.constant(np.ascontiguousarray(matrix), "weight")
    bias = _bias(node, beta, known_dim(b.type.shape[-1], "the columns")) if scaled and node.has(2) else None
    if bias is not None:
        return node.emit(MatMul, [a, b, bias])
    if node.has(2):
        product = node.step("product", MatMul, [a, b])
        if not scaled:
            product = node.step("scaled", Mul, [product, _factor(node, alpha, "alpha")])
        return node.emit(Add, [product, _times(node, 2, beta)])
    if scaled:
        return node.emit(MatMul, [a, b])
    return node.emit(Mul, [node.step("product", MatMul, [a, b]), _factor(node, alpha, "alpha")])


def _transposed(node: Node, index: int, wanted: object, what: str) -> Value:
    value = node.value(index)
    if value.type.rank != 2:
        raise QirError(
            f"its input {what.upper()} has shape {shape_text(value.type.shape) or 'scalar'}; it takes matrices"
        )
    return node.step(f"{what}_transposed", Transpose, [value], perm=(1, 0)) if wanted else value


def _factor(node: Node, factor: float, what: str) -> Value:
    return node.constant(np.asarray(factor, np.float32), what)


def _times(node: Node, index: int, factor: float) -> Value:
    """An input times a factor, folded into constants."""
    known = node.given(index)
    if factor == 1:
        return node.value(index)
    if isinstance(known, Value):
        return node.step("c_scaled", Mul, [known, _factor(node, factor, "beta")])
    return node.constant(known * np.asarray(factor, known.dtype), "c")


def _bias(node: Node, beta: float, columns: int) -> Value | None:
    """The constant C as one number per column, or None when it is another kind of addend."""
    known = node.given(2)
    if isinstance(known, Value):
        return None
    if known.shape == (columns,) and beta == 1:
        return node.value(2)
    if (
        known.dtype != _F32
        or known.ndim > 2
        or (known.ndim == 2 and known.shape[0] != 1)
        or known.size not in (1, columns)
    ):
        return None
    return node.constant(np.broadcast_to(known.reshape(-1), (columns,)) * np.float32(beta), "bias")


def lower_matmul(node: Node) -> Known:
    """MatMul; a vector becomes a matrix of one row or column, which the result then drops."""
    a, b = node.value(0), node.value(1)
    shapes: list[Shape] = [a.type.shape, b.type.shape]
    if not all(shapes):
        raise QirError("its inputs are tensors of rank 1 and more, not scalars")
    flat_a, flat_b = (len(s) == 1 for s in shapes)
    if not flat_a and not flat_b:
        return node.emit(MatMul, [a, b])
    if flat_a:
        a = node.reshape(a, (1, *shapes[0]), name=f"{node.output}.row")
    if flat_b:
        b = node.reshape(b, (*shapes[1], 1), name=f"{node.output}.column")
    product = node.step("product", MatMul, [a, b])
    dims = list(product.type.shape)
    if flat_a:
        del dims[-2]
    if flat_b:
        del dims[-1]
    return node.reshape(product, dims)


def lower_batch_normalization(node: Node) -> Known:
    """BatchNormalization with its stored statistics."""
    training = node.attribute("training_mode") if node.opset >= 14 else any(node.proto.output[1:])
    if training:
        raise QirError("normalizes by the statistics of its batch (training mode); export the model for inference")
    if node.opset < 9 and not node.number("spatial"):
        raise QirError("normalizes every element apart (spatial=0), which is not supported; export with spatial=1")
    return node.emit(BatchNormalization, [node.value(i) for i in range(5)], epsilon=node.number("epsilon"))


def lower_max_pool(node: Node) -> Known:
    """MaxPool without indices."""
    if node.is_read(1):
        raise QirError("its second output, the indices, is not supported; remove what reads it")
    return node.emit(MaxPool, [node.value(0)], **_pool_attributes(node))


def lower_average_pool(node: Node) -> Known:
    """AveragePool."""
    include = bool(node.number("count_include_pad"))
    return node.emit(AveragePool, [node.value(0)], count_include_pad=include, **_pool_attributes(node))


def _pool_attributes(node: Node) -> dict[str, Any]:
    """The window of a pool. Raises QirError for automatic padding that runtimes read in different ways."""
    sizes, kernel = spatial_sizes(node.value(0)), node.integers("kernel_shape", ())
    window = window_attributes(node, sizes, kernel)
    mode, ceil_mode = node.number("auto_pad"), bool(node.attribute("ceil_mode"))
    for size, length, stride, dilation in zip(sizes, kernel, window["strides"], window["dilations"], strict=True):
        room = size - (length - 1) * dilation - 1
        # ONNX Runtime leaves dilations out of SAME, and crops where a stride leaps over elements at the end; it rounds
        # VALID up in ceil mode, which ONNX's own formula does not.
        same = mode.startswith("SAME") and (dilation > 1 or (-(-size // stride) - 1) * stride < room)
        if same or (mode == "VALID" and ceil_mode and room % stride):
            raise QirError(f"runtimes read its auto_pad {mode} in different ways for this window; write its pads out")
    return window | {"kernel": kernel, "ceil_mode": ceil_mode and mode == "NOTSET"}


def lower_global_max_pool(node: Node) -> Known:
    """GlobalMaxPool as a MaxPool of the whole map."""
    value = node.value(0)
    sizes = spatial_sizes(value)
    ones = (1,) * len(sizes)
    pads = (0,) * (2 * len(sizes))
    return node.emit(MaxPool, [value], kernel=sizes, strides=ones, pads=pads, dilations=ones)


def lower_global_average_pool(node: Node) -> Known:
    """GlobalAveragePool as a ReduceMean over the spatial axes."""
    value = node.value(0)
    spatial_sizes(value)
    return node.emit(ReduceMean, [value], axes=tuple(range(2, value.type.rank)), keepdims=True)


def lower_reduce_mean(node: Node) -> Known:
    """ReduceMean with its axes listed."""
    value = node.value(0)
    stated: tuple[int, ...] | Tensor = ()
    if node.opset < 18:
        stated = node.integers("axes", ())
    elif node.has(1):
        stated = node.whole(1, "axes")
    if not len(stated) and node.attribute("noop_with_empty_axes"):
        return value
    axes = tuple(sorted(normalize_axis(int(a), value.type.rank) for a in stated)) or tuple(range(value.type.rank))
    return node.emit(ReduceMean, [value], axes=axes, keepdims=bool(node.number("keepdims")))
