"""How features are stored: as fp16, as fp32, or as uint8 with a scale and a minimum of each box.

A row of uint8, of one object, is `scale` and `minimum` as f32 and then a byte a value:

    value = minimum + scale * byte,   scale = (largest - smallest) / 255,   minimum = smallest

so no value is off by more than half a scale (and the rounding of fp32). Values are within half of
what fp32 holds, so that none is infinite when it is decoded. A row of equal values has scale 0. A
row of zero bytes is a row of zeros: the mark of a masked object, and padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FeatureType = Literal["fp16", "fp32", "uint8"]

HEAD = 8
"""Bytes before the values of a row of uint8."""

NUMPY: dict[FeatureType, str] = {"fp16": "<f2", "fp32": "<f4", "uint8": "u1"}
"""The type of the elements of a stored row."""


_LARGEST = float(np.finfo(np.float32).max) / 2
"""Magnitude up to which the range of a row, and every step of decoding it, is in fp32."""


def stored_width(feature_type: FeatureType, feature_dim: int) -> int:
    """Elements of a stored row."""
    return feature_dim + HEAD if feature_type == "uint8" else feature_dim


def beyond_uint8(features: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(n, D): which of finite numbers are too large for rows of uint8."""
    out: NDArray[np.bool_] = np.abs(features.astype(np.float32, copy=False)) > _LARGEST
    return out


def to_uint8(features: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Rows (n, D) of finite numbers, none of them `beyond_uint8`, as rows (n, 8 + D)."""
    values = features.astype(np.float32)
    least = values.min(axis=1, keepdims=True)
    # In f64, to be rounded once.
    scale = ((values.max(axis=1, keepdims=True).astype(np.float64) - least) / 255).astype("<f4")
    steps = (values.astype(np.float64) - least) / np.where(scale > 0, scale, 1)
    out = np.empty((len(values), HEAD + values.shape[1]), dtype=np.uint8)
    out[:, :4] = np.ascontiguousarray(scale).view(np.uint8)
    out[:, 4:HEAD] = np.ascontiguousarray(least.astype("<f4")).view(np.uint8)
    out[:, HEAD:] = np.clip(np.rint(steps), 0, 255)
    return out


def from_uint8(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The inverse: rows (…, 8 + D) as (…, D)."""
    head = np.ascontiguousarray(rows[..., :HEAD]).view("<f4")
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged rows
        out: NDArray[np.float32] = head[..., 1:] + head[..., :1] * rows[..., HEAD:].astype("f4")
    return out


def as_numbers(stored: NDArray) -> NDArray[np.floating]:
    """Stored rows of any type as rows of numbers (…, D)."""
    return from_uint8(stored) if stored.dtype == np.uint8 else stored


@dataclass
class Rounding:
    """What storing features as uint8 has cost."""

    largest: float = 0.0
    """Difference of a value."""
    total: float = 0.0
    """Of all differences."""
    values: int = 0
    of_range: float = 0.0
    """Largest difference over the range of its row's values."""

    def stored(self, features: NDArray) -> NDArray[np.uint8]:
        """Rows (n, D) of numbers as rows of uint8, counted; rows that are stored so as they are."""
        if features.dtype == np.uint8:
            return features
        before = features.astype(np.float32)
        rows = to_uint8(before)
        error = np.abs(from_uint8(rows) - before)
        spread = np.ptp(before, axis=1)
        self.largest = max(self.largest, float(error.max()))
        self.total += float(error.sum(dtype=np.float64))
        self.values += error.size
        share = error.max(axis=1)[spread > 0] / spread[spread > 0]
        self.of_range = max(self.of_range, float(share.max(initial=0.0)))
        return rows

    def add(self, other: Rounding) -> None:
        self.largest = max(self.largest, other.largest)
        self.of_range = max(self.of_range, other.of_range)
        self.total += other.total
        self.values += other.values

    def line(self) -> str:
        mean = self.total / max(self.values, 1)
        return (
            f"features as uint8 are off by {mean:.2g} in the mean and {self.largest:.2g} at most, "
            f"{self.of_range:.2%} of the range of a box's values"
        )
