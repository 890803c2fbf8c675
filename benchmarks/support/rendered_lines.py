"""Lines of text drawn with TrueType fonts, upright or turned by 180 degrees: labels that are true by construction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]

_TEXT = (
    "quantize kernel tensor Model integer bit exact accuracy compile Hardware target layer convolution signal "
    "Release package version error warning Result system network memory address output input shape batch window "
    "filter order total amount invoice Customer number street London Paris Berlin Tokyo price table figure "
    "chapter section Page review open source license value range scale zero point round shift cast clip weight "
    "bias graph node edge"
)
_WORDS = _TEXT.split()


def oriented_lines(count: int, fonts: Sequence[Path]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """`count` lines as float32 [count, 3, 48, 192], and 1 for those upside down: every second one.

    Blurred by half the resolution and noisy, so that a good classifier errs on some. The same every time.
    """
    rng = np.random.default_rng(11)
    images = []
    for number in range(count):
        line = _degraded(rng, _line(rng, fonts))
        images.append(_fitted(line[::-1, ::-1] if number % 2 else line))
    return np.stack(images), np.arange(count) % 2


def _word(rng: np.random.Generator) -> str:
    """A number, a price or a word in some case."""
    kind = rng.random()
    if kind < 0.2:
        return str(rng.integers(10, 99999))
    if kind < 0.3:
        return f"{rng.integers(1, 2000) / 100:.2f}"
    word = _WORDS[int(rng.integers(len(_WORDS)))]
    if rng.random() < 0.7:
        return word
    return word.upper() if rng.random() < 0.5 else word.title()


def _line(rng: np.random.Generator, fonts: Sequence[Path]) -> Pixels:
    """One word, dark on light or the reverse, cropped with a margin: RGB [H, W, 3]."""
    text = _word(rng)
    font = ImageFont.truetype(str(fonts[int(rng.integers(len(fonts)))]), int(rng.integers(22, 40)))
    left, top, right, bottom = font.getbbox(text)
    margin = int(rng.integers(2, 8))
    ground, ink = _colour(rng.integers(170, 256, 3)), _colour(rng.integers(0, 90, 3))
    if rng.random() < 0.25:
        ground, ink = ink, ground
    image = Image.new("RGB", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), ground)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, font=font, fill=ink)
    return _noisy(rng, np.asarray(image, np.float32), 6 * rng.random())


def _degraded(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    """At half the resolution and back, with noise."""
    height, width = pixels.shape[:2]
    small = (max(8, width // 2), max(6, height // 2))
    image = Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return _noisy(rng, np.asarray(image, np.float32), 12)


def _fitted(pixels: Pixels) -> npt.NDArray[np.float32]:
    """48 pixels high, at most 192 wide, BGR in [-1, 1], zeros on the right: what PP-OCR's classifier reads."""
    height, width = pixels.shape[:2]
    fitted = min(192, int(np.ceil(48 * width / height)))
    bgr = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
    values = np.asarray(bgr.resize((fitted, 48), Image.Resampling.BILINEAR), np.float32)
    result = np.zeros((3, 48, 192), np.float32)
    result[:, :, :fitted] = values.transpose(2, 0, 1) / 127.5 - 1
    return result


def _colour(channels: npt.NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = map(int, channels)
    return red, green, blue


def _noisy(rng: np.random.Generator, values: npt.NDArray[np.float32], deviation: float) -> Pixels:
    noise = rng.normal(0, deviation, (*values.shape[:2], 1))
    return np.clip(values + noise, 0, 255).astype(np.uint8)
