"""Data sets as the hot path sees them: flat memory-mapped arrays and gathers, no object a sample.

The tables of all shards, of one data set or of several that are mixed, are merged once per node
into an index, one file of global arrays; where the text of all is too much for a node, those of the
shards that are in use are merged in memory. Features stay in the tars, which are read as the order
reaches them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.index import LAYOUT, DatasetIndex, TableFile, map_index
from shards.format.manifest import Counts, FileInfo, Manifest, load_manifest
from shards.format.members import MEMBERS, RECORD, has_member
from shards.format.shard_list import ShardList
from shards.gather import gather_bytes, gather_images, gather_objects
from shards.order.draws import I64
from shards.order.keys import VERSION
from shards.order.sampler import Plan, Sampler, make_sampler
from shards.order.settings import SamplerSettings
from shards.order.streams import Contents, ShardRange, Stream
from shards.store.cache import cache_folder, local_file, verified_file
from shards.store.derived import derived_file
from shards.store.prefetch import ShardFiles
from shards.tables import Tables

Text = Literal["all", "window"]
"""Whether the words of all shards are at hand at any time, or those of the shards in use."""


@dataclass(frozen=True)
class DatasetSpec:
    """A data set to open."""

    url: str
    """Its folder or URL."""
    weight: float | None = None
    """Its share of the pairs, against the others'."""


