"""What is lost of a graph's outputs: numbers that are 0 where nothing is, and add up where errors are small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.errors import PassError

Outputs = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Quality:
    """A measure of loss: `loss(reference, outputs)` takes the outputs by name, all samples of each, and gives a number.

    The name stands for the function where results are kept: a changed function takes another name. To reach other
    processes, the function is one of a module, or a `functools.partial` of such.
    """

    name: str
    loss: Callable[[Outputs, Outputs], float]

    def of(self, reference: Outputs, outputs: Outputs) -> float:
        """The loss as a plain number. Raises PassError, which names the measure, for what is no finite number."""
        found = self.loss(reference, outputs)
        try:
            number = float(found)
        except (TypeError, ValueError) as fault:
            raise PassError(f"the measure {self.name!r} gives {found!r}; a loss is a finite number") from fault
        if not math.isfinite(number):
            raise PassError(f"the measure {self.name!r} gives {number}; a loss is a finite number")
        return number


def noise_to_signal(reference: Outputs, outputs: Outputs) -> float:
    """Squared error over squared reference: 10**(-SQNR / 10), the mean of it over the outputs.

    An output of zeros counts as lost where it is anything else.
    """
    found = []
    for name, wanted in reference.items():
        signal = float(np.square(wanted, dtype=np.float64).sum())
        noise = float(np.square(outputs[name].astype(np.float64) - wanted).sum())
        found.append(noise / signal if signal else float(noise > 0))
    return float(np.mean(found)) if found else 0.0


def divergence(reference: Outputs, outputs: Outputs) -> float:
    """The Kullback-Leibler divergence of class probabilities in nats, the mean over samples and outputs.

    Probabilities are outputs that add up to 1 along their last axis as they are, else their softmax.
    """
    found = []
    for name, wanted in reference.items():
        p, q = _log_probabilities(wanted, wanted), _log_probabilities(outputs[name], wanted)
        found.append(float((np.exp(p) * (p - q)).sum(axis=-1).mean()))
    return max(float(np.mean(found)), 0.0) if found else 0.0


def _log_probabilities(array: npt.NDArray[Any], kind: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Logarithms of probabilities along the last axis; `kind` shows whether the array holds such already."""
    if not array.ndim or array.shape[-1] < 2:
        raise PassError("kl compares classes along the last axis of outputs, and there are fewer than two; use sqnr")
    values = array.astype(np.float64)
    # float32 probabilities add up to 1 within their roundings, a millionth or so each; logits hardly ever do.
    if kind.min() >= 0 and np.allclose(kind.sum(axis=-1), 1, atol=1e-3):
        values = np.log(np.maximum(values, _LEAST))  # quantized probabilities may be 0
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


_LEAST: Final = 2.0**-16
SQNR: Final = Quality("sqnr", noise_to_signal)
KL: Final = Quality("kl", divergence)
QUALITIES: Final[Mapping[str, Quality]] = {q.name: q for q in (SQNR, KL)}


def quality_of(name: str) -> Quality:
    """The measure of this name. Raises PassError, which lists those there are."""
    if name not in QUALITIES:
        raise PassError(f"unknown quality {name!r}; there are: {', '.join(QUALITIES)}")
    return QUALITIES[name]


def loss_of_floor(quality: Quality, floor: float) -> Fraction:
    """The most loss that a floor of quality leaves: dB of SQNR, nats of kl, else the loss itself."""
    return Fraction(10.0 ** (-floor / 10)) if quality is SQNR else Fraction(floor)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation: 1 where both sort all alike; not a number for fewer than three, or equal ones."""
    from scipy.stats import spearmanr

    columns = np.array(pairs, np.float64).T
    if len(pairs) < 3 or any(np.ptp(column) == 0 for column in columns):
        return float("nan")
    return float(spearmanr(*columns).statistic)
