"""COCO captions: `{"images": […], "annotations": [{"image_id": 9, "caption": "A …"}, …]}`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.format.record import Report, Sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items
from shards.sources.texts import ImageText, SentenceFormat


def _detect(path: Path) -> bool:
    # Hundreds of images may stand before the first annotation.
    begin = head(path)
    known = b'"caption"' in begin or (b'"images"' in begin and b'"file_name"' in begin)
    return begin.lstrip()[:1] == b"{" and known and b'"question_id"' not in begin


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        for i, entry in list_items(path, "file of captions", "annotations"):
            image, text = (
                (entry.get("image_id"), entry.get("caption"))
                if isinstance(entry, dict)
                else ("", "")
            )
            if type(image) is not int or not isinstance(text, str):
                raise DataError(
                    f"{path}: annotation {i} has no image_id and caption: give a captions_*.json"
                )
            if not text.strip():
                report.add("empty sentences", f"{path}, annotation {i}")
                continue
            yield ImageText(image_id(str(image), "coco"), (Sentence(text.strip(), source),))


FORMAT = SentenceFormat(
    name="coco",
    help="COCO captions (captions_train2014.json)",
    source="coco_cap",
    detect=_detect,
    read=_read,
)