@dataclass(frozen=True)
class Dataset:
    """Opened data sets, as one."""

    specs: tuple[DatasetSpec, ...]
    manifests: list[Manifest]
    """Of each data set."""
    manifest: Manifest
    """Of all of them together; it holds the shards of one data set after those of another."""
    shard_ranges: tuple[ShardRange, ...]
    """The shards of each data set in it."""
    index: DatasetIndex
    """Of all shards, or of those that `over` was asked for."""
    shards: ShardFiles
    cache: Path
    """Folder of the node's cache."""
    tables: Tables | None = None
    """Where the text of all shards is too much for one index: those of the shards in use."""

    def __reduce__(self) -> Any:
        # Another process maps the files itself, and does not need the store for what is here.
        return _open, (self.manifests, self.specs, self.cache, self.shards.limit, self.text)

    @property
    def text(self) -> Text:
        return "window" if self.tables else "all"

    def over(self, shards: I64) -> Dataset:
        """The data set with an index that has some shards, distinct and rising; what is in it is
        numbered by rows of that index."""
        return replace(self, index=self.tables.index(shards)) if self.tables else self

    @property
    def url(self) -> str:
        """The folder or URL; of several, all."""
        return " + ".join(spec.url for spec in self.specs)

    def sampler(self, settings: SamplerSettings, seed: int, version: int = VERSION) -> Sampler:
        """The sampler over all pairs of the data; version: of the order. Raises DataError where the
        settings ask for pairs that there are none of."""
        manifest = self.manifest
        contents = Contents(
            manifest.shards.pairs_per_source,
            manifest.sources,
            manifest.question_sources,
            self.shard_ranges,
        )
        return make_sampler(settings, seed, contents, version)

    # --- where things are -----------------------------------------------------------------------

    def rows_of(self, streams: Sequence[Stream], plan: Plan) -> I64:
        """The pairs of a plan, as rows of the index."""
        if len(streams) == 1 and len(streams[0].sources) == len(self.manifest.sources):
            return self.index.shard_pair[self.index.place_of(plan.shard)] + plan.index
        out = np.empty(len(plan), dtype=np.int64)
        for i in np.unique(plan.stream).tolist():
            rows = np.flatnonzero(plan.stream == i)
            out[rows] = self._rows_in(streams[i], plan.shard[rows], plan.index[rows])
        return out

    def _rows_in(self, stream: Stream, shard: I64, index: I64) -> I64:
        m = self.index
        shard = m.place_of(shard)
        if len(stream.sources) == len(self.manifest.sources):
            return m.shard_pair[shard] + index
        # The index counts through the stream's sources one after the other.
        out, left = np.empty_like(shard), np.ones(len(shard), dtype=bool)
        for s in stream.sources:
            size = m.source_sizes[shard, s]
            here = left & (index < size)
            out[here] = m.by_source[(m.source_start[shard, s] + index)[here]]
            left &= ~here
            index = np.where(left, index - size, index)
        return out

    def pair_ids(self, row: I64) -> I64:
        """Rows of the index -> the pairs' numbers in the whole data."""
        if not self.tables:
            return row
        m = self.index
        place = np.searchsorted(m.shard_pair, row, side="right") - 1
        return self.manifest.shards.pair_start[m.shard[place]] + row - m.shard_pair[place]

    def image_of(self, row: I64) -> I64:
        """Pairs' images, all as rows of the index."""
        return self.index.image_of[row].astype(np.int64)

    def shard_of_image(self, image: I64) -> I64:
        """Images, as rows of the index -> their shards' numbers in the data."""
        return self.index.shard[np.searchsorted(self.index.shard_image, image, side="right") - 1]

    @cached_property
    def dataset_pairs(self) -> I64:
        """First pair of each data set, and the number of all: i64 (data sets + 1,)."""
        edges = [r.begin for r in self.shard_ranges] + [len(self.manifest.shards)]
        return self.manifest.shards.pair_start[np.asarray(edges)]

    @cached_property
    def images_with_sentences(self) -> list[tuple[str, int]]:
        """(name, images that have pairs) of each data set, counting no further than two."""
        of, edges = self.index.image_of, self.dataset_pairs.tolist()
        return [
            (shards.name, len({int(of[a]), int(of[b - 1])}) if b > a else 0)
            for shards, a, b in zip(self.shard_ranges, edges[:-1], edges[1:], strict=True)
        ]

    def pairs_by_set(self) -> I64:
        """Pairs by data set and source, i64 (data sets, sources)."""
        per_source = self.manifest.shards.pairs_per_source
        return np.stack([per_source[r.begin : r.end].sum(0) for r in self.shard_ranges])

    def answered_by_set(self) -> I64:
        """Pairs with an answer in the table, likewise. Where the index does not have all shards:
        pairs of sources that have answers."""
        manifest = self.manifest
        if self.tables:
            asked = np.isin(manifest.sources, manifest.question_sources)
            return self.pairs_by_set() * (asked & (manifest.answers.count > 0))
        shape = len(self.shard_ranges), len(manifest.sources)
        dataset = np.repeat(np.arange(shape[0]), np.diff(self.dataset_pairs))
        has_answer = np.diff(self.index.answer_start) > 0
        cell = (dataset * shape[1] + self.index.source)[has_answer]
        return np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)

    # --- gathers --------------------------------------------------------------------------------

    def gather_images(self, images: I64, shards: I64, features: NDArray) -> dict[str, NDArray]:
        """Copy the features of images, which lie in `shards`, into `features`,
        (images, objects, schema.stored_width), zero-padded; the objects' other columns, by name, as
        `shards.gather.gather_images` has them.
        """
        schema = self.manifest.schema
        return gather_images(self.shards, self.index, schema, images, shards, features)

    def gather_objects(self, images: I64, shards: I64, objects: I64) -> NDArray:
        """Single objects' features as stored, (n, schema.stored_width): object `objects[i]` of
        `images[i]`, which lies in `shards[i]`."""
        schema = self.manifest.schema
        return gather_objects(self.shards, self.index, schema, images, shards, objects)

    def answers(self) -> list[str]:
        """The answer table: the answer of each id."""
        return list(json.loads(self.file(self.manifest.answers).read_text()))

    def file(self, info: FileInfo) -> Path:
        """A verified local copy of the vocabulary or the answer table."""
        return local_file(
            info.at(self.manifests[0].place(self.specs[0].url)), self.cache, table=True
        )

    def record(self, image: int) -> bytes:
        """The JSON of an image record."""
        at = int(self.index.offset[RECORD.name][image])
        size = int(self.index.record_size[image])
        shard = int(self.shard_of_image(np.asarray([image]))[0])
        return gather_bytes(self.shards, shard, at, size)


def open_dataset(
    specs: str | Sequence[DatasetSpec],
    cache: str | Path | None = None,
    limit: int | None = None,
    text: Text = "all",
) -> Dataset:
    """Open a data set, or several to be mixed. limit: bytes that the node's cache of remote shards
    may hold. text: "all" has the tables of all shards fetched and merged on the node's first call;
    "window" leaves a table with its shard, to come and go with it.

    Raises DataError naming the file when a manifest or a table is missing or damaged, and when
    data sets do not fit together.
    """
    if isinstance(specs, str):
        specs = (DatasetSpec(specs),)
    folder = cache_folder(cache)
    manifests = [load_manifest(spec.url, folder) for spec in specs]
    return _open(manifests, tuple(specs), folder, limit, text)


