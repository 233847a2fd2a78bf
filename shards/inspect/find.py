"""One record of a data set, found by its image id, the key of its tar members or its place."""

from __future__ import annotations

import heapq
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.format.answers import answer_index, normalise_answer
from shards.format.members import RECORD
from shards.format.record import Picture, Sentence, record_key
from shards.format.table import BLOCK, Table
from shards.format.tokenizer import encode_batch, make_tokenizer
from shards.inspect.names import Names, load_names
from shards.inspect.records import OpenSet, Record, open_set
from shards.progress import Progress, no_progress
from shards.store.locks import open_shared

_NEAR = 5  # keys that are named where one is not found
_PLACE = re.compile(r"(\d{1,9}):(\d{1,9})")


@dataclass(frozen=True)
class Shown:
    """A record, with all that the data set knows of it."""

    record: Record
    tar: str
    """URL of its shard."""
    tokens: tuple[tuple[str, ...], ...]
    """Of each sentence, as they are trained on; without [CLS] and [SEP]."""
    cut: tuple[bool, ...]
    """Whether a sentence has more than these."""
    in_table: tuple[frozenset[str], ...]
    """Of each sentence's answers, those that the answer table has."""
    names: Names

    def document(self) -> dict[str, Any]:
        """All of it for JSON; of features, their range."""
        r = self.record
        return {
            "image": r.image,
            "key": r.key,
            "shard": r.shard,
            "index": r.index,
            "tar": self.tar,
            "width": r.width,
            "height": r.height,
            **({"pictures": [asdict(picture) for picture in r.pictures]} if r.pictures else {}),
            "split": r.split,
            "sentences": [self._sentence(i, s) for i, s in enumerate(r.sentences)],
            "objects": [
                self._object(i, side, part.picture)
                for side, part in enumerate(r.parts)
                for i in range(part.objects.start, part.objects.stop)
            ],
        }

    def _sentence(self, i: int, s: Sentence) -> dict[str, Any]:
        return {
            "text": s.text,
            "source": s.source,
            "id": s.id,
            "answers": None if s.answers is None else dict(s.answers),
            "in_table": sorted(self.in_table[i]),
            "tokens": list(self.tokens[i]),
            "cut": self.cut[i],
        }

    def _object(self, i: int, side: int, picture: Picture) -> dict[str, Any]:
        """side: number of its picture, which is there where there are two."""
        r = self.record
        size = np.asarray([picture.width, picture.height] * 2)
        out: dict[str, Any] = {"picture": side} if r.pictures else {}
        out |= {"box": r.boxes[i].tolist(), "pixels": (r.boxes[i] * size).tolist()}
        if r.labels:
            for name, column in vars(r.labels).items():
                out[name] = column[i].item()
            out["object"] = self.names.object(out["object_id"])
            out["attribute"] = self.names.attribute(out["attribute_id"])
        assert r.features is not None
        feature = r.features[i].astype(np.float32)
        out["feature"] = {
            "least": float(feature.min()),
            "most": float(feature.max()),
            "mean": float(feature.mean()),
            "zeros": float((feature == 0).mean()),
        }
        return out


def show(
    url: str,
    key: str,
    objects: Path | None = None,
    attributes: Path | None = None,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
) -> Shown:
    """The record of the data set at `url` with this image id or tar key, or at this place,
    `shard:index`, both from 0 (which goes first).

    By id or key, shards are searched one after the other by the names in their tars; a remote one
    is fetched into the cache for that. Raises DataError naming the nearest keys where there is no
    such record, and what is missing or damaged.
    """
    data = open_set(url, cache)
    names = load_names(objects, attributes, data.manifest.schema)
    shard, index = locate(data, key, progress)
    table = data.table(shard)
    record = data.record(shard, table, index, features=True)
    return _shown(data, table, record, names)


def locate(data: OpenSet, key: str, progress: Progress = no_progress) -> tuple[int, int]:
    """Shard and place of a record, by what `show` takes, with its errors."""
    place = _PLACE.fullmatch(key)
    return _place(data, *map(int, place.groups())) if place else _find(data, key, progress)


def _place(data: OpenSet, shard: int, index: int) -> tuple[int, int]:
    shards = data.manifest.shards
    if shard >= len(shards):
        raise DataError(f"{data.url} has no shard {shard}: its {len(shards):,} count from 0")
    if index >= shards.images[shard]:
        raise DataError(
            f"shard {shard} of {data.url} has no record {index}: its {shards.images[shard]:,} "
            "count from 0"
        )
    return shard, index


def _find(data: OpenSet, key: str, progress: Progress) -> tuple[int, int]:
    """Shard and place of the record with an image id or key."""
    try:
        wanted = {record_key(key), key}
    except UnicodeEncodeError:
        raise DataError(f"{key!a:.120} is no id of a record: it is not valid Unicode") from None
    near: list[tuple[int, str]] = []
    shards = len(data.manifest.shards)
    for shard in range(shards):
        found = []
        for index, name in enumerate(_keys(data, shard)):
            if name in wanted:
                return shard, index
            found.append((_likeness(key, name), name))
        near = heapq.nlargest(_NEAR, [*near, *found])
        progress("shards searched", shard + 1, shards)
    names = ", ".join(name for _, name in near)
    raise DataError(
        f"{data.url} has no record {key!r:.120}: the nearest keys are {names}; give an image id, a "
        "key, or a place as 0:12"
    )


def _keys(data: OpenSet, shard: int) -> Iterator[str]:
    """The keys of a shard's records in order, from the headers in its tar."""
    table, f = data.table(shard), None
    while f is None:  # evicted before it was opened: fetched again
        f = open_shared(data.files.path(shard))
    with f:
        for index, begin in enumerate(table.offset[RECORD.name].tolist()):
            try:
                info = tarfile.TarInfo.frombuf(
                    os.pread(f.fileno(), BLOCK, begin - BLOCK), "ascii", "strict"
                )
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{data.where(shard)}: record {index} has no header ({error}): build the data "
                    "set again"
                ) from None
            yield info.name.removesuffix(f".{RECORD.suffix}")


def _likeness(key: str, name: str) -> int:
    """Characters that two names share at their beginnings and ends. Cheap, as all keys are asked;
    and what is mistyped, cut or lacks a prefix is found."""
    a, b = key.lower(), name.lower()
    first = _same(a, b)
    return first + _same(a[first:][::-1], b[first:][::-1])


def _same(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shown(data: OpenSet, table: Table, record: Record, names: Names) -> Shown:
    limit = data.manifest.schema.max_tokens - 2
    first, end = table.image_sentences[record.index : record.index + 2].tolist()
    edges = table.token_start[first : end + 1].tolist()
    kept = [table.tokens[a:b].tolist() for a, b in pairwise(edges)]
    texts = [s.text for s in record.sentences]
    whole = encode_batch(make_tokenizer(data.tokens), texts, limit + 1)
    known = answer_index(data.answers)
    return Shown(
        record=record,
        tar=data.where(record.shard),
        tokens=tuple(tuple(data.tokens[i] for i in ids) for ids in kept),
        cut=tuple(len(ids) > limit for ids in whole),
        in_table=tuple(
            frozenset(a for a in s.answers or () if normalise_answer(a) in known)
            for s in record.sentences
        ),
        names=names,
    )
