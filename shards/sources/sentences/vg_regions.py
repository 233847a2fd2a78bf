"""Visual Genome's regions: `[{"id": 1, "regions": [{"phrase": "a clock", …}, …]}, …]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.format.record import Report, Sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items
from shards.sources.texts import ImageText, SentenceFormat


def _detect(path: Path) -> bool:
    begin = head(path)
    return begin.lstrip()[:1] == b"[" and b'"regions"' in begin and b'"phrase"' in begin


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        for i, entry in list_items(path, "file of region descriptions"):
            image = entry.get("id") if isinstance(entry, dict) else None
            regions = entry.get("regions") if isinstance(entry, dict) else None
            if type(image) is not int or not isinstance(regions, list):
                raise DataError(f'{path}: entry {i} is not an object with "id" and "regions"')
            out = []
            for region in regions:
                text = region.get("phrase") if isinstance(region, dict) else None
                if not isinstance(text, str):
                    raise DataError(f"{path}: entry {i}, image {image}: a region has no phrase")
                if text.strip():
                    out.append(Sentence(text.strip(), source))
                else:
                    report.add("empty sentences", f"{path}, image {image}")
            if out:
                yield ImageText(image_id(str(image), "vg"), tuple(out))


FORMAT = SentenceFormat(
    name="vg-regions",
    help="Visual Genome's region descriptions (region_descriptions.json)",
    source="vg_cap",
    detect=_detect,
    read=_read,
)
