"""LXMERT's aggregated sentences: all sentences of an image, by set, with answers.

    [{"img_id": "COCO_train2014_000000318556",
      "sentf":  {"mscoco": ["A very clean …", …], "vqa": ["What is …?", …]},
      "labelf": {"vqa": [{"white": 1, "gray": 0.3}, …]}}, …]

labelf[set][i] belongs to sentf[set][i]; a set without labels is a caption set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.format.record import Report, Sentence, check_answers
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items
from shards.sources.texts import ImageText, SentenceFormat

# Names of sets there → ours; other names are kept.
SOURCE_NAMES = {"mscoco": "coco_cap", "vg": "vg_cap", "visual7w": "vgqa"}


def _detect(path: Path) -> bool:
    begin = head(path)
    return begin.lstrip()[:1] == b"[" and b'"sentf"' in begin and b'"img_id"' in begin


def _read(files: Sequence[Path], _source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        for i, entry in list_items(path, "file of sentences"):
            image = entry.get("img_id") if isinstance(entry, dict) else None
            if not isinstance(image, str) or not isinstance(entry.get("sentf"), dict):
                raise DataError(f'{path}: entry {i} is not an object with "img_id" and "sentf"')
            sentences = _sentences(entry, f"{path}, image {image}", report)
            if sentences:
                yield ImageText(image_id(image), sentences)


def _sentences(entry: dict[str, Any], where: str, report: Report) -> tuple[Sentence, ...]:
    labels = entry.get("labelf") or {}
    if not isinstance(labels, dict) or not set(labels) <= set(entry["sentf"]):
        raise DataError(f'{where}: "labelf" does not belong to "sentf"')
    out = []
    for name, texts in entry["sentf"].items():
        answers = labels.get(name)
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{where}: the sentences of {name} are not a list of strings")
        if answers is not None and (not isinstance(answers, list) or len(answers) != len(texts)):
            raise DataError(f"{where}: {name} has not one label entry for each sentence")
        for i, text in enumerate(texts):
            if not text.strip():
                report.add("empty sentences", where)
                continue
            found = None
            if answers is not None:
                found = check_answers(answers[i], f"{where}, {name} sentence {i}")
            out.append(Sentence(text, SOURCE_NAMES.get(name, name), found))
    return tuple(out)


FORMAT = SentenceFormat(
    name="lxmert",
    help="LXMERT's aggregated sentences (mscoco_train.json)",
    source="lxmert",
    detect=_detect,
    read=_read,
)
