"""The regions of an image from a dictionary of its parts, as most stores of features hold them.

They differ in names and in how an array is written; `NAMES` has the names, the first that is there
counts. Arrays are numpy's, nested lists, or base64 of raw little-endian memory (float32; ids
int64).
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pybase64
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.record import Labels
from shards.sources import checks
from shards.sources.checks import PartError, checked
from shards.sources.regions import Options, Regions

NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image_id", "img_id"),
    "features": ("features", "x", "feat", "feats", "feature", "image_feat", "roi_features"),
    "boxes": ("boxes", "bbox", "bboxes", "box"),
    "fractions": ("norm_bb", "normalized_boxes"),
    "count": ("num_boxes", "num_bbox"),
    "width": ("image_w", "img_w", "image_width", "width"),
    "height": ("image_h", "img_h", "image_height", "height"),
    "object_id": ("objects_id", "object_id", "object_ids", "objects", "obj_ids"),
    "object_conf": ("objects_conf", "object_conf", "object_confs", "obj_probs"),
    "attribute_id": ("attrs_id", "attribute_id", "attr_id", "attr_ids"),
    "attribute_conf": ("attrs_conf", "attribute_conf", "attr_conf", "attr_probs"),
    "probabilities": ("cls_prob", "soft_labels"),
}
"""By part. `fractions` are boxes over width and height, with further columns perhaps;
`probabilities` of object classes (n, classes), or (n, 1 + classes) with the background first."""

LABELS_SETTING = {"labels": "yes or no: take those of objects, where there are any (yes)"}
_WORDS = {"yes": True, "no": False}


def wants_labels(options: Options) -> bool:
    """Whether `labels=no` is not said. DataError for another word."""
    given = options.settings.get("labels", "yes")
    if given not in _WORDS:
        raise DataError(f"labels={given:.40}: give yes or no")
    return _WORDS[given]


def find(parts: Mapping[str, Any], part: str) -> tuple[str, Any] | None:
    """Name and value of a part; None where there is none."""
    return next(((n, parts[n]) for n in NAMES[part] if parts.get(n) is not None), None)


def needed(parts: Mapping[str, Any], part: str) -> tuple[str, Any]:
    """Name and value of a part that must be there."""
    if found := find(parts, part):
        return found
    raise ValueError(f"it has no {' or '.join(NAMES[part])}")


def image_name(value: object) -> str:
    """An image's id, as people know it. ValueError for what is none."""
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"its id {value!r:.60} is not UTF-8 text") from None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"its id is a {type(value).__name__} ({value!r:.60}), which is no name")
    name = str(value)
    if not name.isascii() and name != name.encode("utf-8", "replace").decode():
        raise ValueError(f"its id {name!a:.60} is no valid Unicode")
    return name


def whole(part: str, value: object) -> int:
    """A positive integer: of Python, of numpy, or as text."""
    number = (
        value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    )
    if isinstance(number, str | bytes) and number.isascii() and number.isdigit():
        number = int(number) if len(number) < 11 else 0
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 1 << 31:
        shown = value if isinstance(value, str) else number
        shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else shown
        raise PartError(part, f"{shown!r:.40} is no positive integer")
    return number


