"""LXMERT's aggregated sentences: all sentences of an image, by set, with answers.

    [{"img_id": "COCO_train2014_000000318556",
      "sentf":  {"mscoco": ["A very clean …", …], "vqa": ["What is …?", …]},
      "labelf": {"vqa": [{"white": 1, "gray": 0.3}, …]}}, …]

labelf[set][i] belongs to sentf[set][i]; a set without labels is a caption set.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.format.record import Report, Sentence, check_answers
from shards.json_files import read_list

# Names of sets there → ours; other names are kept.
SOURCE_NAMES = {"mscoco": "coco_cap", "vg": "vg_cap", "visual7w": "vgqa"}


class SentenceStore:
    """Sentences by image id, held as compact JSON: nine million Python objects take gigabytes."""

    def __init__(self) -> None:
        self._by_image: dict[str, list[bytes]] = {}

    @classmethod
    def load(cls, files: Iterable[str | Path], report: Report) -> SentenceStore:
        """Read aggregated JSON files. An image in several has the sentences of all.

        Raises DataError naming file, image and set for anything that is not of the format.
        """
        store = cls()
        for path in files:
            store._read(Path(path), report)
        return store

    def sentences(self, image: str) -> tuple[Sentence, ...]:
        """All sentences of an image, empty where it has none."""
        parts = self._by_image.get(image, ())
        return tuple(Sentence(*entry) for part in parts for entry in json.loads(part))

    def without_features(self, seen: Container[str]) -> list[str]:
        """Images that have sentences but are not in `seen`, in file order."""
        return [image for image in self._by_image if image not in seen]

    def _read(self, path: Path, report: Report) -> None:
        for i, entry in enumerate(read_list(path, "file of sentences")):
            image = entry.get("img_id") if isinstance(entry, dict) else None
            if not isinstance(image, str) or not isinstance(entry.get("sentf"), dict):
                raise DataError(f'{path}: entry {i} is not an object with "img_id" and "sentf"')
            rows = _rows(entry, f"{path}, image {image}", report)
            if rows:
                text = json.dumps(rows, separators=(",", ":")).encode()
                self._by_image.setdefault(image, []).append(text)


def _rows(entry: dict[str, Any], where: str, report: Report) -> list[tuple]:
    """(text, source, answers) of an image's sentences."""
    labels = entry.get("labelf") or {}
    if not isinstance(labels, dict) or not set(labels) <= set(entry["sentf"]):
        raise DataError(f'{where}: "labelf" does not belong to "sentf"')
    rows: list[tuple] = []
    for name, texts in entry["sentf"].items():
        source = SOURCE_NAMES.get(name, name)
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
            rows.append((text, source, found))
    return rows
