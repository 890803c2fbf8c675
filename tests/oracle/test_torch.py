"""The arithmetic of x86-fbgemm and arm-qnnpack against PyTorch's quantized operators, to the bit.

PyTorch is large and not among the test requirements: these tests run where it is installed. Its engine `x86` is not
meant: on hosts with VNNI that is oneDNN for convolutions, which adds the zero point before it rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from models import PATHS, compiled, labelled_images
from oracle.adversarial import near_tie
from oracle.agreement import Agreement
from oracle.float32_graphs import (
    CONVOLUTIONS,
    F32,
    POOLS,
    Ints,
    Scales,
    around,
    both,
    island,
    linear,
    mostly_of_one_sign,
    near_ties,
    product,
    product_multiplier,
    random_integers,
    reciprocal_multiplier,
    single,
    slides,
    small_weights,
    sums,
    window,
)

from qir.fixed_point import Rounding
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize
from qir.ops.float_elementwise import Add
from qir.pass_manager import integer_feeds
from qir.types import S8, U8, AffineType, FloatType, IntegerType, Shape, TensorType, affine

torch: Any = pytest.importorskip("torch", reason="PyTorch, the oracle of these tests, is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")

#: How each engine rounds the factor, and pairs of activations and weights whose products it adds exactly on any host.
MULTIPLIERS = {"fbgemm": product_multiplier, "qnnpack": reciprocal_multiplier}
STORAGES: dict[str, tuple[IntegerType, IntegerType]] = {
    "fbgemm": (U8.narrowed(0, 127), S8),
    "qnnpack": (U8, S8.narrowed(-127, 127)),
}
ENGINES = [e for e in MULTIPLIERS if e in torch.backends.quantized.supported_engines]
SAMPLES = 3  # where the batch is N


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """An engine, chosen for the duration of a test."""
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, request.param
    yield request.param
    torch.backends.quantized.engine = before


only_fbgemm = pytest.mark.parametrize("engine", [e for e in ENGINES if e == "fbgemm"], indirect=True)


def stored(data: Ints, element: AffineType) -> Any:
    """A quantized tensor of these integers, per tensor or along axis 0."""
    tensor, scale, zero = torch.from_numpy(data.copy(order="C")), element.scale.data, element.zero_point.data
    if element.axis is None:
        return torch._make_per_tensor_quantized_tensor(tensor, float(scale), int(zero))
    scales, zeros = torch.from_numpy(scale.astype(np.float64)), torch.from_numpy(zero.copy())
    return torch._make_per_channel_quantized_tensor(tensor, scales, zeros, 0)


def format_of(element: AffineType) -> tuple[float, int]:
    return float(element.scale.data), int(element.zero_point.data)


def real_bias(bias: Ints | None, x: AffineType, weight: AffineType) -> Scales | None:
    """The bias as PyTorch takes it, in reals."""
    products = (x.scale.data * weight.scale.data).astype(np.float64)
    return None if bias is None else np.asarray(bias * products, F32)


def by_torch(
    x: tuple[Ints, AffineType],
    weight: tuple[Ints, AffineType],
    bias: Scales | None,
    result: AffineType,
    options: dict[str, Any] | None = None,
    relu: bool = False,
) -> Ints:
    """A convolution (layout as here, channels last) where there are options, else a linear layer."""
    ops, suffix = torch.ops.quantized, "_relu" if relu else ""
    biases = None if bias is None else torch.from_numpy(np.ascontiguousarray(bias))
    data, element = weight
    if options is None:
        transposed = AffineType(element.storage, element.scale, element.zero_point, None if element.axis is None else 0)
        packed = ops.linear_prepack(stored(data.T, transposed), biases)
        return np.asarray(getattr(ops, f"linear{suffix}")(stored(*x), packed, *format_of(result)).int_repr().numpy())
    strides, pads, dilations = (list(options[k]) for k in ("strides", "pads", "dilations"))
    assert pads[:2] == pads[2:]
    how = strides, pads[:2], dilations, options["groups"]
    packed = ops.conv2d_prepack(stored(data.transpose(0, 3, 1, 2), element), biases, *how)
    first = stored(x[0].transpose(0, 3, 1, 2), x[1])
    found = getattr(ops, f"conv2d{suffix}")(first, packed, *format_of(result))
    return np.ascontiguousarray(found.int_repr().numpy().transpose(0, 2, 3, 1))


class Oracle(Agreement):
    """Layers on PyTorch and here."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine

    def agree(
        self,
        x: tuple[Ints, AffineType],
        shape: Shape,
        weight: tuple[Ints, AffineType],
        bias: Ints | None,
        result: AffineType,
        options: dict[str, Any] | None = None,
        relu: bool = False,
        sharp: bool = True,
    ) -> Ints:
        """The output of a layer, whose bias is given as int32, every bit of which agrees."""
        theirs = by_torch(x, weight, real_bias(bias, x[1], weight[1]), result, options, relu)
        if relu:
            result = result.with_storage(U8.narrowed(int(result.zero_point.data), 255))
        graph = linear((shape, x[1]), weight, bias, result, options, MULTIPLIERS[self.engine])
        self.compare(graph, {"x0": x[0]}, theirs, sharp)
        return theirs


