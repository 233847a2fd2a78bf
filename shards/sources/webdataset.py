"""Image records from WebDataset tars of anybody's: RoI features, boxes and sentences by member.

Where in a sample each part of a record is, is a place (shards/sources/members.py). `PARTS` has the
places that are tried where the user names none; those of our own tars are among them.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shards.arguments import given_name, given_place
from shards.errors import DataError
from shards.format.record import ImageRecord, Labels, Report, Sentence, check_sentence
from shards.progress import Progress, no_progress
from shards.sources import checks, tars
from shards.sources.checks import Expected, PartError, checked
from shards.sources.members import LABEL_COLUMNS, check_place, lowered, value_at
from shards.sources.source import Source


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
        ("features.f16", "features.f32", "features.npy", "npz:features"),
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

    expected: Expected = field(default_factory=Expected)

    def places_of(self, part: str) -> tuple[str, ...]:
        return (lowered(self.places[part]),) if part in self.places else PARTS[part].places

    def suffixes(self) -> set[str]:
        """Of all members that may be needed."""
        return {p.partition(":")[0] for part in PARTS for p in self.places_of(part)}


def read_webdataset(
    urls: Iterable[str],
    layout: Layout | None = None,
    *,
    room: Path | None = None,
    skip_bad: bool = False,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Iterator[ImageRecord]:
    """Records of the samples, in the order of the tars.

    urls: paths and s3:// URLs, brace patterns among them; of the latter one at a time is copied to
    `room` (default: the system's temporary folder).
    skip_bad: bad samples, and what follows damage in a tar, are left out and reported.
    Raises DataError naming tar, key and member. Images without sentences are reported.
    """
    layout, report = layout or Layout(), report if report is not None else Report()
    for place in layout.places.values():
        check_place(lowered(place))
    names = tars.expand(urls)
    seen: dict[str, str] = {}
    for done, url in enumerate(names):
        progress("tars read", done, len(names))
        with tars.opened(url, room) as f:
            try:
                yield from _records(f, url, layout, skip_bad, report, seen)
            except tars.TarError as error:
                if not skip_bad:
                    raise DataError(
                        f"{url}: {error}; copy it again, or take what is before with --skip-bad"
                    ) from None
                report.add("damaged tars, read up to the damage", f"{url}: {error}")
    progress("tars read", len(names), len(names))


def _records(
    f: IO[bytes],
    url: str,
    layout: Layout,
    skip_bad: bool,
    report: Report,
    seen: dict[str, str],
) -> Iterator[ImageRecord]:
    """The records of one tar; TarError at damage. seen: the tar of every image so far."""
    for sample in tars.samples(f, layout.suffixes().__contains__):
        where = f"{url}, {sample.key}"
        try:
            record = _record(sample, layout, where, report)
            if record and (other := seen.get(record.image)):
                raise DataError(
                    f"{where}: image {record.image!r:.120} is in {other} already; give each image "
                    "once, or leave further ones out with --skip-bad"
                )
        except DataError as error:
            if not skip_bad:
                raise
            report.add("bad samples", str(error))
            continue
        if record:
            seen[record.image] = url
            yield record
        else:
            report.add("images without sentences", where)


# --- a sample -----------------------------------------------------------------------------------


def _record(sample: tars.Sample, layout: Layout, where: str, report: Report) -> ImageRecord | None:
    """The record of a sample; None for an image without sentences."""
    try:
        if sample.problem:
            raise ValueError(sample.problem)
        sentences = _sentences(sample, layout, where, report)
        return _decode(sample, layout, sentences) if sentences else None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        member = f", {error.part}" if isinstance(error, PartError) else ""
        raise DataError(
            f"{where}{member}: {error}; correct it, name other members (see --help), or leave such "
            "samples out with --skip-bad"
        ) from None


def _decode(sample: tars.Sample, layout: Layout, sentences: tuple[Sentence, ...]) -> ImageRecord:
    width, height = (_positive(sample, layout, part) for part in ("width", "height"))
    place, raw = _needed(sample, layout, "boxes")
    boxes = _rows(place, raw, "boxes", 4)
    fractions = checked(place, _fractions, boxes, width, height, layout.pixels)
    place, raw = _needed(sample, layout, "features")
    dim = layout.expected.feature_dim
    features = _rows(place, raw, "features", dim)
    if len(features) != len(boxes):
        raise PartError(
            place,
            f"{len(features)} objects of width {dim}, but {len(boxes)} boxes; see --feature-dim",
        )
    return ImageRecord(
        image=_name(sample, layout, "image") or sample.key,
        width=width,
        height=height,
        boxes=fractions,
        features=checked(place, checks.half, features),
        sentences=sentences,
        labels=_labels(sample, layout, len(boxes)) if layout.labels else None,
        split=_name(sample, layout, "split"),
    )


def _fractions(boxes: NDArray, width: int, height: int, pixels: bool) -> NDArray[np.float32]:
    try:
        return checks.fractions(boxes, width, height, pixels)
    except ValueError as error:
        raise ValueError(f"{error}; see --boxes-in") from None


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
        classes = layout.expected.object_classes
        if part.startswith("attribute"):
            classes = layout.expected.attribute_classes
        if part.endswith("_id"):
            columns[part] = checked(place, checks.ids, values, classes)
        else:
            columns[part] = checked(place, checks.confidences, values)
    return Labels(**columns)


def _sentences(
    sample: tars.Sample, layout: Layout, where: str, report: Report
) -> tuple[Sentence, ...]:
    place, value = _needed(sample, layout, "sentences")
    entries = [value] if isinstance(value, str | dict) else value
    if not isinstance(entries, list):
        raise PartError(place, f"the sentences are {value!r:.40}")
    out = []
    for i, entry in enumerate(entries):
        given = {"text": entry} if isinstance(entry, str) else entry
        if isinstance(given, dict) and not str(given.get("text", "x")).strip():
            report.add("empty sentences", where)
        else:
            out.append(check_sentence(given, f"{where}, {place}, sentence {i}", layout.source))
    return tuple(out)


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


# --- `lxscale shards build webdataset` ----------------------------------------------------------


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tars",
        nargs="+",
        type=given_place,
        required=True,
        metavar="URL",
        help="paths, s3:// URLs, {000..009}",
    )
    for name, part in PARTS.items():
        flag, default = f"--{name.replace('_', '-')}", ", ".join(part.places)
        add(flag, metavar="SUFFIX[:NAME]", help=f"{part.help} (default: {default})")
    add(
        "--boxes-in", choices=("fractions", "pixels"), default="fractions",
        help="fractions: 0..1 of width and height (default: %(default)s)",
    )  # fmt: skip
    add("--no-labels", action="store_true", help="leave labels of objects out")
    add("--source", type=given_name, default="webdataset", help="set of sentences that name none")


def _read(args: Namespace, report: Report, progress: Progress) -> Iterator[ImageRecord]:
    layout = Layout(
        places={part: given for part in PARTS if (given := getattr(args, part))},
        pixels=args.boxes_in == "pixels",
        labels=not args.no_labels,
        source=args.source,
        expected=Expected(feature_dim=args.feature_dim),
    )
    return read_webdataset(
        args.tars,
        layout,
        room=args.staging,
        skip_bad=args.skip_bad,
        report=report,
        progress=progress,
    )


SOURCE = Source(
    help="WebDataset tars of RoI features, boxes and sentences",
    extractor="unknown",
    add_arguments=_add_arguments,
    read=_read,
)
