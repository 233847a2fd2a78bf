"""A scene as pixels, and its regions as a detector would give them.

objects     one a thing, boxes off by a pixel or so, and background: always REGIONS of them
object id   the shape; attribute id: the colour; those of background come last
feature     the crop at 6 × 6 pixels in RGB, row by row, then the width and the height of the box,
            each less its mean over scenes and by its deviation, as features of a detector are
            about 1 in size, with a little noise: FEATURE_DIM values
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from random import Random

import numpy as np
import pybase64
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shards.format.record import Labels
from shards.sources.scenes.scene import CELL, COLOURS, SHAPES, WIDTH, Scene, Thing, cell_of

REGIONS = 8
CROP = 6
FEATURE_DIM = CROP * CROP * 3 + 2
OBJECTS = (*SHAPES, "background")
"""Names of object ids."""
ATTRIBUTES = (*COLOURS, "plain")
"""Names of attribute ids."""

_RGB = {
    "red": (205, 40, 40),
    "green": (40, 150, 55),
    "blue": (45, 75, 205),
    "yellow": (235, 215, 50),
    "purple": (130, 45, 160),
    "orange": (240, 135, 30),
}
_SHADE = 12  # by which a thing's colour is off, of 255
_NOISE = 6  # of a pixel, of 255
_OFF = 1.5  # pixels, of an edge of a box
_PIXEL = (0.66, 0.21)  # mean and standard deviation over scenes, pixels from 0 to 1
_EDGE = (0.58, 0.15)  # the same of a box's width and height, in cells of the grid
_FEATURE_NOISE = 0.1  # standard deviation
_STAR = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5)) for k in range(10)]
_ARM = 0.36  # half of the width of a cross's arms
_CROSS: list[tuple[float, float]] = [
    (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
    (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
]  # fmt: skip
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": [(x, y) if k % 2 == 0 else (0.42 * x, 0.42 * y) for k, (x, y) in enumerate(_STAR)],
    "cross": _CROSS,
}


@dataclass(frozen=True)
class Seen:
    """A picture and its REGIONS regions."""

    picture: Image.Image
    boxes: NDArray[np.float32]
    """(n, 4): x1 y1 x2 y2 in pixels."""
    labels: Labels
    features: NDArray[np.float32]
    """(n, FEATURE_DIM)."""


def see(rng: Random, scene: Scene) -> Seen:
    """Draw a scene and describe it; its regions come in an arbitrary order."""
    noise = np.random.default_rng(rng.getrandbits(64))
    picture = _drawn(rng, noise, scene)
    free = sorted(set(range((WIDTH // CELL) ** 2)) - {cell_of(thing) for thing in scene})
    background = rng.sample(free, REGIONS - len(scene))
    boxes = [_around(rng, thing.x, thing.y, thing.radius) for thing in scene]
    boxes += [_in_cell(rng, cell) for cell in background]
    names = [(thing.shape, thing.colour) for thing in scene]
    names += [(OBJECTS[-1], ATTRIBUTES[-1])] * len(background)
    order = rng.sample(range(REGIONS), REGIONS)
    # A detector is sure of things, and not of background.
    least = np.array([0.7 if i < len(scene) else 0.3 for i in order])
    sure = (least + 0.29 * noise.random((2, REGIONS))).astype(np.float32)
    labels = Labels(
        np.array([OBJECTS.index(names[i][0]) for i in order], np.int32),
        sure[0],
        np.array([ATTRIBUTES.index(names[i][1]) for i in order], np.int32),
        sure[1],
    )
    at = np.array([boxes[i] for i in order], np.float32)
    return Seen(picture, at, labels, _features(noise, picture, at))


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def tsv_row(image: str, seen: Seen) -> str:
    """A line of a bottom-up-attention TSV with labels (shards.sources.features.tsv)."""
    labels = seen.labels
    cells = [
        image,
        str(seen.picture.height),
        str(seen.picture.width),
        _base64(labels.object_id, "<i8"),
        _base64(labels.object_conf, "<f4"),
        _base64(labels.attribute_id, "<i8"),
        _base64(labels.attribute_conf, "<f4"),
        str(len(seen.boxes)),
        _base64(seen.boxes, "<f4"),
        _base64(seen.features, "<f4"),
    ]
    return "\t".join(cells) + "\n"


def _base64(array: NDArray, dtype: str) -> str:
    return pybase64.b64encode(array.astype(dtype).tobytes()).decode("ascii")


def _drawn(rng: Random, noise: np.random.Generator, scene: Scene) -> Image.Image:
    gray = rng.randint(165, 220)
    picture = Image.new("RGB", (WIDTH, WIDTH), (gray, gray, gray))
    pen = ImageDraw.Draw(picture)
    for thing in scene:
        r, g, b = (c + rng.randint(-_SHADE, _SHADE) for c in _RGB[thing.colour])
        _draw(pen, thing, (r, g, b))
    rough = noise.integers(-_NOISE, _NOISE + 1, (WIDTH // 2, WIDTH // 2, 1), np.int16)
    rough = rough.repeat(2, 0).repeat(2, 1)  # in blocks, for smaller files
    pixels = np.clip(np.asarray(picture) + rough, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, colour: tuple[int, int, int]) -> None:
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in _CORNERS[thing.shape]], fill=colour)


def _around(rng: Random, x: float, y: float, radius: float) -> list[float]:
    edges = (x - radius, y - radius, x + radius, y + radius)
    return [min(max(edge + rng.uniform(-_OFF, _OFF), 0.0), WIDTH) for edge in edges]


def _in_cell(rng: Random, cell: int) -> list[float]:
    radius = rng.uniform(6, 13)
    row, column = divmod(cell, WIDTH // CELL)
    room = CELL / 2 - radius
    x, y = ((c + 0.5) * CELL + rng.uniform(-room, room) for c in (column, row))
    return _around(rng, x, y, radius)


def _features(
    noise: np.random.Generator, picture: Image.Image, boxes: NDArray[np.float32]
) -> NDArray[np.float32]:
    crops = [
        picture.resize((CROP, CROP), Image.Resampling.BOX, (x1, y1, x2, y2)).tobytes()
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    pixels = np.frombuffer(b"".join(crops), np.uint8).reshape(len(boxes), -1) / 255
    edges = (boxes[:, 2:] - boxes[:, :2]) / CELL
    features = np.hstack([_standard(pixels, *_PIXEL), _standard(edges, *_EDGE)])
    return (features + _FEATURE_NOISE * noise.standard_normal(features.shape)).astype(np.float32)


def _standard(values: NDArray, mean: float, deviation: float) -> NDArray:
    return (values - mean) / deviation