SYMMETRIC = [k for k, (_, _, w) in CONVOLUTIONS.items() if w["pads"][:2] == w["pads"][2:]]


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("kind", SYMMETRIC)
def test_conv(engine: str, kind: str, per_channel: bool) -> None:
    oracle = Oracle(engine)
    shape, weight_shape, options = CONVOLUTIONS[kind]
    storage = STORAGES[engine][0]
    for multiple, zero, out_zero, relu in ((2, 60, 128, False), (6, 0, 3, True), (10, storage.hi, 100, False)):
        rng = np.random.default_rng(multiple)
        weight, bias, largest = small_weights(rng, weight_shape, 0, per_channel)
        x, result = affine(storage, 0.5, zero), affine(U8, 0.5 * largest * multiple, out_zero)
        feed = around(rng, storage, zero, 24, TensorType(shape).concrete(SAMPLES))
        for biases in (bias, None) if multiple == 6 else (bias,):
            oracle.agree((feed, x), shape, weight, biases, result, options, relu)
    oracle.finish()


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(engine: str, biased: bool, per_channel: bool) -> None:
    oracle = Oracle(engine)
    storage, shape = STORAGES[engine][0], (100, 37)
    for multiple, zero, out_zero, relu in ((2, 60, 128, False), (6, 0, 3, True), (10, storage.hi, 100, False)):
        rng = np.random.default_rng(multiple)
        weight, bias, largest = small_weights(rng, (37, 101), 1, per_channel)
        x, result = affine(storage, 0.5, zero), affine(U8, 0.5 * largest * multiple, out_zero)
        oracle.agree(
            (around(rng, storage, zero, 24, shape), x), shape, weight, bias if biased else None, result, None, relu
        )
    oracle.finish()


EXTREMES = [("fbgemm", U8.narrowed(0, 127), S8), ("fbgemm", U8, S8.narrowed(-64, 63)), ("qnnpack", U8, S8)]


@pytest.mark.parametrize("kind", ["1x1", "3x3", "grouped", "depthwise", "linear"])
@pytest.mark.parametrize(
    ("engine", "activations", "weights"), [e for e in EXTREMES if e[0] in ENGINES], indirect=["engine"], ids=str
)
def test_the_extremes(engine: str, activations: IntegerType, weights: IntegerType, kind: str) -> None:
    """A pair of products stays below 2^15, so that no 16-bit lane saturates; qnnpack has none."""
    oracle = Oracle(engine)
    rng = np.random.default_rng(1)
    convolves = kind != "linear"
    shape, weight_shape, options = CONVOLUTIONS[kind] if convolves else ((300, 96), (96, 50), None)
    axis = 0 if convolves else 1
    for zero in (0, activations.hi, 64):
        ends = np.array([activations.lo, activations.hi], np.uint8)
        x = rng.choice(ends, TensorType(shape).concrete(SAMPLES), p=[0.2, 0.8]), affine(activations, 0.5, zero)
        weight = mostly_of_one_sign(rng, weights, weight_shape, axis), affine(weights, 2.0**-8)
        bias = rng.integers(-3000, 3000, weight_shape[axis])
        reach = int(np.abs(sums(x, weight, bias, options)).max())
        result = affine(U8, 2.0 ** np.ceil(np.log2(reach / 150)) * 2.0**-9, 128)
        theirs = oracle.agree(x, shape, weight, bias, result, options, sharp=False)
        assert np.unique(theirs).size > 20
    oracle.finish()


