"""One self-contained page with a data set's summary and records, to browse and to search.

A block holds some records as columns: the least that has to be kept as long as the page is open.
`page.js` reads what is written here; html.py says why nothing of the data is markup.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.manifest import Manifest
from shards.inspect.html import (
    as_json,
    check_pictures,
    data_element,
    frame,
    page_file,
    with_header,
)
from shards.inspect.names import Names
from shards.inspect.pictures import find_picture, thumbnail
from shards.inspect.records import Record
from shards.urls import shown

_BLOCK = 2048  # records
_BLOCK_BYTES = 32 << 20  # of text and pictures, after which a block ends earlier
# Separators in a block's text: of pieces; of an answer after a sentence, of its score.
_PIECE, _ANSWER, _SCORE = "\x1f", "\x1e", "\x1d"
_SEPARATORS = str.maketrans(dict.fromkeys((_PIECE, _ANSWER, _SCORE), "\N{REPLACEMENT CHARACTER}"))
_BOX = 4095  # what 1 stands as; 0.16 pixels of a picture of 640


@dataclass(frozen=True)
class PageSettings:
    """A page to write."""

    path: Path
    """What is there is replaced."""
    images: Path | None = None
    """Folder of the pictures, by image id; without, the layout of boxes is drawn."""
    pictures: int = 300
    """That are in the page at most, those of the first records."""


@dataclass(frozen=True)
class Page:
    """A page that was written."""

    path: Path
    size: int
    """In bytes."""
    records: int
    pictures: int
    """That are in it."""
    unreadable: int
    """Files that have the name of one and are no picture."""


@contextlib.contextmanager
def open_page(settings: PageSettings, manifest: Manifest, names: Names) -> Iterator[PageWriter]:
    """A page to be filled with records and then finished; it is at its place at the end of the
    block, or, if that raises, what was there before. DataError where it cannot be written, or there
    is no folder of pictures."""
    check_pictures(settings.images)
    with page_file(settings.path) as f:
        yield PageWriter(settings, manifest, names, f)


class PageWriter:
    """Writes a page; a block of records is in memory."""

    def __init__(
        self, settings: PageSettings, manifest: Manifest, names: Names, file: IO[bytes]
    ) -> None:
        self._settings, self._manifest, self._names, self._file = settings, manifest, names, file
        self._block = _Block(manifest)
        self._blocks = self._records = self._pictures = self._unreadable = self._size = 0
        assert __package__
        head, self._tail = frame(__package__, manifest.name, ("summary.js", "page.js"))
        self._write(head)

    def add(self, record: Record) -> None:
        """Append a record."""
        self._block.add(record, [self._picture(part.picture.image) for part in record.parts])
        self._records += 1
        if len(self._block) == _BLOCK or self._block.bytes >= _BLOCK_BYTES:
            self._end_block()

    def finish(self, summary: Mapping[str, Any]) -> Page:
        """Write the last block, the summary and the script that shows them."""
        if len(self._block):
            self._end_block()
        manifest = self._manifest
        self._write_data(
            "summary",
            as_json(
                {
                    "parts": 2 if manifest.schema.sides else 1,
                    "summary": {**summary, "url": shown(summary["url"])},
                    "sources": manifest.sources,
                    "objects": self._names.objects,
                    "attributes": self._names.attributes,
                    "shards": {i: self._manifest.shards[i].name for i in self._block.shards},
                    "blocks": self._blocks,
                    "records": self._records,
                    "pictures": self._pictures,
                }
            ),
        )
        self._write(self._tail)
        return Page(
            self._settings.path, self._size, self._records, self._pictures, self._unreadable
        )

    def _picture(self, image: str) -> bytes:
        settings = self._settings
        if settings.images is None or self._pictures >= settings.pictures:
            return b""
        path = find_picture(settings.images, image)
        jpeg = thumbnail(path) if path else None
        self._pictures += jpeg is not None
        self._unreadable += path is not None and jpeg is None
        return jpeg or b""

    def _end_block(self) -> None:
        self._write_data("block", self._block.payload())
        self._block.clear()
        self._blocks += 1

    def _write_data(self, kind: str, payload: bytes) -> None:
        self._write(data_element(kind, payload))

    def _write(self, text: str) -> None:
        self._size += self._file.write(text.encode())


class _Block:
    """Some records, as columns."""

    def __init__(self, manifest: Manifest) -> None:
        self._sources = {source: i for i, source in enumerate(manifest.sources)}
        self.shards: set[int] = set()
        """Of all blocks."""
        self.clear()

    def clear(self) -> None:
        self._numbers: dict[str, list[int]] = {name: [] for name in (*_COLUMNS, *_PART_COLUMNS)}
        self._source: list[int] = []
        self._boxes: list[NDArray] = []
        self._labels: dict[str, list[NDArray]] = {name: [] for name in _LABELS}
        self._pieces: list[str] = []
        self._pictures: list[bytes] = []
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._numbers["shard"])

    def add(self, record: Record, pictures: list[bytes]) -> None:
        """pictures: a JPEG, or nothing, of each of its parts."""
        self.shards.add(record.shard)
        numbers = self._numbers
        for name, value in zip(
            _COLUMNS, (record.shard, record.index, len(record.sentences)), strict=True
        ):
            numbers[name].append(value)
        for part, picture in zip(record.parts, pictures, strict=True):
            size, of = part.picture, part.objects
            values = (size.width, size.height, of.stop - of.start, len(picture))
            for name, value in zip(_PART_COLUMNS, values, strict=True):
                numbers[name].append(value)
        pieces = [_clean(record.image), _clean(record.split or "")]
        pieces += [_clean(picture.image) for picture in record.pictures]
        for sentence in record.sentences:
            if sentence.source not in self._sources:
                raise DataError(
                    f"image {record.image!r:.80} has a sentence of {sentence.source!r:.40}, no "
                    "source of the manifest: build the data set again"
                )
            self._source.append(self._sources[sentence.source])
            answers = (sentence.answers or {}).items()
            pieces.append(
                _clean(sentence.text)
                + "".join(f"{_ANSWER}{_clean(a)}{_SCORE}{score:.4g}" for a, score in answers)
            )
        self._pieces += pieces
        self._boxes.append(np.rint(record.boxes * _BOX).astype("<u2"))
        if labels := record.labels:
            for name, (kind, scale) in _LABELS.items():
                values = getattr(labels, name)
                if scale > 1:
                    values = np.rint(np.clip(values, 0, 1) * scale)
                self._labels[name].append(values.astype(kind))
        self._pictures += pictures
        self.bytes += sum(map(len, pieces)) + sum(map(len, pictures))

    def payload(self) -> bytes:
        """A header in JSON after its length (u32), then the columns, the text and the pictures.
        All of it is little-endian, and every column begins at a multiple of 4."""
        boxes = np.concatenate(self._boxes)
        columns: dict[str, NDArray] = {
            **{name: np.asarray(values, dtype="<u4") for name, values in self._numbers.items()},
            "source": np.asarray(self._source, dtype="<u1"),
            # One column for each of x1, y1, x2 and y2: compresses better.
            "boxes": np.ascontiguousarray(boxes.T),
            **{name: np.concatenate(parts) for name, parts in self._labels.items() if parts},
        }
        parts = {name: (array.dtype.str[1:], array.tobytes()) for name, array in columns.items()}
        parts["text"] = "text", _PIECE.join(self._pieces).encode("utf-8", "replace")
        parts["pictures"] = "u1", b"".join(self._pictures)
        header, body, at = {}, [], 0
        for name, (kind, data) in parts.items():
            header[name] = [kind, at, len(data)]
            body.append(data + bytes(-len(data) % 4))
            at += len(body[-1])
        return with_header(header, body)


# A number for each record, and one for each picture that a record is of.
_COLUMNS = ("shard", "index", "sentences")
_PART_COLUMNS = ("width", "height", "objects", "picture")
# Type in the page, and what 1 stands as.
_LABELS = {
    "object_id": ("<u4", 1),
    "object_conf": ("<u1", 255),
    "attribute_id": ("<u4", 1),
    "attribute_conf": ("<u1", 255),
}


def _clean(text: str) -> str:
    """Text without what separates texts."""
    return text.translate(_SEPARATORS)
