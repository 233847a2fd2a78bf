"""Sizes of images from a file beside features that do not have them.

    {id: [width, height], …}                       JSON
    {id: {"width", "height", …}, …}                GQA's scene graphs, gqa_objects_info.json
    {"images": [{"id", "file_name", "width", "height"}, …], …}       COCO's annotations
    [{"image_id", "width", "height", …}, …]        Visual Genome's image_data.json
    id,width,height                                CSV, with a header or without
    id <tab> [{"height", "width"}]                 VinVL's .hw.tsv

Ids are compared as builds compare them (shards/sources/image_ids.py); a bare number in the file
stands for an image of that number of whichever collection. About 250 bytes an image in memory,
while a file of features is listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shards.errors import DataError
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items, pairs

SETTINGS = {
    "sizes": "JSON, CSV or .hw.tsv of image sizes in pixels, where the features have none",
    "size": "WIDTHxHEIGHT of all images in pixels, where no file says it",
}
_WHAT = "file of image sizes"
_ONE = re.compile(r"(\d{1,9})x(\d{1,9})")
_COLLECTION = re.compile(r"(?:coco|vg)/(\d+)")


@dataclass(frozen=True)
class ImageSizes:
    """What is known of sizes."""

    by_image: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    all: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return bool(self.by_image or self.all)

    def of(self, image: str) -> tuple[int, int] | None:
        """Width and height of an image; None where they are not known."""
        known = image_id(image)
        ids = [known]
        if match := _COLLECTION.fullmatch(known):
            ids.append(match[1])
        elif known.isdigit():
            ids += [f"coco/{int(known)}", f"vg/{int(known)}"]
        return next((self.by_image[i] for i in ids if i in self.by_image), self.all)


def missing_size(settings: Mapping[str, str]) -> str:
    """What to say of an image whose size is not known."""
    if path := settings.get("sizes"):
        return f"{path} has no size of it: give a file that has one of each image"
    return (
        "the features do not say how large images are: give --feature-option sizes=FILE (JSON "
        "{id: [width, height]}, CSV id,width,height, or COCO's annotations), or size=WIDTHxHEIGHT "
        "for all"
    )


def given_sizes(settings: Mapping[str, str]) -> ImageSizes:
    """What the user says of sizes. DataError where it cannot be read."""
    one, path = settings.get("size"), settings.get("sizes")
    size = None
    if one is not None:
        match = _ONE.fullmatch(one)
        if not match or not (size := _pair(int(match[1]), int(match[2]))):
            raise DataError(f"size={one:.40} is no size: give WIDTHxHEIGHT in pixels, as 640x480")
    return ImageSizes(load_sizes(path) if path else {}, size)


def load_sizes(path: str) -> dict[str, tuple[int, int]]:
    """Sizes by image. DataError naming file and entry where one is none."""
    out = {}
    for where, name, size in _entries(path):
        if not isinstance(name, str | int) or isinstance(name, bool) or size is None:
            raise DataError(f"the {_WHAT} {path}, {where}: no id with a width and a height")
        out[image_id(str(name))] = size
    if not out:
        raise DataError(f"the {_WHAT} {path} has no size in it")
    return out


_Found = Iterator[tuple[str, Any, tuple[int, int] | None]]


def _entries(path: str) -> _Found:
    """Where it is, id and size of each entry."""
    try:
        begin = head(path)
    except OSError as error:
        raise DataError(f"cannot read the {_WHAT} {path}: {error.strerror}") from None
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        yield from _of_objects(list_items(path, _WHAT))
    elif text.startswith(b"{") and re.search(rb'"images"\s*:\s*\[', begin):
        yield from _of_objects(list_items(path, _WHAT, "images"))
    elif text.startswith(b"{"):
        for name, value in pairs(path, _WHAT):
            yield f"entry {name:.60}", name, _size(value)
    else:
        yield from _of_lines(path, b"\t" in begin.split(b"\n")[0])


def _of_objects(items: Iterable[tuple[int, Any]]) -> _Found:
    for i, item in items:
        name = None
        if isinstance(item, dict):
            name = next(
                (item[k] for k in ("file_name", "image_id", "id") if item.get(k) is not None), None
            )
        yield f"entry {i}", name, _size(item)


def _of_lines(path: str, tabs: bool) -> _Found:
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                name, *cells = (c.strip().strip('"') for c in line.split("\t" if tabs else ","))
                size = _of_cells(cells if not tabs else line.strip().split("\t")[1:])
                if size is None and number == 1 and not tabs:
                    continue  # a header
                yield f"line {number}", name, size
    except OSError as error:
        raise DataError(f"cannot read the {_WHAT} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"the {_WHAT} {path} is not UTF-8 text") from None


def _of_cells(cells: list[str]) -> tuple[int, int] | None:
    if len(cells) == 2:
        return _pair(
            *(int(c) if c.isascii() and c.isdigit() and len(c) < 10 else None for c in cells)
        )
    try:
        return _size(json.loads(cells[0])) if len(cells) == 1 else None
    except (ValueError, RecursionError):
        return None


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 1:  # of a .hw.tsv
        value = value[0]
    if isinstance(value, dict):
        return _pair(value.get("width"), value.get("height"))
    return _pair(*value) if isinstance(value, list) and len(value) == 2 else None


def _pair(width: Any, height: Any) -> tuple[int, int] | None:
    for number in (width, height):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 1 << 31:
            return None
    return width, height
