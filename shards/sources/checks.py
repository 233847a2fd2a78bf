"""What sources check alike; ValueError says what is wrong, and the source adds where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.format.features import FeatureType, beyond_uint8

_FEW = 8  # pixels of an image in which boxes may be as small as one pixel
_TOLERANCE = 1.0  # pixels that a box may reach out of its image; it is clamped


class PartError(ValueError):
    """What is wrong with a part of a record; `part` is the column or member that it is in."""

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(problem)
        self.part = part


def checked(part: str, check: Callable[..., NDArray], *arguments: Any) -> NDArray:
    """The result of a check; its ValueError becomes a PartError."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise PartError(part, str(error)) from None


def half(features: NDArray) -> NDArray[np.float16]:
    """Features as float16, all finite."""
    # Values beyond float16 become infinite here; the check finds those and NaN alike.
    with np.errstate(over="ignore", invalid="ignore"):
        out = features.astype(np.float16)
    if not np.isfinite(out).all():
        i, j = np.argwhere(~np.isfinite(out))[0]
        raise ValueError(f"object {i} has {features[i, j]}, which is no finite float16 value")
    return out


def stored(features: NDArray, feature_type: FeatureType) -> NDArray[np.floating]:
    """Features that can be stored so: as float16, or as they are, finite in float32."""
    if feature_type == "fp16":
        return half(features)
    with np.errstate(over="ignore", invalid="ignore"):
        out = features if features.dtype == np.float16 else features.astype(np.float32, copy=False)
    if not np.isfinite(out).all():
        i, j = np.argwhere(~np.isfinite(out))[0]
        raise ValueError(f"object {i} has {features[i, j]}, which is no finite float32 value")
    if feature_type == "uint8" and (beyond := beyond_uint8(out)).any():
        i, j = np.argwhere(beyond)[0]
        raise ValueError(f"object {i} has {out[i, j]}: uint8 cannot hold values beyond ±1.7e38")
    return out


def fractions(boxes: NDArray, width: int, height: int, pixels: bool = True) -> NDArray[np.float32]:
    """Boxes (n, 4) x1 y1 x2 y2 as fractions of width and height; `pixels` says that they are given
    in pixels."""
    image = np.asarray([width, height, width, height], dtype=np.float32)
    size = image if pixels else np.ones(4, dtype=np.float32)
    margin = _TOLERANCE * size / image
    good = np.isfinite(boxes) & (boxes >= -margin) & (boxes <= size + margin)
    if not good.all():
        i = int(np.argwhere(~good)[0][0])
        shape = f"the {width} × {height} image" if pixels else "0..1"
        raise ValueError(f"box {i} is {boxes[i].tolist()}, outside of {shape}")
    if pixels and max(width, height) > _FEW and (boxes <= 1).all():
        raise ValueError(
            f"all boxes lie in 0..1: they are fractions, not pixels of the {width} × {height} image"
        )
    out = np.clip(boxes / size, 0.0, 1.0).astype(np.float32)
    turned = (out[:, 0] > out[:, 2]) | (out[:, 1] > out[:, 3])
    if turned.any():
        i = int(np.argmax(turned))
        raise ValueError(f"box {i} is {boxes[i].tolist()}, which is not x1 y1 x2 y2")
    return out


def ids(values: NDArray, classes: int) -> NDArray[np.int32]:
    """Class ids 0..classes - 1."""
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        raise ValueError("the ids are not all integers")
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(f"ids run from {values.min()} to {values.max()}, not in 0..{classes - 1}")
    return values.astype(np.int32)


def confidences(values: NDArray) -> NDArray[np.float32]:
    """Softmax output: a rounding error above 1 is let through."""
    if not ((values >= 0) & (values <= 1.001)).all():
        raise ValueError("a confidence is not in 0..1")
    return values.astype(np.float32, copy=False)