def _open(
    manifests: list[Manifest],
    specs: tuple[DatasetSpec, ...],
    folder: Path,
    limit: int | None,
    text: Text,
) -> Dataset:
    """What `open_dataset` does once it has the manifests. It asks the store for nothing that is in
    the cache."""
    manifest = _combine(manifests, specs)
    ends = np.cumsum([len(m.shards) for m in manifests]).tolist()
    shard_ranges = tuple(
        ShardRange(m.name, end - len(m.shards), end, spec.weight)
        for spec, m, end in zip(specs, manifests, ends, strict=True)
    )
    places_of = [m.place(spec.url) for spec, m in zip(specs, manifests, strict=True)]
    places = list(zip(places_of, ends, strict=True))
    own_sources = [[manifest.sources.index(s) for s in m.sources] for m in manifests]
    tars, files = manifest.shards.tars(places), manifest.shards.tables(places)
    shards = ShardFiles(tars, folder, limit, files if text == "window" else None)

    def table_of(number: int) -> TableFile:
        """A shard's table, which is fetched if it is not here."""
        of, file = bisect_right(ends, number), files[number]
        if text == "window":
            verified = shards.table(number)
        else:
            verified = verified_file(file, folder, folder="tables")
        shard = manifest.shards[number]
        return TableFile(verified, file.url, manifests[of], shard, own_sources[of])

    tables = Tables(manifest, table_of, shards.in_use)
    if text == "all":
        path = folder / f"merged-{manifest.fingerprint}-{LAYOUT}.safetensors"
        index = map_index(derived_file(path, folder, tables.merge_all))
    else:
        index = tables.index(np.zeros(0, dtype=np.int64))
    return Dataset(
        specs,
        manifests,
        manifest,
        shard_ranges,
        index,
        shards,
        folder,
        tables if text == "window" else None,
    )


def _combine(manifests: Sequence[Manifest], specs: Sequence[DatasetSpec]) -> Manifest:
    """One manifest for data sets that are mixed; DataError where they do not fit together."""
    first = manifests[0]
    if len(manifests) == 1:
        return first
    schema = first.schema
    for spec, m in zip(specs[1:], manifests[1:], strict=True):
        for thing, one, other in (
            ("vocabulary", first.vocab.sha256, m.vocab.sha256),
            ("answer table", first.answers.sha256, m.answers.sha256),
            ("feature width", schema.feature_dim, m.schema.feature_dim),
            ("type of features", schema.feature_type, m.schema.feature_type),
            *(
                (
                    f"use of {member.name}",
                    has_member(schema, member),
                    has_member(m.schema, member),
                )
                for member in MEMBERS
            ),
        ):
            if one != other:
                raise DataError(
                    f"{spec.url} cannot be mixed with {specs[0].url}: it has another {thing}; "
                    "build both with the same --vocab, --answers and features"
                )
        schema = replace(
            schema,
            max_objects=max(schema.max_objects, m.schema.max_objects),
            max_tokens=max(schema.max_tokens, m.schema.max_tokens),
            num_object_classes=max(schema.num_object_classes, m.schema.num_object_classes),
            num_attribute_classes=max(schema.num_attribute_classes, m.schema.num_attribute_classes),
        )
    if len({m.name for m in manifests}) != len(manifests):
        names = ", ".join(m.name for m in manifests)
        raise DataError(f"data sets that are mixed need distinct names, not {names}: see --name")
    sources = tuple(sorted({s for m in manifests for s in m.sources}))
    sentences = {s: sum(m.counts.sentences.get(s, 0) for m in manifests) for s in sources}
    return replace(
        first,
        name="+".join(m.name for m in manifests),
        schema=schema,
        sources=sources,
        question_sources=tuple(sorted({s for m in manifests for s in m.question_sources})),
        counts=Counts(
            sum(m.counts.images for m in manifests),
            sum(m.counts.pairs for m in manifests),
            sentences,
        ),
        shards=ShardList.joined([m.shards for m in manifests], sources),
        pages=(),
    )
