"""Data sets as the hot path sees them: flat memory-mapped arrays and gathers, no object a sample.

The tables of all shards, of one data set or of several that are mixed, are merged once per node
into one file of global arrays, so that any pair's tokens, image and answers are found by vector
operations. Features stay in the tars, which are memory-mapped one by one as the order reaches them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.manifest import Counts, FileInfo, Manifest, ShardInfo, load_manifest
from shards.format.table import map_arrays, open_table, save_arrays
from shards.order.draws import I64
from shards.order.sampler import Plan, Sampler, make_sampler
from shards.order.settings import SamplerSettings
from shards.order.streams import Contents, ShardRange, Stream
from shards.store import objects
from shards.store.cache import default_cache, local_file, write_once
from shards.store.prefetch import ShardFile, ShardFiles

_TABLES_AT_ONCE = 16
_LAYOUT = 2  # of the merged table; part of its file name


@dataclass(frozen=True)
class DatasetIndex:
    """All tables of a data set, concatenated; I images, S sentences (= pairs), N shards, K sources.

    shard_image i64[N+1], shard_pair i64[N+1]: first image and pair of each shard
    image_objects i32[I]; features_offset, boxes_offset, labels_offset, record_offset,
    record_size i64[I]: in the image's tar; image_pair i64[I+1]: first pair of each image
    source u8[S]; token_start i64[S+1]; tokens; answer_start i64[S+1]; answer_id; answer_score
    by_source i64[S]: pairs sorted by (shard, source, pair); source_start i64[N, K]: where the run
    of a shard and source begins in by_source; image_of i32[S]: image of each pair
    """

    shard_image: I64
    shard_pair: I64
    image_objects: NDArray[np.int32]
    features_offset: I64
    boxes_offset: I64
    labels_offset: I64
    record_offset: I64
    record_size: I64
    image_pair: I64
    source: NDArray[np.uint8]
    token_start: I64
    tokens: NDArray[np.uint16]
    answer_start: I64
    answer_id: NDArray[np.int32]
    answer_score: NDArray[np.float32]
    by_source: I64
    source_start: I64
    image_of: NDArray[np.int32]


def _merge(manifest: Manifest, tables: list[Path], kinds_of: list[list[int]]) -> dict[str, NDArray]:
    """The merged arrays. kinds_of: for each shard, the sources of its table as the manifest's."""
    parts = [open_table(path) for path in tables]

    def cat(name: str) -> NDArray:
        return np.concatenate([getattr(t, name) for t in parts])

    def chain(name: str) -> I64:
        """Concatenate range starts (length n + 1 each), shifted to be global."""
        out, base = [np.zeros(1, dtype=np.int64)], 0
        for t in parts:
            out.append(getattr(t, name)[1:] + base)
            base += int(getattr(t, name)[-1])
        return np.concatenate(out)

    def starts(counts: list[int]) -> I64:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    images = starts([s.images for s in manifest.shards])
    pairs = starts([s.pairs for s in manifest.shards])
    numbers = [np.asarray(kinds, dtype=np.uint8) for kinds in kinds_of]
    source = np.concatenate(
        [number[t.sentence_source] for number, t in zip(numbers, parts, strict=True)]
    )
    shard_of = np.repeat(np.arange(len(parts)), np.diff(pairs))
    by_source = np.lexsort((source, shard_of)).astype(np.int64)
    kinds = len(manifest.sources)
    cell = np.bincount(shard_of * kinds + source, minlength=len(parts) * kinds)
    source_start = starts(list(cell))[:-1].reshape(len(parts), kinds)
    image_pair = chain("image_sentences")
    index = DatasetIndex(
        shard_image=images,
        shard_pair=pairs,
        image_objects=cat("image_objects"),
        features_offset=cat("features_offset"),
        boxes_offset=cat("boxes_offset"),
        labels_offset=cat("labels_offset")
        if manifest.schema.labels
        else np.zeros(0, dtype=np.int64),
        record_offset=cat("record_offset"),
        record_size=cat("record_size"),
        image_pair=image_pair,
        source=source,
        token_start=chain("token_start"),
        tokens=cat("tokens"),
        answer_start=chain("answer_start"),
        answer_id=cat("answer_id"),
        answer_score=cat("answer_score"),
        by_source=by_source,
        source_start=np.ascontiguousarray(source_start),
        image_of=np.repeat(np.arange(len(image_pair) - 1, dtype=np.int32), np.diff(image_pair)),
    )
    return dict(vars(index))


def ranges(start: I64, length: I64) -> I64:
    """The concatenation of [start, start + length) for all rows: gathers ragged rows at once."""
    total = int(length.sum())
    ends = np.cumsum(length)
    return np.arange(total) - np.repeat(ends - length, length) + np.repeat(start, length)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set to open: its folder or URL, and its share of the pairs against the others'."""

    url: str
    weight: float | None = None