def size_of(parts: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels, where both are there."""
    width, height = find(parts, "width"), find(parts, "height")
    return (whole(*width), whole(*height)) if width and height else None


def rows(part: str, value: Any, width: int, dtype: str = "<f4") -> NDArray:
    """The array of a part as (n, width), n ≥ 1; dtype: of raw memory."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        array = _of_base64(part, value, dtype)
        if array.size % width:
            raise PartError(
                part, f"{array.nbytes:,} bytes are no whole rows of {width} {dtype[1:]}"
            )
        array = array.reshape(-1, width)
    else:
        array = _of_numbers(part, value)
    if array.dtype.kind not in "iuf":
        raise PartError(part, f"it is of type {array.dtype}, not numbers")
    if not array.size:
        raise PartError(part, "the image has no objects: it is empty")
    if width == 1 and array.ndim == 1:
        array = array.reshape(-1, 1)
    if array.ndim < 2 or array.shape[-1] != width:
        hint = "; see --feature-dim" if part in NAMES["features"] else ""
        raise PartError(part, f"shape {array.shape} where (objects, {width}) is due{hint}")
    return array.reshape(-1, width)


def _of_base64(part: str, value: str | bytes | bytearray | memoryview, dtype: str) -> NDArray:
    try:
        return np.frombuffer(pybase64.b64decode(value, validate=True), dtype)
    except (binascii.Error, ValueError) as error:
        raise PartError(part, f"damaged base64 ({error})") from None


def _of_numbers(part: str, value: Any) -> NDArray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PartError(part, f"it is no array ({error})") from None


def regions(
    image: str,
    parts: Mapping[str, Any],
    options: Options,
    size: tuple[int, int] | None = None,
    pixels: bool = True,
) -> Regions:
    """The regions of an image from its parts.

    size: width and height, where the parts have none. pixels: unit of `boxes`, else they are
    fractions. Rows beyond the count that the parts state are padding and left out.
    PartError or ValueError says what is missing or wrong.
    """
    size = size_of(parts) or size
    if size is None:
        raise ValueError(f"it has no {NAMES['width'][0]} and {NAMES['height'][0]}")
    place, corners = find(parts, "boxes") or ("", None)
    if corners is None and (found := find(parts, "fractions")):
        place, pixels = found[0], False
        corners = _of_numbers(*found)[..., :4]
    elif corners is None:
        place, corners = needed(parts, "boxes")
    boxes = rows(place, corners, 4)
    name, value = needed(parts, "features")
    features = rows(name, value, options.feature_dim)
    n = len(boxes)
    if len(features) != n:
        raise PartError(name, f"{len(features)} objects, where {place} has {n}")
    if counted := find(parts, "count"):
        n = whole(*counted)
        raw = isinstance(value, str | bytes)
        if n > len(boxes) or (raw and n < len(boxes)):
            raise PartError(counted[0], f"{n} objects, where {name} has {len(features)}")
    return Regions(
        image=image,
        width=size[0],
        height=size[1],
        boxes=checked(place, checks.fractions, boxes[:n], *size, pixels),
        features=features[:n],
        labels=labels(parts, n, options) if wants_labels(options) else None,
    )


def labels(parts: Mapping[str, Any], n: int, options: Options) -> Labels | None:
    """Labels of the first n objects; None where there are none.

    Where only objects are labelled, attributes are 0 with confidence 0, which gives them no weight.
    """
    objects = _labelled(parts, "object", n, options.object_classes)
    if objects is None and (found := find(parts, "probabilities")):
        objects = _most_probable(*found, n, options.object_classes)
    if objects is None:
        return None
    attributes = _labelled(parts, "attribute", n, options.attribute_classes)
    return Labels(*objects, *(attributes or unknown(n)))


def unknown(n: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and confidences of n objects of which nothing is known."""
    return np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.float32)


def _labelled(
    parts: Mapping[str, Any], kind: str, n: int, classes: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    ids, confidences = find(parts, f"{kind}_id"), find(parts, f"{kind}_conf")
    if ids is None or confidences is None:
        return None
    columns = []
    for (name, value), dtype in ((ids, "<i8"), (confidences, "<f4")):
        column = rows(name, value, 1, dtype).reshape(-1)
        if len(column) < n:
            raise PartError(name, f"{len(column)} values, but {n} boxes")
        columns.append(column[:n])
    return (
        checked(ids[0], checks.ids, columns[0], classes),
        checked(confidences[0], checks.confidences, columns[1]),
    )


def _most_probable(
    name: str, value: Any, n: int, classes: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The most probable class of each object that is not the background."""
    raw = isinstance(value, str | bytes)
    array = rows(name, value, 1 + classes) if raw else _of_numbers(name, value)
    shapes: Sequence[int] = (classes, 1 + classes)
    if array.ndim != 2 or array.shape[1] not in shapes or len(array) < n:
        raise PartError(
            name,
            f"shape {array.shape} where ({n}, {classes}), or one more for the background, is due; "
            "leave labels out with --feature-option labels=no",
        )
    array = array[:n, array.shape[1] - classes :]
    best = array.argmax(axis=1)
    confidences = np.take_along_axis(array, best[:, None], axis=1)[:, 0]
    return best.astype(np.int32), checked(name, checks.confidences, confidences)
