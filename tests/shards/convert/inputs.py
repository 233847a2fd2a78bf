"""Users' files for tests: a TSV of features of width 6, and LXMERT's aggregated sentences."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.sources.features.tsv import COLUMNS
from shards.sources.regions import Options

DIM = 6
OPTIONS = Options(feature_dim=DIM)


def b64(array: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(array, dtype).tobytes()).decode()


def make_row(image: str, columns: int = 10, n: int = 3, **changes: str) -> list[str]:
    """Cells of a good row with some of them replaced."""
    prefix = "img" if columns == 10 else "image"
    cells = {
        f"{prefix}_id": image,
        f"{prefix}_h": "100",
        f"{prefix}_w": "200",
        "objects_id": b64(range(n), "<i8"),
        "objects_conf": b64([0.5] * n, "<f4"),
        "attrs_id": b64(range(n), "<i8"),
        "attrs_conf": b64([0.25] * n, "<f4"),
        "num_boxes": str(n),
        "boxes": b64([[0, 0, 200.5, 100.5], [10, 20, 30, 40], [-0.5, 0, 200, 50]][:n], "<f4"),
        "features": b64(np.arange(n * DIM) / 8, "<f4"),
    }
    return [(cells | changes)[c] for c in COLUMNS[columns]]


def tsv_bytes(rows: list[list[str]]) -> bytes:
    return "".join("\t".join(r) + "\r\n" for r in rows).encode()


def aggregated(images: list[str]) -> str:
    """Two captions and a question of each image."""
    return json.dumps(
        [
            {
                "img_id": image,
                "sentf": {
                    "mscoco": [f"image {image}", "a thing on a table"],
                    "vqa": [f"what is {i % 5}?"],
                },
                "labelf": {"vqa": [{"cat": 1, "dog": 0.3} if i % 2 else {"red": 1}]},
            }
            for i, image in enumerate(images)
        ]
    )


def write_inputs(
    folder: Path, count: int = 20, first: int = 0, rows: list[list[str]] | None = None
) -> Inputs:
    """The files of so many images, in a folder, and what names them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"img-{i:04d}" for i in range(first, first + count)]
    rows = [make_row(n, n=1 + i % 3) for i, n in enumerate(names)] if rows is None else rows
    (folder / "features.tsv").write_bytes(tsv_bytes(rows))
    (folder / "sentences.json").write_text(aggregated(names))
    return named(folder)


def named(folder: Path) -> Inputs:
    return Inputs(
        (FeatureInput(str(folder / "features.tsv")),),
        (SentenceInput((folder / "sentences.json",)),),
    )