def is_exact(bias: Ints, products: Scales) -> Any:
    """Where a bias in reals, divided by the scale of the products, is the integer again."""
    return (bias * products.astype(np.float64)).astype(F32) / products == bias


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("convolves", [False, True], ids=["linear", "conv"])
def test_near_ties_of_every_channel(engine: str, convolves: bool, biased: bool) -> None:
    """FBGEMM adds the bias in reals, divided by the scale of the products: here it divides to the integer."""
    oracle = Oracle(engine)
    rng = np.random.default_rng(2)
    channels, zero = 10_000, 7
    activations, storage = STORAGES[engine]
    weights, x = random_integers(rng, storage, (24, channels)), random_integers(rng, activations, (1, 24))
    bias = rng.integers(-20_000, 20_000, channels) if biased else np.zeros(channels, np.int64)
    acc = ((x.astype(np.int64) - zero) @ weights)[0] + bias
    sx, so = F32(rng.uniform(0.01, 0.1)), F32(rng.uniform(0.5, 2))
    scales = near_ties(acc, sx, so, rng)
    while not (exact := is_exact(bias, sx * scales)).all():
        scales = np.where(exact, scales, near_ties(acc, sx, so, rng))
    weight, options = (weights, affine(storage, scales, 0, 1)), None
    if convolves:
        kernels = np.ascontiguousarray(weights.T.reshape(channels, 3, 4, 2))
        weight, x, options = (kernels, affine(storage, scales, 0, 0)), x.reshape(1, 3, 4, 2), window()
    operand, result = (x, affine(activations, sx, zero)), affine(U8, so, 100)
    oracle.agree(operand, x.shape, weight, bias if biased else None, result, options)
    oracle.finish()


@only_fbgemm
@pytest.mark.parametrize("convolves", [False, True], ids=["linear", "conv"])
def test_fbgemm_adds_the_bias_in_reals(engine: str, convolves: bool) -> None:
    """`rint(float32(float32(acc) + float32(bias / float32(sx * sw))) * multiplier)`: near ties not the int32 bias."""
    rng = np.random.default_rng(3)
    channels, zero = 10_000, 7
    weights, x = random_integers(rng, S8, (6, channels)), random_integers(rng, STORAGES[engine][0], (1, 6))
    bias = rng.integers(-20_000, 20_000, channels)
    products = (x.astype(np.int64) - zero) @ weights
    sx, so = F32(rng.uniform(0.01, 0.1)), F32(rng.uniform(0.5, 2))
    scales = near_ties(products[0] + bias, sx, so, rng)
    inputs, result = affine(U8, sx, zero), affine(U8, so, 100)
    real = real_bias(bias, inputs, affine(S8, scales, 0, 1))
    assert real is not None
    if convolves:
        kernels = np.ascontiguousarray(weights.T[:, None, None])
        x = x[:, None, None]
        theirs = by_torch((x, inputs), (kernels, affine(S8, scales, 0, 0)), real, result, window())[0, 0]
    else:
        theirs = by_torch((x, inputs), (weights, affine(S8, scales, 0, 1)), real, result)
    multipliers = product_multiplier(inputs, affine(S8, scales, 0, 1), result)
    in_reals = (products.astype(F32) + real / (sx * scales)) * multipliers
    in_integers = (products + bias).astype(F32) * multipliers
    assert np.array_equal(np.clip(np.rint(in_reals) + 100, 0, 255), theirs)
    differ = np.clip(np.rint(in_integers) + 100, 0, 255) != theirs
    assert np.any(differ)
    assert not np.any(differ[0, is_exact(bias, sx * scales)])


