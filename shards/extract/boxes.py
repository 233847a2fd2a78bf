"""Where the regions of pictures are: a grid, or boxes that the user has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.extract.coco import coco_boxes
from shards.format.record import Labels
from shards.sources import checks
from shards.sources.features import feature_format
from shards.sources.features.grid import grid_boxes
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head
from shards.sources.regions import Entry, Options, Reader


@dataclass(frozen=True)
class Boxes:
    """The regions of a picture."""

    boxes: NDArray[np.float32]
    """(n, 4): x1 y1 x2 y2 over width and height, 0..1."""
    labels: Labels | None


BoxesOf = Callable[[str, int, int], Boxes]
"""Name, width and height of a picture → its regions; ValueError where there are none."""


def grid(n: int) -> BoxesOf:
    """The same grid for all."""
    layout = Boxes(grid_boxes(n), None)
    return lambda _name, _width, _height: layout


def with_labels(
    boxes: NDArray[np.float32], object_id: NDArray[np.int64], conf: NDArray[np.float32]
) -> Boxes:
    """Regions whose objects have classes and no attributes: attribute 0 with confidence 0, which
    gives it no weight in training."""
    none = np.zeros(len(boxes))
    labels = Labels(
        object_id.astype(np.int32),
        conf.astype(np.float32),
        none.astype(np.int32),
        none.astype(np.float32),
    )
    return Boxes(boxes, labels)


def given(place: str, options: Options, stack: ExitStack) -> BoxesOf:
    """The boxes in a file of annotations as COCO's (instances_*.json), or in files of features.
    stack: what keeps the files of features open."""
    path = Path(place)
    try:
        coco = path.is_file() and head(path).lstrip()[:1] == b"{"
    except OSError as error:
        raise DataError(f"cannot read {place}: {error.strerror}") from None
    return _of_coco(path) if coco else _of_features(place, options, stack)


def _of_coco(path: Path) -> BoxesOf:
    found = coco_boxes(path)

    def boxes_of(name: str, width: int, height: int) -> Boxes:
        corners, classes = found.of(name, width, height)
        fractions = checks.fractions(corners, width, height)
        return with_labels(fractions, classes, np.ones(len(classes), np.float32))

    return boxes_of


def _of_features(place: str, options: Options, stack: ExitStack) -> BoxesOf:
    form = feature_format(place, None)
    entries: dict[str, tuple[int, Entry]] = {}
    readers: list[Reader] = []
    for number, url in enumerate(form.files(place)):
        readers.append(stack.enter_context(form.reader(url, options)))
        for entry in form.entries(url, options):
            if not entry.problem:
                entries.setdefault(image_id(entry.image), (number, entry))

    def boxes_of(name: str, width: int, height: int) -> Boxes:
        found = entries.get(image_id(name)) or entries.get(image_id(name.rpartition("/")[2]))
        if found is None:
            raise ValueError(f"{place} has no boxes of it")
        regions = readers[found[0]](found[1])
        if (regions.width, regions.height) != (width, height):
            raise ValueError(
                f"it has {width} × {height} pixels, and {place} has boxes in "
                f"{regions.width} × {regions.height}"
            )
        return Boxes(regions.boxes, regions.labels)

    return boxes_of
