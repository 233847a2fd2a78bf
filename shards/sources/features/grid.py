"""A folder of pictures, without a detector: regions are a grid.

Boxes are a fixed multi-scale grid instead of a detector's (`grid_boxes`), features are colour
statistics and oriented gradients instead of a network's (`describe`). They are weak, and good
enough for simple pictures, demonstrations and tests: everything after them is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.errors import DataError
from shards.sources.pictures import open_picture, pictures
from shards.sources.regions import (
    Entry,
    FeatureFormat,
    Options,
    Reader,
    Regions,
    file_version,
    one_file,
)
from shards.store import objects

EXTRACTOR = "grid-colour-hog-3"  # change the number with anything that changes a feature

# Levels of each layout, (columns, rows), coarse to fine. A level of k boxes along an axis has boxes
# of 2/(k+1) of that side, each overlapping the next by half; one box covers the side.
LAYOUTS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 1),),
    5: ((1, 1), (2, 2)),
    10: ((1, 1), (3, 3)),
    14: ((1, 1), (2, 2), (3, 3)),
    36: ((1, 1), (3, 1), (1, 3), (2, 2), (3, 3), (4, 4)),
}

_SIDE = 32  # boxes are described at 32 × 32 pixels


def grid_boxes(n: int = 36) -> NDArray[np.float32]:
    """The layout of n boxes, f32 (n, 4), x1 y1 x2 y2 in 0..1. DataError for an n without one.

    10 = the image and 3 × 3 half-overlapping quarters; 36 = the image, 3 upright and 3 level
    strips, 2 × 2, 3 × 3 and 4 × 4 boxes.
    """
    if n not in LAYOUTS:
        raise DataError(f"there is no grid of {n} boxes: choose one of {sorted(LAYOUTS)}")
    boxes = []
    for columns, rows in LAYOUTS[n]:
        for r in range(rows):
            for c in range(columns):
                boxes.append(
                    (
                        c / (columns + 1) if columns > 1 else 0.0,
                        r / (rows + 1) if rows > 1 else 0.0,
                        (c + 2) / (columns + 1) if columns > 1 else 1.0,
                        (r + 2) / (rows + 1) if rows > 1 else 1.0,
                    )
                )
    return np.asarray(boxes, dtype=np.float32)


def describe(
    image: Image.Image, boxes: NDArray[np.float32], feature_dim: int = 2048
) -> NDArray[np.float16]:
    """Features of the boxes of an RGB image, f16 (n, feature_dim), values in -1..1.

    Per box, resized to 32 × 32: mean and standard deviation of each channel (6); a joint colour
    histogram of 4 levels a channel (64) in which a pixel counts by how far it is from the picture's
    median colour, as square roots (Hellinger's map); 4 × 4 mean differences from that colour (48);
    a histogram of oriented gradients (Dalal & Triggs 2005; 9 orientations, cells of 8 × 8, blocks
    of 2 × 2: 324); zero-padded. Deterministic. Without the difference from the median, a plain
    background outweighs everything in front of it.
    """
    from skimage.feature import hog

    used = 6 + 64 + 48 + 324
    if feature_dim < used:
        raise DataError(f"feature_dim is {feature_dim}: these features need at least {used}")
    width, height = image.size
    out = np.zeros((len(boxes), feature_dim), dtype=np.float16)
    median = np.median(np.asarray(image, dtype=np.float32).reshape(-1, 3), axis=0) / 255.0
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = min(round(x1 * width), width - 1), min(round(y1 * height), height - 1)
        right, bottom = max(round(x2 * width), left + 1), max(round(y2 * height), top + 1)
        crop = image.resize(
            (_SIDE, _SIDE), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
        pixels = np.asarray(crop, dtype=np.float32) / 255.0
        flat = pixels.reshape(-1, 3)
        levels = np.minimum((flat * 4).astype(np.int64), 3)
        bins = levels @ np.asarray([16, 4, 1])
        difference = pixels - median
        weight = np.abs(difference).mean(axis=-1).reshape(-1)
        histogram = np.bincount(bins, weights=weight, minlength=64)
        histogram = np.sqrt(histogram / max(float(weight.sum()), 1.0))
        grid = difference.reshape(4, _SIDE // 4, 4, _SIDE // 4, 3).mean(axis=(1, 3))
        # The luminance weights of ITU-R BT.601.
        grey = pixels @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
        gradients = hog(grey, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
        parts = (flat.mean(axis=0), flat.std(axis=0), histogram, grid.reshape(-1), gradients)
        out[i, :used] = np.concatenate(parts)
    return out


def _detect(place: str) -> bool:
    path = objects.local_path(place)
    return path is not None and path.is_dir() and any(True for _ in pictures(str(path)))


def _entries(folder: str, options: Options) -> Iterator[Entry]:
    n = _boxes(options)
    for name, picture in pictures(folder):
        try:
            version = file_version(picture.stat())
        except OSError as error:
            yield Entry(name, name, name, problem=f"cannot read the picture: {error.strerror}")
            continue
        yield Entry(name, name, name, n, version=version)


@contextlib.contextmanager
def _reader(folder: str, options: Options) -> Iterator[Reader]:
    layout = grid_boxes(_boxes(options))

    def read(entry: Entry) -> Regions:
        image = open_picture(Path(folder), entry.position)
        features = describe(image, layout, options.feature_dim)
        return Regions(entry.image, *image.size, layout, features)

    yield read


def _boxes(options: Options) -> int:
    given = options.settings.get("boxes", "36")
    if not given.isdigit() or int(given) not in LAYOUTS:
        raise DataError(f"there is no grid of {given!r:.20} boxes: choose one of {sorted(LAYOUTS)}")
    return int(given)


FORMAT = FeatureFormat(
    name="grid",
    help="a folder of pictures; regions are a grid, described by colours and gradients",
    extractor=EXTRACTOR,
    detect=_detect,
    files=one_file,
    entries=_entries,
    reader=_reader,
    settings={"boxes": f"boxes a picture: one of {sorted(LAYOUTS)} (36)"},
)
