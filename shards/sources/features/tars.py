"""WebDataset tars of anybody's RoI records: features, boxes and sentences by member.

Where in a sample each part of a record is, is a place (shards/sources/members.py). `PARTS` has the
places that are tried where the user names none; those of our own tars are among them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.features import from_uint8, stored_width
from shards.format.record import Labels, Sentence, check_sentence
from shards.sources import checks, tars
from shards.sources.checks import PartError, checked
from shards.sources.members import LABEL_COLUMNS, check_place, lowered, value_at
from shards.sources.regions import Entry, FeatureFormat, Options, Reader, Regions
from shards.store import objects


@dataclass(frozen=True)
class Part:
    """A part of a record."""

    help: str
    places: tuple[str, ...]
    """Tried in turn where the user names none."""


def _label(name: str) -> tuple[str, ...]:
    return (f"labels.bin:{name}", f"{name}.npy", f"npz:{name}", f"json:{name}")


PARTS = {
    "features": Part(
        "a row an object, n x width",
        ("features.f16", "features.f32", "features.u8", "features.npy", "npz:features"),
    ),
    "boxes": Part(
        "a row an object, x1 y1 x2 y2", ("boxes.f32", "boxes.npy", "npz:boxes", "json:boxes")
    ),
    "width": Part("of the image, in pixels", ("json:width",)),
    "height": Part("of the image, in pixels", ("json:height",)),
    "sentences": Part(
        'a text, texts, or objects {"text", "source", "answers", "id"}', ("json:sentences", "txt")
    ),
    "image": Part("its id, else the key is", ("json:image",)),
    "split": Part("its split, where there is one", ("json:split",)),
    "object_id": Part("classes of objects, where there are any", _label("object_id")),
    "object_conf": Part("their confidences", _label("object_conf")),
    "attribute_id": Part("attributes of objects", _label("attribute_id")),
    "attribute_conf": Part("their confidences", _label("attribute_conf")),
}


@dataclass(frozen=True)
class Layout:
    """How samples are to be read."""

    places: Mapping[str, str] = field(default_factory=dict)
    """By part, where it is; the others are looked for in the places of `PARTS`."""

    pixels: bool = False
    """Boxes are in pixels, not in 0..1."""

    labels: bool = True
    """Take the labels of objects, where samples have them."""

    source: str = "webdataset"
    """Set of the sentences that name none."""

    options: Options = field(default_factory=Options)

    def places_of(self, part: str) -> tuple[str, ...]:
        return (lowered(self.places[part]),) if part in self.places else PARTS[part].places

    def suffixes(self) -> set[str]:
        """Of all members that may be needed."""
        return {p.partition(":")[0] for part in PARTS for p in self.places_of(part)}


def _detect(place: str) -> bool:
    if place.split("{")[0].endswith(".tar") or ("{" in place and place.endswith(".tar")):
        return True
    path = objects.local_path(place)
    return path is not None and path.is_dir() and any(_tars(str(path)))


def _files(place: str) -> list[str]:
    path = objects.local_path(place)
    if path is None or not path.is_dir():
        return tars.expand([place])
    if not (found := _tars(str(path))):
        raise DataError(f"the folder {place} has no .tar: give the folder or the paths of tars")
    return found


def _tars(folder: str) -> list[str]:
    try:
        return sorted(e.path for e in os.scandir(folder) if e.name.endswith(".tar"))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def _entries(url: str, options: Options) -> Iterator[Entry]:
    layout = _layout(options)
    parts = ("image", "sentences", "split")
    suffixes = {p.partition(":")[0] for part in parts for p in layout.places_of(part)}
    with tars.opened(url, options.room) as f:
        try:
            for sample in tars.samples(f, suffixes.__contains__):
                yield _entry(sample, layout)
        except tars.TarError as error:
            problem = f"{error}; copy it again, or take what is before with --skip-bad"
            yield Entry("", "", "", problem=problem)


def _entry(sample: tars.Sample, layout: Layout) -> Entry:
    at = str(sample.offset)
    try:
        if sample.problem:
            raise ValueError(sample.problem)
        image = _name(sample, layout, "image") or sample.key
        split = _name(sample, layout, "split")
        sentences, empty = _sentences(sample, layout)
    except ValueError as error:
        where = f"{sample.key}, {error.part}" if isinstance(error, PartError) else sample.key
        return Entry(sample.key, at, where, problem=f"{error}; {_CORRECT}")
    return Entry(image, at, sample.key, sentences=sentences, split=split, empty_sentences=empty)


@contextlib.contextmanager
def _reader(url: str, options: Options) -> Iterator[Reader]:
    layout = _layout(options)
    wanted = layout.suffixes().__contains__
    with tars.opened(url, options.room) as f:

        def read(entry: Entry) -> Regions:
            sample = tars.sample_at(f, int(entry.position), wanted)
            if sample is None:
                raise ValueError("it is not there any more: leave files as they are during a build")
            if sample.problem:
                raise ValueError(sample.problem)
            try:
                return _decode(sample, layout)
            except PartError as error:
                raise PartError(error.part, f"{error}; {_CORRECT}") from None
            except DataError:
                raise
            except ValueError as error:
                raise ValueError(f"{error}; {_CORRECT}") from None

        yield read


_CORRECT = (
    "correct it, name other members (`lxscale shards formats`), or leave such samples out with "
    "--skip-bad"
)


def _layout(options: Options) -> Layout:
    given = dict(options.settings)
    boxes_in = given.pop("boxes-in", "fractions")
    if boxes_in not in ("fractions", "pixels"):
        raise DataError(f"boxes-in={boxes_in:.40}: give fractions or pixels")
    source = given.pop("source", "webdataset")
    labels = given.pop("labels", "yes")
    if labels not in ("yes", "no"):
        raise DataError(f"labels={labels:.40}: give yes or no")
    places = {name.replace("-", "_"): place for name, place in given.items()}
    for place in places.values():
        check_place(lowered(place))
    return Layout(places, boxes_in == "pixels", labels == "yes", source, options)


# --- a sample -----------------------------------------------------------------------------------


def _decode(sample: tars.Sample, layout: Layout) -> Regions:
    width, height = (_positive(sample, layout, part) for part in ("width", "height"))
    place, raw = _needed(sample, layout, "boxes")
    boxes = _rows(place, raw, "boxes", 4)
    fractions = checked(place, _fractions, boxes, width, height, layout.pixels)
    place, raw = _needed(sample, layout, "features")
    dim = layout.options.feature_dim
    if place.rpartition(".")[2] == "u8":
        raw = _of_uint8(place, raw, dim)
    features = _rows(place, raw, "features", dim)
    if len(features) != len(boxes):
        raise PartError(
            place,
            f"{len(features)} objects of width {dim}, but {len(boxes)} boxes; see --feature-dim",
        )
    return Regions(
        image=_name(sample, layout, "image") or sample.key,
        width=width,
        height=height,
        boxes=fractions,
        features=features,
        labels=_labels(sample, layout, len(boxes)) if layout.labels else None,
    )


def _of_uint8(suffix: str, raw: NDArray[np.uint8], dim: int) -> NDArray[np.float32]:
    width = stored_width("uint8", dim)
    if not len(raw) or len(raw) % width:
        raise PartError(suffix, f"{len(raw)} bytes, where an object has {width}; see --feature-dim")
    return from_uint8(raw.reshape(-1, width))


def _fractions(boxes: NDArray, width: int, height: int, pixels: bool) -> NDArray[np.float32]:
    try:
        return checks.fractions(boxes, width, height, pixels)
    except ValueError as error:
        raise ValueError(f"{error}; see --feature-option boxes-in=") from None


def _name(sample: tars.Sample, layout: Layout, part: str) -> str | None:
    place, value = _find(sample, layout, part) or ("", None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise PartError(place, f"the {part} is {value!r:.40}, which is no name")
    return None if value is None else str(value)


def _positive(sample: tars.Sample, layout: Layout, part: str) -> int:
    place, value = _needed(sample, layout, part)
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "iuf" or not 1 <= number.item() < 1 << 31:
        raise PartError(place, f"the {part} is {value!r:.40}, not a number of pixels")
    return int(number.item())


def _labels(sample: tars.Sample, layout: Layout, n: int) -> Labels | None:
    """The labels of n objects; None where the sample has none of their parts."""
    found = {part: _find(sample, layout, part) for part in LABEL_COLUMNS}
    if not any(found.values()):
        return None
    columns: dict[str, NDArray] = {}
    for part in LABEL_COLUMNS:
        place, value = found[part] or _needed(sample, layout, part)
        values = _rows(place, value, part, 1).reshape(-1)
        if len(values) != n:
            raise PartError(place, f"{len(values)} of {part}, but {n} boxes")
        classes = layout.options.object_classes
        if part.startswith("attribute"):
            classes = layout.options.attribute_classes
        if part.endswith("_id"):
            columns[part] = checked(place, checks.ids, values, classes)
        else:
            columns[part] = checked(place, checks.confidences, values)
    return Labels(**columns)


def _sentences(sample: tars.Sample, layout: Layout) -> tuple[tuple[Sentence, ...], int]:
    """The sentences of a sample, none where it has no such member, and how many are empty."""
    place, value = _find(sample, layout, "sentences") or ("", [])
    entries = [value] if isinstance(value, str | dict) else value
    if not isinstance(entries, list):
        raise PartError(place, f"the sentences are {value!r:.40}")
    out, empty = [], 0
    for i, entry in enumerate(entries):
        given = {"text": entry} if isinstance(entry, str) else entry
        if isinstance(given, dict) and not str(given.get("text", "x")).strip():
            empty += 1
            continue
        try:
            out.append(check_sentence(given, f"sentence {i}", layout.source))
        except DataError as error:
            raise PartError(place, str(error)) from None
    return tuple(out), empty


def _find(sample: tars.Sample, layout: Layout, part: str) -> tuple[str, Any] | None:
    """The suffix and value of the first place that the sample has; None where it has none."""
    for place in layout.places_of(part):
        value = value_at(place, sample.members)
        if value is not None:
            return place.partition(":")[0], value
    return None


def _needed(sample: tars.Sample, layout: Layout, part: str) -> tuple[str, Any]:
    found = _find(sample, layout, part)
    if found is None:
        raise ValueError(f"no {part}: it has no {' or '.join(layout.places_of(part))}")
    return found


def _rows(suffix: str, value: Any, part: str, width: int) -> NDArray:
    """An array of numbers as (objects, width); raw members have no shape of their own."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise PartError(suffix, f"{part} are no array ({error})") from None
    if array.dtype.kind not in "iuf":
        raise PartError(suffix, f"{part} are of type {array.dtype}, not numbers")
    if not array.size:
        raise PartError(suffix, f"the image has no objects: its {part} are empty")
    flat = width == 1 or suffix.rpartition(".")[2] in ("f16", "f32")
    fits = array.size % width == 0 if flat else array.ndim == 2 and array.shape[1] == width
    if not fits:
        hint = "; see --feature-dim" if part == "features" else ""
        raise PartError(
            suffix, f"{part} have shape {array.shape} where (objects, {width}) is due{hint}"
        )
    return array.reshape(-1, width)


FORMAT = FeatureFormat(
    name="webdataset",
    help="WebDataset tars of RoI features, boxes, perhaps sentences; a folder of them, or URLs",
    extractor="unknown",
    detect=_detect,
    files=_files,
    entries=_entries,
    reader=_reader,
    settings={
        **{
            name.replace("_", "-"): f"{part.help}: SUFFIX[:NAME] ({', '.join(part.places)})"
            for name, part in PARTS.items()
        },
        "boxes-in": "fractions (of width and height) or pixels (fractions)",
        "labels": "yes or no: take those of objects where there are any (yes)",
        "source": "set of the sentences that name none (webdataset)",
    },
)
