"""Images for tests of feature formats, and reading a place as a build reads it."""

from __future__ import annotations

import base64
import pickle
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.sources.regions import FeatureFormat, Options, Regions

DIM = 6


@dataclass(frozen=True)
class Picture:
    """What a detector says of an image."""

    id: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    """(n, 4) in pixels."""
    features: NDArray[np.float32]
    object_id: NDArray[np.int64]
    object_conf: NDArray[np.float32]
    attribute_id: NDArray[np.int64]
    attribute_conf: NDArray[np.float32]

    @property
    def fractions(self) -> NDArray[np.float32]:
        size = np.asarray([self.width, self.height] * 2, np.float32)
        return np.clip(self.boxes / size, 0, 1)

    @property
    def n(self) -> int:
        return len(self.boxes)

    def probabilities(self, classes: int = 1600) -> NDArray[np.float32]:
        """(n, 1 + classes) with the background first, surer of it than of anything."""
        out = np.zeros((self.n, 1 + classes), np.float32)
        out[:, 0] = 0.9
        out[np.arange(self.n), 1 + self.object_id] = self.object_conf
        return out


def picture(id_: str, n: int = 3, seed: int = 0) -> Picture:
    made = np.random.default_rng([seed, n, *id_.encode()])
    low = made.uniform(0, 90, (n, 2))
    return Picture(
        id_,
        200,
        100,
        np.hstack([low, low + made.uniform(2, 10, (n, 2))]).astype(np.float32),
        made.integers(0, 80, (n, DIM)).astype(np.float32) / 8,
        made.integers(0, 1600, n),
        made.uniform(0.2, 0.8, n).astype(np.float32),
        made.integers(0, 400, n),
        made.uniform(0.2, 0.8, n).astype(np.float32),
    )


def real_pictures(shared: Path) -> list[Picture]:
    """The ten rows of bottom-up-attention, decoded by hand."""
    out = []
    for line in (shared / "butd_train2014_obj36_10rows.tsv").read_text().splitlines():
        cells = line.split("\t")
        raw = {i: base64.b64decode(cells[i]) for i in (3, 4, 5, 6, 8, 9)}
        n = int(cells[7])
        out.append(
            Picture(
                cells[0],
                int(cells[2]),
                int(cells[1]),
                np.frombuffer(raw[8], "<f4").reshape(n, 4),
                np.frombuffer(raw[9], "<f4").reshape(n, 2048),
                np.frombuffer(raw[3], "<i8"),
                np.frombuffer(raw[4], "<f4"),
                np.frombuffer(raw[5], "<i8"),
                np.frombuffer(raw[6], "<f4"),
            )
        )
    return out


def read(
    form: FeatureFormat, place: Path, dim: int = DIM, backwards: bool = False, **settings: str
) -> dict[str, Regions]:
    """All images of a place; ValueError where one is bad."""
    settings = {name.replace("_", "-"): value for name, value in settings.items()}
    assert set(settings) <= set(form.settings)
    form = pickle.loads(pickle.dumps(form))  # as it goes to other processes
    options, out = Options(feature_dim=dim, settings=settings), {}
    for file in form.files(str(place)):
        entries = list(form.entries(file, options))
        with form.reader(file, options) as reader:
            for entry in reversed(entries) if backwards else entries:
                if entry.problem:
                    raise ValueError(f"{entry.where}: {entry.problem}")
                out[entry.image] = regions = reader(entry)
                assert regions.image == entry.image
                assert entry.objects in (0, len(regions.boxes)) and entry.where
    return out


def check(
    found: Regions,
    due: Picture,
    *,
    objects: bool = True,
    attributes: bool = True,
    half: bool = False,
) -> None:
    """half: the store has float16."""
    exact = 1e-3 if half else 1e-6
    np.testing.assert_allclose(found.boxes, due.fractions, rtol=exact, atol=exact)
    np.testing.assert_allclose(found.features, due.features, rtol=exact, atol=1e-7)
    assert found.boxes.dtype == np.float32 and (found.labels is not None) == objects
    if found.labels:
        np.testing.assert_array_equal(found.labels.object_id, due.object_id)
        np.testing.assert_allclose(found.labels.object_conf, due.object_conf, rtol=exact)
        if attributes:
            np.testing.assert_array_equal(found.labels.attribute_id, due.attribute_id)
            np.testing.assert_allclose(found.labels.attribute_conf, due.attribute_conf, rtol=exact)
        else:
            assert not found.labels.attribute_id.any() and not found.labels.attribute_conf.any()


def sized(found: Regions, due: Picture) -> bool:
    return (found.width, found.height) == (due.width, due.height)


def damage(form: FeatureFormat, place: Path, file: Path, count: int = 40, **settings: str) -> int:
    """Read a place with its file cut off or with flipped bits, again and again: it is read, or one
    error says what is wrong. Returns how often one did."""
    good, errors = file.read_bytes(), 0
    for seed in range(count):
        made = random.Random(seed)
        data = bytearray(good)
        if seed % 4 == 0:
            del data[made.randrange(len(data)) :]
        else:
            for _ in range(made.choice([1, 4])):
                data[made.randrange(len(data))] ^= 1 << made.randrange(8)
        file.write_bytes(data)
        try:
            read(form, place, **settings)
        except ValueError as error:
            assert str(error)
            errors += 1
    file.write_bytes(good)
    return errors


def with_nan(due: Picture) -> Picture:
    boxes = due.boxes.copy()
    boxes[0, 0] = np.nan
    return replace(due, boxes=boxes)


def outside(due: Picture) -> Picture:
    boxes = due.boxes.copy()
    boxes[0, 2] = due.width + 50
    return replace(due, boxes=boxes)
