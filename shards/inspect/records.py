"""A data set that is open to be looked at: its tables one at a time, its records one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.features import as_numbers
from shards.format.manifest import FileInfo, Manifest, load_manifest
from shards.format.members import BOXES, FEATURES, LABELS, RECORD, SIDES, members_of
from shards.format.record import Labels, Picture, Sentence, check_sentence, record_key
from shards.format.table import Table, check_table, open_table
from shards.format.tokenizer import load_vocab
from shards.gather import gather_bytes
from shards.store.cache import cache_folder, local_file
from shards.store.prefetch import ShardFiles


@dataclass(frozen=True)
class Part:
    """An image that a record is of."""

    picture: Picture
    objects: slice
    """Which of the record's are its."""


@dataclass(frozen=True)
class Record:
    """One image of a data set, as its tar has it; or two, whose sentences are about both."""

    shard: int
    """Number of its shard."""
    index: int
    """Its place in that."""
    image: str
    """Its id in the source; of two images their common one."""
    width: int
    """In pixels; of two images the first's."""
    height: int
    split: str | None
    sentences: tuple[Sentence, ...]
    boxes: NDArray[np.float32]
    """(n, 4): x1 y1 x2 y2 over width and height, 0..1."""
    labels: Labels | None
    features: NDArray[np.floating] | None
    """(n, feature_dim), where they were asked for."""
    sides: NDArray[np.uint8] | None = None
    """(n,): 0 for objects of the first of two images, then 1 for the second's; None: there is
    one."""
    pictures: tuple[Picture, ...] = ()
    """The two images."""

    @property
    def key(self) -> str:
        """The base name of its tar members."""
        return record_key(self.image)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The one image, or both."""
        count = len(self.boxes)
        if self.sides is None:
            return (Part(Picture(self.image, self.width, self.height), slice(0, count)),)
        first, second = self.pictures
        begin = int(np.searchsorted(self.sides, 1))
        return Part(first, slice(0, begin)), Part(second, slice(begin, count))


@dataclass(frozen=True)
class OpenSet:
    """A data set to be looked at. A shard is fetched into the node's cache and its hash is checked
    before anything of it is read; a table likewise. Whoever fetches many has them in the cache."""

    url: str
    manifest: Manifest
    cache: Path
    files: ShardFiles

    def where(self, shard: int) -> str:
        """The tar of a shard, for messages."""
        return self.manifest.shards[shard].tar_at(self.manifest.place(self.url)).url

    def table(self, shard: int) -> Table:
        """A shard's table, mapped; DataError naming it where it is damaged or cannot be right."""
        info = self.manifest.shards[shard]
        file = info.table_at(self.manifest.place(self.url))
        table = open_table(local_file(file, self.cache, table=True))
        check_table(table, info, self.manifest, file.url)
        return table

    @cached_property
    def answers(self) -> list[str]:
        """The answer of each id."""
        answers = load_answers(self._file(self.manifest.answers))
        if len(answers) != self.manifest.answers.count:
            raise DataError(
                f"the answer table of {self.url} has {len(answers)} answers, not as the manifest: "
                "build the data set again"
            )
        return answers

    @cached_property
    def tokens(self) -> list[str]:
        """The token of each id."""
        tokens = load_vocab(self._file(self.manifest.vocab))
        if len(tokens) != self.manifest.schema.vocab_size:
            raise DataError(
                f"the vocabulary of {self.url} has {len(tokens)} tokens, not as the manifest: "
                "build the data set again"
            )
        return tokens

    def _file(self, info: FileInfo) -> Path:
        return local_file(info.at(self.manifest.place(self.url)), self.cache, table=True)

    def record(self, shard: int, table: Table, index: int, features: bool = False) -> Record:
        """Record `index` of a shard, whose table is given. DataError naming it where it is not as
        the table and the schema say."""
        schema, n = self.manifest.schema, int(table.image_objects[index])
        members = [m for m in members_of(schema) if features or m.name != FEATURES.name]
        at = {m.name: int(table.offset[m.name][index]) for m in members}
        first = min(at.values())
        places = {}  # member -> where it begins and ends
        for member in members:
            begin, given = at[member.name] - first, n * member.object_bytes(schema)
            size = given if member.columns else int(table.record_size[index])
            places[member.name] = begin, begin + size
        # They are beside one another in the tar: one piece of it has them all.
        raw = gather_bytes(self.files, shard, first, max(end for _, end in places.values()))
        found = {}
        try:
            text = raw[slice(*places[RECORD.name])]
            document = json.loads(text.decode())
            if table.sample_offset is not None and isinstance(document, dict):
                # In tars of others it need not be there.
                document.setdefault("num_objects", n)
            if b"\\ud" in text.lower():  # what stands for half a character is no Unicode
                json.dumps(document, ensure_ascii=False).encode()
            for member in members:
                if member is not RECORD:
                    payload = raw[slice(*places[member.name])]
                    found[member.name] = member.value(payload, n, schema)
            _check(document, found, n, int(np.diff(table.image_sentences[index : index + 2])[0]))
            sentences = tuple(
                check_sentence(s, f"sentence {j}") for j, s in enumerate(document["sentences"])
            )
            sides = found.get(SIDES.name)
            pictures = _pictures(document, sides)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.where(shard)}: record {index}: {error}; build the data set again"
            ) from None
        return Record(
            shard=shard,
            index=index,
            image=document["image"],
            width=document["width"],
            height=document["height"],
            split=document.get("split"),
            sentences=sentences,
            boxes=found[BOXES.name],
            labels=found.get(LABELS.name),
            features=as_numbers(found[FEATURES.name]) if features else None,
            sides=sides,
            pictures=pictures,
        )


