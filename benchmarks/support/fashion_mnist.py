"""Fashion-MNIST as the tests and the demo have it."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from support import models


def calibration_images() -> npt.NDArray[Any]:
    """The 256 training images that ship with qir, as the models take them."""
    return models.calibration_images()