@dataclass(frozen=True)
class Dataset:
    """Opened data sets, as one. `manifest` is that of all `manifests`; `shard_ranges` says whose
    shards are whose.

    `manifest` and `index` cost a few kilobytes and mapped pages.
    """

    specs: tuple[DatasetSpec, ...]
    manifests: list[Manifest]
    manifest: Manifest
    shard_ranges: tuple[ShardRange, ...]
    index: DatasetIndex
    shards: ShardFiles
    cache: Path

    def __reduce__(self) -> Any:
        # Another process maps the files itself, and does not need the store for what is here.
        return _open, (self.manifests, self.specs, self.cache, self.shards.limit)

    @property
    def url(self) -> str:
        """The folder or URL; of several, all."""
        return " + ".join(p.url for p in self.specs)

    def tar(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, verified and memory-mapped on first use."""
        return self.shards.tar(shard)

    def sampler(self, settings: SamplerSettings, seed: int) -> Sampler:
        """The sampler over all pairs of the data. Raises DataError where the settings ask for
        pairs that there are none of."""
        manifest = self.manifest
        contents = Contents(
            [s.pairs_per_source for s in manifest.shards],
            manifest.sources,
            manifest.question_sources,
            self.shard_ranges,
        )
        return make_sampler(settings, seed, contents)

    # --- where things are -----------------------------------------------------------------------

    def pairs_of(self, streams: Sequence[Stream], plan: Plan) -> I64:
        """The global pair ids of a plan."""
        if len(streams) == 1 and len(streams[0].sources) == len(self.manifest.sources):
            return self.index.shard_pair[plan.shard] + plan.index
        out = np.empty(len(plan), dtype=np.int64)
        for i in np.unique(plan.stream).tolist():
            rows = np.flatnonzero(plan.stream == i)
            out[rows] = self._pairs_in(streams[i], plan.shard[rows], plan.index[rows])
        return out

    def _pairs_in(self, stream: Stream, shard: I64, index: I64) -> I64:
        m = self.index
        if len(stream.sources) == len(self.manifest.sources):
            return m.shard_pair[shard] + index
        # The index counts through the stream's sources one after the other.
        out, left = np.empty_like(shard), np.ones(len(shard), dtype=bool)
        for s in stream.sources:
            size = self._source_sizes[shard, s]
            here = left & (index < size)
            out[here] = m.by_source[(m.source_start[shard, s] + index)[here]]
            left &= ~here
            index = np.where(left, index - size, index)
        return out

    @cached_property
    def _source_sizes(self) -> I64:
        flat = np.append(self.index.source_start.reshape(-1), len(self.index.source))
        return np.diff(flat).reshape(self.index.source_start.shape)

    def image_of(self, pair: I64) -> I64:
        return self.index.image_of[pair].astype(np.int64)

    def shard_of_image(self, image: I64) -> I64:
        return np.searchsorted(self.index.shard_image, image, side="right") - 1

    @cached_property
    def dataset_pairs(self) -> I64:
        """First pair of each part, and the number of all: i64 (parts + 1,)."""
        edges = [p.begin for p in self.shard_ranges] + [len(self.manifest.shards)]
        return self.index.shard_pair[np.asarray(edges)]

    @cached_property
    def images_with_sentences(self) -> list[tuple[str, int]]:
        """(name, images that have pairs) of each part, counting no further than two."""
        of, edges = self.index.image_of, self.dataset_pairs.tolist()
        return [
            (part.name, len({int(of[a]), int(of[b - 1])}) if b > a else 0)
            for part, a, b in zip(self.shard_ranges, edges[:-1], edges[1:], strict=True)
        ]

    # --- gathers --------------------------------------------------------------------------------

    def gather_images(
        self, images: I64, shards: I64, features: NDArray[np.float16]
    ) -> tuple[NDArray[np.float32], tuple[NDArray, ...] | None]:
        """Copy the features of images, which lie in `shards`, into `features`,
        (images, objects, feature_dim), zero-padded.

        Returns boxes, (images, objects, 4) f32, and with labels object ids and confidences,
        attribute ids and confidences, each (images, objects), i64 or f32; zero-padded, too.
        """
        m, labelled = self.index, self.manifest.schema.labels
        count, objects, dim = features.shape
        row = dim * 2
        held = m.image_objects[images].astype(np.int64)
        small = np.zeros((2 if labelled else 1, count, objects * 16), dtype=np.uint8)
        boxes_out = small[0].reshape(-1).data
        labels_out = small[-1].reshape(-1).data
        flat = features.reshape(-1).view(np.uint8)
        out, wide, narrow = flat.data, objects * row, objects * 16
        labels_at = m.labels_offset[images].tolist() if labelled else [0] * count
        rows = zip(
            shards.tolist(),
            m.features_offset[images].tolist(),
            m.boxes_offset[images].tolist(),
            labels_at,
            held.tolist(),
            range(0, count * wide, wide) if wide else [0] * count,
            range(0, count * narrow, narrow) if narrow else [0] * count,
            strict=True,
        )
        tars = {s: self.shards.tar(s).data for s in set(shards.tolist())}
        for shard, feature_at, box_at, label_at, n, to, small_to in rows:
            tar = tars[shard]
            end = to + n * row
            out[to:end] = tar[feature_at : feature_at + n * row]
            if n < objects:
                flat[end : to + wide] = 0
            boxes_out[small_to : small_to + n * 16] = tar[box_at : box_at + n * 16]
            if labelled:
                labels_out[small_to : small_to + n * 16] = tar[label_at : label_at + n * 16]
        boxes = small[0].view(np.float32).reshape(count, objects, 4)
        return boxes, _labels(small[1], held, objects) if labelled else None

    def gather_objects(self, images: I64, shards: I64, objects: I64) -> NDArray[np.float16]:
        """Single objects' features, (n, feature_dim): object `objects[i]` of `images[i]`, which
        lies in `shards[i]`."""
        size = self.manifest.schema.feature_dim * 2
        out = np.empty((len(images), self.manifest.schema.feature_dim), dtype=np.float16)
        to = out.reshape(-1).view(np.uint8).data
        offsets = (self.index.features_offset[images] + objects * size).tolist()
        tars = {s: self.shards.tar(s).data for s in set(shards.tolist())}
        for i, (shard, at) in enumerate(zip(shards.tolist(), offsets, strict=True)):
            to[i * size : (i + 1) * size] = tars[shard][at : at + size]
        return out

    def answers(self) -> list[str]:
        """The answer table: the answer of each id."""
        return list(json.loads(self.file(self.manifest.answers).read_text()))

    def file(self, info: FileInfo) -> Path:
        """A verified local copy of the vocabulary or the answer table."""
        url = objects.join(self.specs[0].url, info.file)
        return local_file(url, info.sha256, info.size, self.cache, table=True)

    def record(self, image: int) -> bytes:
        """The JSON of an image record."""
        at, size = int(self.index.record_offset[image]), int(self.index.record_size[image])
        shard = int(self.shard_of_image(np.asarray([image]))[0])
        return self.tar(shard)[at : at + size].tobytes()


def _labels(raw: NDArray[np.uint8], held: I64, objects: int) -> tuple[NDArray, ...]:
    """Label payloads, (images, objects * 16) bytes: four columns of `held` values in each row."""
    count = len(raw)
    words = raw.view(np.int32).reshape(-1)
    if (held == objects).all():
        columns = words.reshape(count, 4, objects).transpose(1, 0, 2)
    else:
        column = np.arange(objects)
        inside = column < held[:, None]
        start = np.arange(count)[:, None] * (4 * objects) + column
        at = [np.where(inside, start + k * held[:, None], 0) for k in range(4)]
        columns = np.stack([np.where(inside, words[a], 0) for a in at])
    found: list[NDArray] = []
    for k in range(4):
        column_k = np.ascontiguousarray(columns[k])
        found.append(column_k.astype(np.int64) if k % 2 == 0 else column_k.view(np.float32))
    return tuple(found)


def open_dataset(
    specs: str | Sequence[DatasetSpec],
    cache: str | Path | None = None,
    limit: int | None = None,
) -> Dataset:
    """Open a data set, or several to be mixed; tables are fetched and merged on the node's first
    call. limit: bytes that the node's cache of remote shards may hold.

    Raises DataError naming the file when a manifest or a table is missing or damaged, and when
    data sets do not fit together.
    """
    if isinstance(specs, str):
        specs = (DatasetSpec(specs),)
    folder = Path(cache) if cache else default_cache()
    return _open([load_manifest(p.url) for p in specs], tuple(specs), folder, limit)


def _open(
    manifests: list[Manifest], specs: tuple[DatasetSpec, ...], folder: Path, limit: int | None
) -> Dataset:
    """What `open_dataset` does once it has the manifests: what is in the cache is not asked for."""
    manifest = _combine(manifests, specs)
    urls = [p.url for p, m in zip(specs, manifests, strict=True) for _ in m.shards]
    path = folder / f"merged-{manifest.fingerprint}-{_LAYOUT}.safetensors"

    def build(temporary: Path) -> None:
        def fetch(url: str, s: ShardInfo) -> Path:
            where = objects.join(url, s.table)
            return local_file(where, s.table_sha256, s.table_size, folder, table=True)

        with ThreadPoolExecutor(_TABLES_AT_ONCE, "lxscale-tables") as pool:
            tables = list(pool.map(fetch, urls, manifest.shards))
        kinds = [
            [manifest.sources.index(s) for s in m.sources] for m in manifests for _ in m.shards
        ]
        save_arrays(temporary, _merge(manifest, tables, kinds))

    write_once(path, build)
    ends = np.cumsum([len(m.shards) for m in manifests]).tolist()
    shard_ranges = tuple(
        ShardRange(m.name, end - len(m.shards), end, p.weight)
        for p, m, end in zip(specs, manifests, ends, strict=True)
    )
    files = [
        ShardFile(objects.join(url, s.name), s.sha256, s.size)
        for url, s in zip(urls, manifest.shards, strict=True)
    ]
    index = DatasetIndex(**map_arrays(path))
    shards = ShardFiles(files, folder, limit)
    return Dataset(specs, manifests, manifest, shard_ranges, index, shards, folder)


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
            ("use of labels", schema.labels, m.schema.labels),
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
        shards=tuple(s for m in manifests for s in m.shards),
    )
