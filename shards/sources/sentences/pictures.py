"""Pictures and their sentences, one entry an image:

[{"image": "images/0.png",                    a file name relative to the folder of pictures
  "sentences": [{"text": "what shape is it?",
                 "source": "vqa",             optional: the name of its set
                 "answers": {"circle": 1.0},  optional: answer → score 0..1
                 "id": 17}],                  optional: question id, string or integer
  "split": "train"}, …]                       optional
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from shards.errors import DataError
from shards.format.record import Report, check_sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items
from shards.sources.texts import ImageText, SentenceFormat


def _detect(path: Path) -> bool:
    begin = head(path)
    return begin.lstrip()[:1] == b"[" and b'"image"' in begin and b'"sentences"' in begin


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        seen: dict[str, int] = {}
        for i, item in list_items(path, "file of sentences"):
            text = _entry(item, f"{path}: entry {i}", source, seen, i)
            if text.sentences:
                yield text


def _entry(item: object, where: str, source: str, seen: dict[str, int], i: int) -> ImageText:
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise DataError(f'{where} is not an object with an "image"')
    name = item["image"]
    where = f"{where} ({name})"
    if unknown := set(item) - {"image", "sentences", "split"}:
        raise DataError(f"{where} has an unknown key {sorted(unknown)[0]!r}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{where} leads out of the folder")
    if name in seen:
        raise DataError(f"{where} is the same image as entry {seen[name]}: join their sentences")
    seen[name] = i
    given, split = item.get("sentences"), item.get("split")
    if not isinstance(given, list):
        raise DataError(f'{where} has no list of "sentences"')
    if split is not None and not isinstance(split, str):
        raise DataError(f"{where}: split is not a string")
    sentences = tuple(
        check_sentence(s, f"{where}, sentence {j}", source) for j, s in enumerate(given)
    )
    return ImageText(image_id(name), sentences, split)


FORMAT = SentenceFormat(
    name="pictures",
    help="our JSON of pictures and sentences (shards/sources/sentences/pictures.py)",
    source="images",
    detect=_detect,
    read=_read,
)
