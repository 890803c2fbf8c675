"""Random contracts: any combination of fields that is no contradiction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from qir.cost_tables import CostRule, Costs
from qir.errors import ContractError
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.ops.accumulate import Order
from qir.ops.fixed_rescale import QuantizeRule
from qir.target import (
    Accumulator,
    Activations,
    Addition,
    AverageRule,
    FunctionRule,
    Functions,
    Granularity,
    InputQuantization,
    Multiplication,
    Pooling,
    Product,
    ProductRule,
    Requantization,
    Requantizer,
    Scales,
    Scheme,
    SumRule,
    Target,
    WeightFormat,
    Weights,
    Width,
)

T = TypeVar("T")

REGISTERS: list[int | Width] = [Width.PROVED, 16, 20, 24, 32, 32, 40, 64]
PRODUCTS: list[int | Width] = [Width.ACCUMULATOR, 16, 32, 40]
OVERFLOWS = [o for o in Overflow if o is not Overflow.NONE]
KINDS = ("conv", "matmul", "mean", "add", "mul", "rescale")


class _Chooser:
    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def of(self, options: Sequence[T]) -> T:
        return options[int(self.random.integers(len(options)))]

    def maybe(self, one_in: int) -> bool:
        return not self.random.integers(one_in)

    def bits(self) -> tuple[int, ...]:
        several = tuple(sorted({int(b) for b in self.random.integers(1, 17, 3)}))
        return self.of([(8,), (16,), several])

    def operand(self, scales: Scales, scheme: Scheme) -> dict[str, Any]:
        return {
            "bits": self.bits(),
            "signed": scheme is Scheme.SYMMETRIC or self.maybe(2),  # unsigned without a zero point holds few graphs
            "scheme": scheme,
            "scales": scales,
            "narrow_range": self.maybe(3),
            "reduce_range": self.maybe(4),
        }

    def formula(self, scales: Scales) -> dict[str, Any]:
        shift = scales is Scales.POWER_OF_TWO and self.maybe(2)
        form = RequantizeForm.SHIFT if shift else self.of(list(RequantizeForm))
        return {
            "form": form,
            "rounding": self.of(list(Rounding)) if form is RequantizeForm.SHIFT else None,
            "reciprocal": form is RequantizeForm.FLOAT32 and self.maybe(2),
        }

    def target(self) -> Target:
        scales = self.of(list(Scales))
        schemes = [Scheme.SYMMETRIC] if scales is Scales.POWER_OF_TWO else list(Scheme)
        own: dict[str, Any] = {kind: Requantizer(**self.formula(scales)) for kind in KINDS if self.maybe(4)}
        average, functions = self.of(list(AverageRule)), self.of(list(FunctionRule))
        return Target(
            name="random",
            description="a random contract",
            floating_point=not self.maybe(4),
            activations=Activations(**self.operand(scales, self.of(schemes))),
            weights=Weights(
                **self.operand(scales, self.of(schemes)),
                conv=self.of(list(Granularity)),
                matmul=self.of(list(Granularity)),
                formats=self.of([(WeightFormat.UNIFORM,), tuple(WeightFormat)]),
            ),
            accumulator=Accumulator(
                bits=self.of(REGISTERS),
                overflow=self.of(OVERFLOWS),
                order=self.of(list(Order)),
                guard_bits=self.of([0, 0, 8]),
                rounding=self.of([None, None, Rounding.FLOOR, Rounding.HALF_EVEN]),
                wider=self.of([(), (), (48, 64)]),
            ),
            requantization=Requantization(
                **self.formula(scales),
                overflow=self.of([Overflow.SATURATE, self.of(OVERFLOWS)]),
                **own,
            ),
            addition=Addition(self.of(list(SumRule)), self.of([10, 15, 20])),
            multiplication=Multiplication(self.of(list(ProductRule))),
            pooling=Pooling(average, self.of(list(Rounding)) if average is AverageRule.INTEGER else None),
            functions=Functions(
                functions,
                8 if functions is FunctionRule.TENSORFLOW_LITE else self.of([4, 8, 10]),
                self.of(list(Rounding)),
            ),
            input=InputQuantization(self.of(list(QuantizeRule)), self.of(list(Rounding))),
            costs=Costs(CostRule.BIT_OPERATIONS),
            bias_bits=self.of([None, None, 16]),
            product=self.of([Product(), Product(self.of(PRODUCTS), self.of(OVERFLOWS), self.of([0, 1, 2]))]),
        )


def contract(seed: int) -> Target:
    """The first of a seed's random contracts that does not contradict itself."""
    chooser = _Chooser(seed)
    while True:
        try:
            return chooser.target()
        except ContractError:
            continue
