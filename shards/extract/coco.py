"""The boxes in a file of annotations as COCO's (instances_*.json): `images`, `annotations`,
`categories`. Also of those that tools for labelling pictures of one's own write."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.sources.image_ids import image_id
from shards.sources.json_stream import list_items

_WHAT = "file of annotations"

_Image = tuple[int, int, int]  # number, and width and height or 0


@dataclass(frozen=True)
class CocoBoxes:
    """Those of a file: 32 bytes a box, and the names of its pictures."""

    file: str
    """Its name."""
    images: dict[str, _Image]
    """By the id of the name that the file has for it."""
    ends: dict[str, _Image | None]
    """By the ids of what is left of such names without their first folders; None where several
    pictures have it."""
    image: NDArray[np.int64]
    """Of each box, sorted."""
    corners: NDArray[np.float32]
    """(n, 4): x1 y1 x2 y2 in pixels."""
    classes: NDArray[np.int64]

    def of(self, name: str, width: int, height: int) -> tuple[NDArray, NDArray]:
        """Corners and classes of a picture's boxes, in the file's order. ValueError where it has
        none, or has them in a picture of another size."""
        found = self._image(name)
        low, high = np.searchsorted(self.image, [found[0], found[0] + 1]) if found else (0, 0)
        if found is None or low == high:
            raise ValueError(f"{self.file} has no box of it")
        if all(found[1:]) and found[1:] != (width, height):
            raise ValueError(
                f"it has {width} × {height} pixels, and {self.file} has boxes in "
                f"{found[1]} × {found[2]}"
            )
        return self.corners[low:high], self.classes[low:high]

    def _image(self, name: str) -> _Image | None:
        """The picture of a name, whose folders may begin above or below those in the file."""
        if found := self.images.get(image_id(name)) or self.ends.get(image_id(name)):
            return found
        return next((self.images[i] for i in map(image_id, _ends(name)) if i in self.images), None)


def _ends(name: str) -> Iterator[str]:
    """A name without its first folder, its first two, …"""
    while "/" in name:
        name = name.partition("/")[2]
        yield name


def coco_boxes(path: Path) -> CocoBoxes:
    """Read a file. Classes are numbered by their categories' ids from 0 on; crowds have no box of
    their own and are left out. DataError naming file and entry where it is not of the form."""
    categories = sorted(_whole(path, i, e, "id") for i, e in _items(path, "categories"))
    classes = {number: k for k, number in enumerate(categories)}
    images: dict[str, _Image] = {}
    ends: dict[str, _Image | None] = {}
    for i, entry in _items(path, "images"):
        name = entry.get("file_name") or entry.get("coco_url")  # LVIS has the latter
        if not isinstance(name, str):
            raise DataError(f"{path}: image {i} has no file_name")
        sizes = (entry.get("width"), entry.get("height"))
        width, height = (s if isinstance(s, int) else 0 for s in sizes)
        one = images[image_id(name)] = (_whole(path, i, entry, "id"), width, height)
        for end in map(image_id, _ends(name)):
            ends[end] = one if end not in ends or ends[end] == one else None
    numbers, of, boxes = array("q"), array("q"), array("f")
    for i, entry in _items(path, "annotations"):
        if entry.get("iscrowd"):
            continue
        try:
            x, y, w, h = (float(v) for v in entry["bbox"])
            of.append(classes[entry["category_id"]])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: annotation {i} has no bbox [x, y, width, height] and category_id of a "
                f"category ({type(error).__name__}: {error})"
            ) from None
        numbers.append(_whole(path, i, entry, "image_id"))
        boxes.extend((x, y, x + w, y + h))
    image = np.asarray(numbers, dtype=np.int64)
    order = np.argsort(image, kind="stable")
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)[order]
    labels = np.asarray(of, dtype=np.int64)[order]
    return CocoBoxes(path.name, images, ends, image[order], corners, labels)


def _items(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, entry in list_items(path, _WHAT, key):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {i} of {key!r} is no object")
        yield i, entry


def _whole(path: Path, i: int, entry: dict[str, Any], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or abs(value) >= 1 << 62:
        raise DataError(f"{path}: entry {i} has no {key} that is an integer: {entry!r:.80}")
    return value
