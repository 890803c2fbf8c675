"""Accumulating integer ops: what a chain of products sums to, what it may hold on the way, and how it overflows."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qir.affine import Form
from qir.arrays import Array
from qir.fixed_point import Overflow, RequantizeForm, Rounding, kept_bounds, narrow, round_shift, rounded_product
from qir.interval import Bounds, Interval, exact, gcd, product_ends
from qir.ir import FIXED_ONLY, Op, OpBounds
from qir.types import ElementType, IntegerType, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]


#: Overflow modes of which each step of a sum counts: the sum in another order, or narrowed once, may differ.
STEPWISE: Final = frozenset({Overflow.SATURATE, Overflow.SATURATE_ZERO, Overflow.SATURATE_SYMMETRIC})
_WIDEST_SHIFT: Final = 31
#: Products that bounds of partial sums over affine forms may take.
_MOST_PREFIX_PRODUCTS: Final = 1 << 28


class Order(enum.StrEnum):
    """The order in which an accumulator takes its products, outermost loop first, and where the bias comes in."""

    KHWC = "khwc"  # kernel row, kernel column, input channel; then the bias
    BIAS_KHWC = "bias_khwc"  # the bias is the initial value
    CKHW = "ckhw"  # input channel, kernel row, kernel column; then the bias
    BIAS_CKHW = "bias_ckhw"

    @property
    def bias_first(self) -> bool:
        """Whether the bias is the initial value."""
        return self in (Order.BIAS_KHWC, Order.BIAS_CKHW)

    @property
    def channels_outside(self) -> bool:
        """Whether all taps of one input channel come before those of the next."""
        return self in (Order.CKHW, Order.BIAS_CKHW)


@dataclass(frozen=True, eq=False, kw_only=True)
class Accumulating(Op):
    """Base of ops that sum into an accumulator, step by step: `acc = narrow(acc + p * 2**product_shift)`.

    `overflow` says what each step does when the sum leaves `accumulator`; `none` claims a proof that it never does.
    A negative `product_shift` drops fraction bits: the sum is rounded by `rounding` at each step, as an assignment to
    an ap_fixed accumulator does. Where there is a type `product`, the shifted product is rounded and narrowed to it by
    `product_overflow` before it is added, as L_mult of ITU-T G.191 does (`product_shift=1, product=s32`), and the sum
    then needs no rounding.
    `partial` is a proof: an interval that holds every partial sum in `order`, the initial 0 and the result included.
    `channel_bits` claims, for each output channel or for all of them alike, the bits of a signed accumulator that holds
    every partial sum of it.
    """

    stages = FIXED_ONLY
    accumulator: IntegerType
    overflow: Overflow
    order: Order
    product_shift: int | None = None
    product: IntegerType | None = None
    product_overflow: Overflow | None = None
    rounding: Rounding | None = None
    partial: Interval | None = None
    channel_bits: Array | None = None

    def infer_elements(self) -> tuple[ElementType, ...]:
        """The result is the accumulator itself."""
        return (self.accumulator,)

    def check(self) -> Iterator[str]:
        """The accumulator is the result, and each step is one that has a meaning."""
        if self.result.type.element != self.accumulator:
            yield f"the result must be the accumulator, {self.accumulator}"
        yield from integer_operands(self)
        yield from narrowing_faults(self.accumulator, self.overflow, "sums")
        if not -_WIDEST_SHIFT <= self.shift <= _WIDEST_SHIFT:
            yield f"products are shifted by at most {_WIDEST_SHIFT} bits either way"
        if (self.rounding is not None) != (self.shift < 0):
            yield "a rounding belongs to a negative product_shift, and only to it"
        if self.channel_bits is not None and not self._are_widths(self.channel_bits.data):
            yield "channel_bits are widths of 1 to 64 bits, one, or one for each output channel"
        if (self.product is None) != (self.product_overflow is None):
            yield "product and product_overflow belong together"
        if self.product is not None and self.product_overflow is not None:
            yield from narrowing_faults(self.product, self.product_overflow, "products")
            if not self.product.lo <= 0 <= self.product.hi:  # what padding adds must stay 0
                yield f"products must be able to be 0, which {self.product} is not"

    def _are_widths(self, bits: Tensor) -> bool:
        counts = {1, *(d for d in self.result.type.shape[-1:] if isinstance(d, int))}
        listed = bits.dtype.kind == "i" and bits.ndim == 1 and len(bits) in counts
        return listed and bool(((bits > 0) & (bits <= 64)).all())

    @property
    def shift(self) -> int:
        """The power of two that products are multiplied by."""
        return self.product_shift or 0

    @property
    def dropped_bits(self) -> int:
        """Fraction bits that each step rounds away."""
        return max(-self.shift, 0) if self.product is None else 0

    @property
    def is_stepwise(self) -> bool:
        """Whether every step of the sum counts, so that it must be taken in order."""
        return self.overflow in STEPWISE or self.dropped_bits > 0

    @property
    def is_productwise(self) -> bool:
        """Whether every product counts for itself, so that they must not be summed before they are narrowed."""
        narrows = self.product_overflow not in (None, Overflow.NONE)
        return self.is_stepwise or narrows or self.shift < 0

    def sum_bits(self, term_bits: int, count: int) -> int:
        """Bits that hold `count` exact sums of a term of `term_bits`, the accumulator and the bias."""
        bias = self.optional_operand(2)
        narrowed = self.product.bits + 1 if self.product is not None else 0
        bias_bits = bits_of(bias.type) if bias is not None else 0
        widest = max(term_bits, self.accumulator.bits + 1, narrowed, bias_bits)
        return widest + abs(self.shift) + (count + 1).bit_length()

    def entering(self, product: Tensor) -> Tensor:
        """What a product adds to the sum; where steps drop bits, with the bits that they drop."""
        if self.shift > 0:
            product = product << self.shift
        if self.product is None or self.product_overflow is None:
            return product
        if self.shift < 0:
            assert self.rounding is not None
            product = round_shift(product, -self.shift, self.rounding)
        return np.asarray(narrow(product, self.product.lo, self.product.hi, self.product_overflow))

    def accumulate(self, chain: Iterator[Tensor], start: Tensor, bias: Tensor | None) -> Tensor:
        """Sum `chain`, whose items are what products add in order, step by step where the steps matter."""
        total = start
        if bias is not None and self.order.bias_first:
            total = total + bias
        for product in chain:
            total = self._step(total, product)
            if self.is_stepwise:
                total = self.close(total)
        if bias is not None and not self.order.bias_first:
            total = total + bias
        return self.close(total)

    def close(self, total: Tensor) -> Tensor:
        """The accumulator after its last step: wrapping once equals wrapping at every step."""
        return np.asarray(narrow(total, self.accumulator.lo, self.accumulator.hi, self.overflow))

    def contract(self, tap: Tensor, kernel: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """What the products of one tap [..., groups, 1, C] with its weights [groups, O, C] add, as arrays of `shape`.

        One item an input channel where every product counts, else their sum at once.
        """
        channels = kernel.shape[-1]
        if self.is_productwise or channels == 1:
            for c in range(channels):
                yield self.entering((tap[..., c] * kernel[..., c]).reshape(shape))
        else:
            yield self.entering((tap @ kernel.transpose(0, 2, 1)).reshape(shape))

    def chains(self, channel: int, operands: Sequence[Bounds]) -> Chains | None:
        """The sums of an output channel that `bounds` tells apart; None: no rule. Constant operands hold `data`."""
        return None

    def chain_bounds(self, terms: Terms, valid: Tensor, bias: Bounds | None) -> OpBounds:
        """Bounds of a chain of products.

        `terms` [outputs, taps, inputs] bound each product; `valid` [patterns, taps] says which taps are on real
        elements for each kind of position (the others add 0); `bias` bounds what is added to each output.
        """
        if not terms.lo.size:  # nothing is summed but the bias
            zeros = np.zeros((terms.lo.shape[0], 1, 1), np.int64)
            terms, valid = Terms(zeros, zeros, zeros), np.ones((1, 1), bool)
        if self.order.channels_outside:  # each term is a tap of its own
            terms = terms.map(lambda e: e.transpose(0, 2, 1).reshape(len(e), -1, 1))
            valid = np.tile(valid, (1, terms.lo.shape[1] // valid.shape[1]))
        is_padded = not valid.all()
        lanes = terms.lanes(is_padded=is_padded)
        entering, product = self.term_images(terms)
        if product is not None and is_padded:
            product = product.hull(Interval(0, 0))
        kept = Interval(*kept_bounds(self.accumulator.lo, self.accumulator.hi, self.overflow))
        found = None if self.dropped_bits else self._exact_sums(entering, valid, bias)
        if found is None or (self.overflow in STEPWISE and not kept.contains(found.partial.hull)):
            found = self._stepwise_sums(entering, valid, bias, kept)
        result, partial = found.result, found.partial.hull
        if self.overflow not in STEPWISE and not kept.contains(partial):
            result = Bounds.of(self.accumulator.lo, self.accumulator.hi)
        return OpBounds((result,), partial, partial, product, lanes, found.partial)

    def kernel(self, bounds: Sequence[Bounds]) -> Kernel | None:
        """The sum as weights of neighbours, where they are constant."""
        return None

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The sum as no step narrows or rounds it."""
        form, kernel = operands[0], self.kernel(bounds)
        return None if kernel is None or form is None else self._with_bias(kernel.of(form), bounds)

    def affine_partials(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Bounds | None:
        """Bounds a channel of every partial sum, from the form of an operand that is no source of its own."""
        x = operands[0]
        kernel = None if x is None or x.is_source else self.kernel(bounds)
        if x is None or kernel is None or kernel.is_padded:
            return None
        found = Bounds.of(np.zeros(kernel.outputs, np.int64), 0)
        if len(bounds) > 2 and self.order.bias_first:
            found = found.union(bounds[2])
        for prefix in kernel.prefixes(x, self.order):
            form = self._with_bias(prefix, bounds, is_last=False)
            if form is None:
                return None
            found = found.union(form.bounds())
        last = self.affine(operands, bounds)  # where the bias comes last
        return None if last is None else found.union(last.bounds())

    def entered(self, form: Form | None, count: int) -> Form | None:
        """The sum of at most `count` products as they enter it: shifted, and rounded one by one or step by step."""
        if form is None:
            return None
        form = replace(form, scale=form.scale - self.shift)
        if self.shift >= 0:
            return form
        _, below, above = rounded_product(RequantizeForm.SHIFT, self.rounding, 1, self.shift, 0)
        return form.shifted(math.floor(count * below), math.ceil(count * above))

    def _with_bias(self, form: Form | None, bounds: Sequence[Bounds], *, is_last: bool = True) -> Form | None:
        """What enters plus the bias; before the last product only where the bias comes first."""
        count = self.macs() // max(self.result.type.sample_size, 1)
        form = self.entered(form, count)
        has_bias = len(bounds) > 2 and (is_last or self.order.bias_first)
        return form.shifted(bounds[2].lo, bounds[2].hi) if form is not None and has_bias else form

    def _exact_sums(self, terms: Terms, valid: Tensor, bias: Bounds | None) -> _Sums:
        """The sums of what enters, none of them narrowed: independent operands attain every bound."""
        ends, extremes = [], []
        for part, least, low in ((terms.lo, np.minimum, True), (terms.hi, np.maximum, False)):
            base = _bias_ends(bias, low, part)
            first = base if self.order.bias_first else np.zeros_like(base)
            sums = np.cumsum(part, axis=2)  # within a tap
            inside, whole = least.reduce(sums, axis=2), sums[:, :, -1]
            finals, reached = [], [first * 0, first]
            for pattern in valid:
                steps = np.where(pattern, whole, 0)
                after = np.cumsum(steps, axis=1) + first[:, None]
                before = after - steps
                reached.append(least.reduce(np.where(pattern, before + inside, before), axis=1))
                finals.append(after[:, -1] if self.order.bias_first else after[:, -1] + base)
            ends.append(np.array(finals))
            extremes.append(least.reduce([*reached, *finals]))
        low = ends[0].min(axis=0)
        step = None
        if terms.step is not None:
            taps = np.gcd.reduce(terms.step, axis=2)
            parts = [exact(np.gcd.reduce(np.where(pattern, taps, 0), axis=1)) for pattern in valid]
            parts += [*exact(ends[0] - low), *([bias.steps] if bias else [])]
            step = gcd(*parts)
        return _Sums(Bounds.of(low, ends[1].max(axis=0), step), Bounds.of(*extremes))

    def _stepwise_sums(self, terms: Terms, valid: Tensor, bias: Bounds | None, kept: Interval) -> _Sums:
        """The sums as each step rounds and narrows them, before (`partial`) and after (`result`).

        Steps are monotonic, so that independent operands attain the bounds; where sums that leave become 0, which is
        not monotonic, the image of a step is a hull.
        """
        low, high = (_bias_ends(bias, is_low, part) for is_low, part in ((True, terms.lo), (False, terms.hi)))
        reach = max(self.accumulator.hi, -self.accumulator.lo, *(abs(int(e)) for e in (low.min(), high.max())))
        reach = max(reach, *(abs(int(e)) for e in (terms.lo.min(), terms.hi.max())))
        if reach.bit_length() + self.dropped_bits + terms.lo[0].size.bit_length() > 60:
            terms, low, high = terms.map(exact), exact(low), exact(high)
        lo, hi = (np.repeat(end[None] * self.order.bias_first, len(valid), axis=0) for end in (low, high))
        least, most = np.minimum(lo, 0), np.maximum(hi, 0)
        for tap, place in np.ndindex(terms.lo.shape[1:]):
            here = valid[:, tap, None]
            lo, hi = (
                self._step(end, np.where(here, part[:, tap, place], 0))
                for end, part in ((lo, terms.lo), (hi, terms.hi))
            )
            least, most = np.minimum(least, lo), np.maximum(most, hi)
            if self.overflow in STEPWISE:
                lo, hi = narrowed_ends(lo, hi, kept, self.overflow)
        if not self.order.bias_first:
            lo, hi = lo + low, hi + high
            least, most = np.minimum(least, lo), np.maximum(most, hi)
        if self.overflow in STEPWISE:
            lo, hi = narrowed_ends(lo, hi, kept, self.overflow)
        return _Sums(Bounds.of(lo.min(axis=0), hi.max(axis=0)), Bounds.of(least.min(axis=0), most.max(axis=0)))

    def _step(self, total: Tensor, product: Tensor) -> Tensor:
        """The sum after one more product, rounded where steps drop bits."""
        if not self.dropped_bits:
            return total + product
        assert self.rounding is not None
        return np.asarray(round_shift((total << self.dropped_bits) + product, self.dropped_bits, self.rounding))

    def term_images(self, terms: Terms) -> tuple[Terms, Interval | None]:
        """What products add to the sum, with the bits that a step drops, and bounds before `product` narrows them."""
        lo, hi, step = terms.lo, terms.hi, terms.step
        if self.shift > 0:
            reach = max(abs(int(lo.min())), abs(int(hi.max()))).bit_length() + self.shift + lo.size.bit_length()
            lo, hi = (exact(e) if reach > 60 else e for e in (lo, hi))
            lo, hi = lo * (1 << self.shift), hi * (1 << self.shift)
            step = None if step is None else exact(step) * (1 << self.shift)
        if self.product is None or self.product_overflow is None:
            return Terms(lo, hi, step), None
        if self.shift < 0:
            assert self.rounding is not None
            lo, hi = (round_shift(e, -self.shift, self.rounding) for e in (lo, hi))  # monotonic
            step = None
        free = Interval(int(lo.min()), int(hi.max()))
        kept = Interval(*kept_bounds(self.product.lo, self.product.hi, self.product_overflow))
        if kept.contains(free):
            return Terms(lo, hi, step), free
        if self.product.bits + lo.size.bit_length() > 60:
            lo, hi = exact(lo), exact(hi)
        return Terms(*narrowed_ends(lo, hi, kept, self.product_overflow)), free


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """Sums of one output channel, one for each kind of position, and the elements that they multiply, in their order.

    `positions` are indices into the result of one sample. `left` and `right` [positions, products] count the elements
    of the first two operands, row by row; where `right` is None, the elements of the first are summed themselves.
    `valid` says which products there are: the others lie on padding and add 0.
    """

    positions: tuple[tuple[int, ...], ...]
    left: Tensor
    right: Tensor | None
    valid: Tensor


@dataclass(frozen=True, eq=False)
class Kernel:
    """A sum of neighbours: int64 weights [outputs, inputs] at each offset, strides, and the grid of the result."""

    taps: Mapping[tuple[int, ...], Tensor]
    strides: tuple[int, ...]
    grid: tuple[int, ...]
    is_padded: bool = False

    @property
    def outputs(self) -> int:
        """The output channels."""
        return len(next(iter(self.taps.values())))

    def of(self, form: Form) -> Form | None:
        """The sum over a form."""
        return form.convolved(self.taps, self.strides, self.grid, is_padded=self.is_padded)

    def prefixes(self, form: Form, order: Order) -> Iterator[Form | None]:
        """The sum after each product in turn, good until the next is asked for; None where there are too many."""
        inputs = next(iter(self.taps.values())).shape[1]
        weights = sum(w.size for linear in form.terms.values() for w in linear.arrays())
        if self.outputs * weights * len(self.taps) ** 2 * inputs > _MOST_PREFIX_PRODUCTS:
            yield None
            return
        places = [(tap, c) for tap in self.taps for c in range(inputs)]
        if order.channels_outside:
            places = [(tap, c) for c in range(inputs) for tap in self.taps]
        partial = {tap: np.zeros_like(w) for tap, w in self.taps.items()}
        for tap, c in places:
            partial[tap][:, c] = self.taps[tap][:, c]
            yield replace(self, taps=partial).of(form)


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Exact bounds of products, [outputs, taps, inputs] along the chain; `step` as of `Bounds`.

    int64 arrays where the weights are constant and every sum of the terms fits, Python ints elsewhere.
    """

    lo: Tensor
    hi: Tensor
    step: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """Each part changed alike."""
        return Terms(change(self.lo), change(self.hi), None if self.step is None else change(self.step))

    def lanes(self, *, is_padded: bool) -> Mapping[str, Interval]:
        """Bounds of exact products, and of sums of two that follow each other, counted from the first.

        Where `is_padded`, taps on padding add 0 instead.
        """
        lo, hi = (e.reshape(len(e), -1) for e in (self.lo, self.hi))
        if is_padded:
            lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        found = {"product": Interval(int(lo.min()), int(hi.max()))}
        if lo.shape[1] % 2:
            lo, hi = (np.concatenate([e, np.zeros_like(e[:, :1])], axis=1) for e in (lo, hi))
        pairs = lo[:, ::2] + lo[:, 1::2], hi[:, ::2] + hi[:, 1::2]
        return found | {"pair": Interval(int(pairs[0].min()), int(pairs[1].max()))}


class _Sums(NamedTuple):
    """Bounds a channel of the accumulator at the end, and of every sum on the way there."""

    result: Bounds
    partial: Bounds


def _bias_ends(bias: Bounds | None, low: bool, terms: Tensor) -> Tensor:
    """What the bias adds to each output: int64 where it and all sums of the terms fit."""
    if bias is None:
        return np.zeros(len(terms), terms.dtype)
    base = np.broadcast_to(bias.lo if low else bias.hi, (len(terms),))
    reach = max(abs(int(e)) for e in (terms.min(), terms.max(), base.min(), base.max()))
    fits = terms.dtype != object and reach.bit_length() + terms[0].size.bit_length() < 62
    return base.astype(np.int64) if fits else base


def narrowed_ends(lo: Tensor, hi: Tensor, kept: Interval, overflow: Overflow) -> tuple[Tensor, Tensor]:
    """Bounds of the images of values in [lo, hi], element by element, of which those within `kept` stay."""
    leaves = (lo < kept.lo) | (hi > kept.hi)
    match overflow:
        case Overflow.NONE:
            return lo, hi
        case Overflow.WRAP:
            return np.where(leaves, kept.lo, lo), np.where(leaves, kept.hi, hi)
        case Overflow.SATURATE_ZERO:  # what leaves is 0, the others stay
            low, high = np.clip(lo, kept.lo, kept.hi), np.clip(hi, kept.lo, kept.hi)
            return np.where(leaves, np.minimum(low, 0), low), np.where(leaves, np.maximum(high, 0), high)
        case _:
            return np.clip(lo, kept.lo, kept.hi), np.clip(hi, kept.lo, kept.hi)


def narrowing_faults(storage: IntegerType, overflow: Overflow, what: str = "values") -> Iterator[str]:
    """What keeps values from being narrowed to these storage bounds, one sentence each."""
    if overflow is Overflow.WRAP and storage.is_narrowed:
        yield f"{what} cannot wrap to the bounds of {storage}, which are not those of its container"
    elif overflow is Overflow.SATURATE_ZERO and not storage.lo <= 0 <= storage.hi:
        yield f"{what} cannot become 0 within the bounds of {storage}"
    elif overflow is Overflow.SATURATE_SYMMETRIC and storage.hi < 0:
        yield f"{what} cannot saturate to the bounds of {storage} and their negatives, which have no number in common"


def centre(data: Tensor, kind: TensorType) -> Tensor:
    """`q - zero_point` for data of this type; per-axis zero points run along their axis."""
    zeros = zero_array(kind.element)
    axis = getattr(kind.element, "axis", None)
    if axis is None:
        return data - int(zeros)
    return data - zeros.reshape([-1 if i == axis else 1 for i in range(data.ndim)])


def zero_ends(kind: TensorType) -> tuple[Tensor, Tensor]:
    """The zero point of each channel, twice, or the least and the greatest where they run along another axis."""
    zeros = exact(zero_array(kind.element))
    if not zeros.size:  # of no channels
        return exact(0), exact(0)
    if getattr(kind.element, "axis", None) in (None, kind.rank - 1):
        return zeros, zeros
    return exact(zeros.min()), exact(zeros.max())


def centered(kind: TensorType, bounds: Bounds) -> Bounds:
    """Bounds of `q - zero_point`, with the centred data where the tensor is constant."""
    low, high = zero_ends(kind)
    shifted, data = bounds.within(-high, -low), bounds.data
    if data is not None:
        storage = storage_of(kind.element)
        data = centre(exact(data) if storage is None or storage.bits > 60 else data.astype(np.int64), kind)
    return Bounds(shifted.lo, shifted.hi, data, shifted.step)


def term_bounds(x: Bounds, w: Bounds) -> Terms:
    """Bounds of the products `x * w` of centred operands: from the very weights where they are constant."""
    if w.data is None:
        corners = np.stack([exact(a * b) for a in (x.lo, x.hi) for b in (w.lo, w.hi)])
        return Terms(exact(corners.min(axis=0)), exact(corners.max(axis=0)))
    span = x.hull
    largest = max(abs(int(span.lo)), abs(int(span.hi)), 1) * max(int(np.abs(w.data).max(initial=0)), 1)
    weights = w.data if largest.bit_length() + int(w.data.size).bit_length() < 60 else exact(w.data)
    low, high, step = (e.astype(weights.dtype) for e in (x.lo, x.hi, x.steps))
    return Terms(*product_ends(weights, low, high), np.abs(weights) * step)


def integer_operands(op: Op) -> Iterator[str]:
    """A sentence for each operand that holds reals."""
    for operand in op.operands:
        if storage_of(operand.type.element) is None:
            yield f"%{operand.name} holds reals, not integers; quantize it first"


def bits_of(kind: TensorType) -> int:
    """Bits of `q - zero_point`, sign included."""
    storage = storage_of(kind.element)
    return (storage.bits if storage else 32) + 2