def open_set(url: str, cache: str | Path | None = None) -> OpenSet:
    """The data set at `url` (a folder or s3:// prefix). cache: the node's cache for what is remote.

    Raises DataError naming the manifest where it is absent or damaged.
    """
    folder = cache_folder(cache)
    manifest = load_manifest(url, folder)
    place = manifest.place(url)
    tars = manifest.shards.tars([(place, len(manifest.shards))])
    return OpenSet(url, manifest, folder, ShardFiles(tars, folder))


def _check(document: Any, found: dict[str, Any], objects: int, sentences: int) -> None:
    """ValueError where the JSON of a record is not what one holds, or numbers are not finite."""
    if not isinstance(document, dict) or not isinstance(document["image"], str):
        raise ValueError("its JSON has no image id")
    _check_size(document, "its")
    if document["num_objects"] != objects:
        raise ValueError("num_objects differs from the table")
    if not isinstance(document["sentences"], list) or len(document["sentences"]) != sentences:
        raise ValueError("its sentences are not as many as in the table")
    if not isinstance(document.get("split", ""), str):
        raise ValueError("its split is no name")
    boxes, labels = found[BOXES.name], found.get(LABELS.name)
    arrays = [boxes, *(vars(labels).values() if labels else ())]
    arrays += [found[FEATURES.name]] if FEATURES.name in found else []
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a number of its objects is not finite")
    if not ((boxes >= 0) & (boxes <= 1)).all():
        raise ValueError("a box lies outside of 0..1")
    if labels and min(labels.object_id.min(), labels.attribute_id.min()) < 0:
        raise ValueError("a label is below 0")


def _check_size(document: dict[str, Any], whose: str) -> None:
    for name in ("width", "height"):
        if type(document[name]) is not int or not 1 <= document[name] < 1 << 31:
            raise ValueError(f"{whose} {name} is {document[name]!r:.40}")


def _pictures(document: dict[str, Any], sides: NDArray[np.uint8] | None) -> tuple[Picture, ...]:
    """The images that a record with these sides is of, none for a record of one; ValueError where
    there are not two, or objects are not those of the first and then those of the second."""
    given = document.get("pictures", [])
    count = len(given) if isinstance(given, list) else 0
    if sides is None:
        if given:
            raise ValueError("it has pictures, but does not say which object is of which")
        return ()
    if count != 2:
        raise ValueError(f"its objects are of two pictures, but it names {count}")
    for picture in given:
        if not isinstance(picture, dict) or not isinstance(picture["image"], str):
            raise ValueError("a picture of it has no image id")
        _check_size(picture, "a picture's")
    if not len(sides) or sides[0] != 0 or sides[-1] != 1 or (np.diff(sides.astype(int)) < 0).any():
        raise ValueError("its objects are not those of the first picture and then the second's")
    return tuple(Picture(**picture) for picture in given)