@pytest.mark.parametrize("name", sorted(PATHS))
def test_layers_of_whole_models(engine: str, name: str) -> None:
    """Every convolution and linear layer of a compiled model, on what the layers before it give for images."""
    program = compiled(name, {"fbgemm": "x86-fbgemm", "qnnpack": "arm-qnnpack"}[engine]).program
    graph, outputs = program.graph, 0
    values = program.trace(integer_feeds(graph, {"x": labelled_images()[0][:100]}))
    for op in graph.ops:
        source = graph.producers.get(op.operands[0]) if isinstance(op, Requantize) else None
        if not isinstance(source, Conv2d | FixedMatMul):
            continue
        x, weight = source.operands[:2]
        bias, result = source.optional_operand(2), op.result.type.element
        assert isinstance(x.type.element, AffineType)
        assert isinstance(weight.type.element, AffineType)
        assert isinstance(result, AffineType)
        formats = x.type.element, weight.type.element
        real = None if bias is None else real_bias(graph.constants[bias].data, *formats)
        names = ("pads", "strides", "dilations", "groups")
        options = {n: getattr(source, n) for n in names} if isinstance(source, Conv2d) else None
        operands = (values[x.name], formats[0]), (graph.constants[weight].data, formats[1])
        theirs = np.clip(by_torch(*operands, real, result, options), result.storage.lo, result.storage.hi)
        assert int((theirs != values[op.result.name]).sum()) == 0
        outputs += theirs.size
    assert outputs >= 10_000


