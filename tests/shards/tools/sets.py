"""Data sets for the tests of tools, and the command line of these."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cli import shards_tools
from shards.format.answers import load_answers
from shards.format.build import BuildSettings
from shards.format.manifest import Manifest, given_file
from shards.format.record import ImageRecord
from shards.format.tokenizer import load_vocab
from tests.conftest import small_records

SETTINGS = BuildSettings("set", "test", vocab_size=200, images_per_shard=4)


def with_words_of(place: str | Path, **changes: Any) -> BuildSettings:
    """Settings of a build with the vocabulary and answers of a data set."""
    return replace(
        SETTINGS,
        vocab=load_vocab(given_file(place, "vocab")),
        answers=load_answers(given_file(place, "answers")),
        skip_bad=True,
        **changes,
    )


def renamed(records: list[ImageRecord], prefix: str) -> list[ImageRecord]:
    """The same of other images."""
    return [replace(r, image=f"{prefix}{r.image}") for r in records]


def with_splits(n: int) -> list[ImageRecord]:
    """Records of which every third is of another split."""
    return [
        replace(r, split="val" if i % 3 == 2 else "train") for i, r in enumerate(small_records(n))
    ]


def run(name: str, *arguments: object) -> int:
    """`lxscale shards NAME …`, without what the command adds to errors."""
    parser = argparse.ArgumentParser()
    getattr(shards_tools, f"add_{name}")(parser)
    args = parser.parse_args([str(a) for a in arguments])
    status: int = args.func(args)
    return status


# --- tars of others -----------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    f = io.BytesIO()
    np.save(f, array)
    return f.getvalue()


def foreign_members(record: ImageRecord, raw: bool = False) -> dict[str, bytes]:
    """A record as somebody might write it: members in the order of their names, JSON with spaces,
    and with keys of their own."""
    document = {
        "license": "by-sa ü",
        "sentences": [
            {"text": s.text, "source": s.source, "answers": dict(s.answers or {})}
            for s in record.sentences
        ],
        "image": record.image,
        "height": record.height,
        "width": record.width,
    }
    out = {
        "json": json.dumps(document, indent=2).encode(),
        "jpg": b"\xff\xd8 no picture",
        **(
            {"features.f16": record.features.tobytes(), "boxes.f32": record.boxes.tobytes()}
            if raw
            else {"features.npy": npy(record.features), "boxes.npy": npy(record.boxes)}
        ),
    }
    return dict(sorted(out.items()))


def write_tar(
    path: Path, samples: Sequence[tuple[str, dict[str, bytes]]], form: int = tarfile.PAX_FORMAT
) -> None:
    """A tar by Python's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(data), 1.5  # a pax header, as a whole number has none
                tar.addfile(info, io.BytesIO(data))


def write_foreign(folder: Path, records: list[ImageRecord], raw: bool = False) -> None:
    """Two tars of others."""
    half = len(records) // 2
    for number, part in enumerate((records[:half], records[half:])):
        samples = [(f"./a/{i:03d}", foreign_members(r, raw)) for i, r in enumerate(part)]
        write_tar(folder / f"shard-{number:06d}.tar", samples)


def summary(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.counts, manifest.schema, manifest.sources, manifest.question_sources