def scales_of_products(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    cases = [(0.5, 0.25, 12.0), (0.125, 0.125, 0.25), (0.5, 0.5, 56.0)]
    for s1, s2 in rng.uniform(0.01, 0.1, (20, 2)).astype(F32).tolist():
        cases.append((s1, s2, float(near_tie(s1 * s2, int(rng.integers(50, 16_000)), rng))))
    return cases


def test_mul(engine: str) -> None:
    """Both engines round the factor as `float32(float32(s1 * s2) * float32(1 / so))`."""
    oracle = Oracle(engine)
    rng = np.random.default_rng(4)
    a, b = (random_integers(rng, U8, (250, 100)) for _ in range(2))
    for s1, s2, so in scales_of_products(rng):
        left, right, result = affine(U8, s1, 3), affine(U8, s2, 200), affine(U8, so, 128)
        theirs = torch.ops.quantized.mul(stored(a, left), stored(b, right), *format_of(result)).int_repr().numpy()
        graph = product(((250, 100), left), ((250, 100), right), result, reciprocal_multiplier)
        oracle.compare(graph, {"x0": a, "x1": b}, theirs, sharp=True)
    oracle.finish()


@only_fbgemm
def test_add_on_power_of_two_scales(engine: str) -> None:
    """Elsewhere a fused multiply-add dequantizes, which no island does; qnnpack adds in fixed point."""
    oracle = Oracle(engine)
    rng = np.random.default_rng(5)
    a, b = (random_integers(rng, U8, (250, 100)) for _ in range(2))
    for s1, s2, so in ((0.5, 0.25, 0.75), (0.125, 0.125, 0.25), (0.5, 0.5, 3.5), (0.5, 0.25, 1.5)):
        left, right, result = affine(U8, s1, 3), affine(U8, s2, 200), affine(U8, so, 128)
        theirs = torch.ops.quantized.add(stored(a, left), stored(b, right), *format_of(result)).int_repr().numpy()
        inputs = [((250, 100), left), ((250, 100), right)]
        for rule in QuantizeRule:
            oracle.compare(island(inputs, Add, result, rule), {"x0": a, "x1": b}, theirs)
    oracle.finish()


MAPS = (2, 23, 22, 60)


def pool_options(kind: str) -> dict[str, Any]:
    kernel, strides, pads = POOLS[kind]
    return {"kernel_size": kernel, "stride": strides, "padding": pads[:2]}


SYMMETRIC_POOLS = [k for k, (_, _, pads) in POOLS.items() if pads[:2] == pads[2:]]


@pytest.mark.parametrize("kind", SYMMETRIC_POOLS)
def test_max_pool(engine: str, kind: str) -> None:
    oracle = Oracle(engine)
    x, element = random_integers(np.random.default_rng(6), U8, MAPS), affine(U8, 0.1, 3)
    found = torch.nn.functional.max_pool2d(stored(x.transpose(0, 3, 1, 2), element), **pool_options(kind))
    theirs = found.int_repr().numpy().transpose(0, 2, 3, 1)
    oracle.compare(single(FixedMaxPool, [(MAPS, element)], **slides(kind)), {"x0": x}, theirs)
    oracle.finish()


@only_fbgemm
@pytest.mark.parametrize("kind", [*SYMMETRIC_POOLS, "whole maps"])
def test_average_pool(engine: str, kind: str) -> None:
    """Of contiguous maps, channels first; with channels last another kernel rounds otherwise."""
    oracle = Oracle(engine)
    rng = np.random.default_rng(7)
    functional = torch.nn.functional
    shape = (200, 2, 3, 60) if kind == "whole maps" else MAPS
    for scale, zero in ((0.25, 0), (0.25, 3), *zip(rng.uniform(0.01, 0.1, 6), range(98, 104), strict=True)):
        x, element = random_integers(rng, U8, shape), affine(U8, scale, zero)
        source = stored(x.transpose(0, 3, 1, 2), element)
        if kind == "whole maps":
            found, how = functional.adaptive_avg_pool2d(source, (1, 1)), slides("2x2") | {"kernel": (2, 3)}
        else:
            found = functional.avg_pool2d(source, **pool_options(kind), count_include_pad=False)
            how = slides(kind)
        graph = single(FixedAveragePool, [(shape, element)], rounding=Rounding.HALF_EVEN, **how)
        theirs = found.int_repr().numpy().transpose(0, 2, 3, 1)
        oracle.compare(graph, {"x0": x}, theirs)
        away = single(FixedAveragePool, [(shape, element)], rounding=Rounding.HALF_AWAY, **how)
        assert np.any(both(away, {"x0": x}) != theirs), "the integers hold no ties"
    oracle.finish()


def test_dequantize(engine: str) -> None:
    oracle = Oracle(engine)
    rng = np.random.default_rng(8)
    for scale, zero in ((0.25, 0), *zip(rng.uniform(0.001, 0.2, 10), rng.integers(0, 256, 10), strict=True)):
        element, x = affine(U8, scale, zero), random_integers(rng, U8, (1000,))
        oracle.compare(single(Dequantize, [((1000,), element)]), {"x0": x}, stored(x, element).dequantize().numpy())
    oracle.finish()


@only_fbgemm
def test_quantize_with_the_zero_point_inside(engine: str) -> None:
    """On x86 PyTorch computes `rint(fma(x, 1 / scale, zero))`, so that with odd zero points ties go the other way."""
    oracle = Oracle(engine)
    rng = np.random.default_rng(9)
    ties = rng.integers(-300, 300, 5000) + 0.5
    for scale in (0.25, 2.0**-7, 4.0, *(float(F32(s)) for s in rng.uniform(0.001, 0.2, 20))):
        x = (ties * scale).astype(F32)
        for zero in (0, 254, 11, 97):
            element = affine(U8, scale, zero)
            theirs = torch.quantize_per_tensor(torch.from_numpy(x), *format_of(element), torch.quint8)
            fused, apart = (
                single(Quantize, [(x.shape, FloatType())], elements=[element], rule=rule, rounding=Rounding.HALF_EVEN)
                for rule in (QuantizeRule.RECIPROCAL_FUSED, QuantizeRule.RECIPROCAL)
            )
            oracle.compare(fused, {"x0": x}, theirs.int_repr().numpy())
            if zero % 2:
                assert np.any(both(apart, {"x0": x}) != theirs.int_repr().numpy())
    oracle.finish()
