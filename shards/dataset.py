"""A data set as the hot path sees it: flat memory-mapped arrays and gathers, no object a sample.

The shards' tables are merged once per node into one file of global arrays, so that any pair's
tokens, image and answers are found by vector operations. Features stay in the tars, which are
memory-mapped one by one as the order reaches them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import store
from shards.cache import default_cache, local_file, write_once
from shards.manifest import FileInfo, Manifest, load_manifest
from shards.order import I64
from shards.sampler import Plan, Stream
from shards.table import map_arrays, open_table, save_arrays

_LAYOUT = 1  # of the merged table; part of its file name


@dataclass(frozen=True)
class Merged:
    """All tables of a data set, concatenated; I images, S sentences (= pairs), N shards, K sources.

    shard_image i64[N+1], shard_pair i64[N+1]: first image and pair of each shard
    image_objects i32[I]; features_offset, boxes_offset, labels_offset, record_offset,
    record_size i64[I]: in the image's tar; image_pair i64[I+1]: first pair of each image
    source u8[S]; token_start i64[S+1]; tokens; answer_start i64[S+1]; answer_id; answer_score
    by_source i64[S]: pairs sorted by (shard, source, pair); source_start i64[N, K]: where the run
    of a shard and source begins in by_source
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


def _merge(manifest: Manifest, tables: list[Path]) -> dict[str, NDArray]:
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
    source = cat("sentence_source")
    shard_of = np.repeat(np.arange(len(parts)), np.diff(pairs))
    by_source = np.lexsort((source, shard_of)).astype(np.int64)
    kinds = len(manifest.sources)
    cell = np.bincount(shard_of * kinds + source, minlength=len(parts) * kinds)
    source_start = starts(list(cell))[:-1].reshape(len(parts), kinds)
    merged = Merged(
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
        image_pair=chain("image_sentences"),
        source=source,
        token_start=chain("token_start"),
        tokens=cat("tokens"),
        answer_start=chain("answer_start"),
        answer_id=cat("answer_id"),
        answer_score=cat("answer_score"),
        by_source=by_source,
        source_start=np.ascontiguousarray(source_start),
    )
    return dict(vars(merged))


def ranges(start: I64, length: I64) -> I64:
    """The concatenation of [start, start + length) for all rows: gathers ragged rows at once."""
    total = int(length.sum())
    ends = np.cumsum(length)
    return np.arange(total) - np.repeat(ends - length, length) + np.repeat(start, length)


@dataclass(frozen=True)
class Dataset:
    """An opened data set. `manifest` and `merged` cost a few kilobytes and mapped pages."""

    url: str
    manifest: Manifest
    merged: Merged
    cache: Path

    @cached_property
    def _tars(self) -> dict[int, NDArray[np.uint8]]:
        return {}

    def tar(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, verified and memory-mapped on first use."""
        if shard not in self._tars:
            info = self.manifest.shards[shard]
            path = local_file(store.join(self.url, info.name), info.sha256, info.size, self.cache)
            self._tars[shard] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._tars[shard]

    def pairs_of(self, streams: tuple[Stream, ...], plan: Plan) -> I64:
        """The global pair ids of a plan."""
        m = self.merged
        out = np.empty(len(plan), dtype=np.int64)
        for i, stream in enumerate(streams):
            rows = np.flatnonzero(plan.stream == i)
            shard, index = plan.shard[rows], plan.index[rows].copy()
            # The index counts through the stream's sources one after the other.
            left = np.ones(len(rows), dtype=bool)
            for s in stream.sources:
                begin = m.source_start[shard, s]
                size = self._source_sizes[shard, s]
                here = left & (index < size)
                out[rows[here]] = m.by_source[(begin + index)[here]]
                left &= ~here
                index = np.where(left, index - size, index)
        return out

    @cached_property
    def _source_sizes(self) -> I64:
        flat = np.append(self.merged.source_start.reshape(-1), len(self.merged.source))
        return np.diff(flat).reshape(self.merged.source_start.shape)

    def image_of(self, pair: I64) -> I64:
        return np.searchsorted(self.merged.image_pair, pair, side="right") - 1

    def shard_of_image(self, image: I64) -> I64:
        return np.searchsorted(self.merged.shard_image, image, side="right") - 1

    def gather_features(self, images: I64, objects: int) -> NDArray[np.float16]:
        """Features of images, (images, objects, feature_dim), zero-padded."""
        dim = self.manifest.schema.feature_dim
        out = np.empty((len(images), objects, dim), dtype=np.float16)
        flat = out.reshape(len(images), objects * dim).view(np.uint8)
        shards = self.shard_of_image(images)
        offsets = self.merged.features_offset[images]
        sizes = self.merged.image_objects[images].astype(np.int64) * dim * 2
        rows = zip(shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        for i, (shard, offset, size) in enumerate(rows):
            flat[i, :size] = self.tar(shard)[offset : offset + size]
            flat[i, size:] = 0
        return out

    def gather_boxes(self, images: I64, objects: int) -> NDArray[np.float32]:
        """Boxes of images, (images, objects, 4), zero-padded."""
        out = np.zeros((len(images), objects, 4), dtype=np.float32)
        for i, payload in enumerate(self._payloads(images, self.merged.boxes_offset, 16)):
            out[i, : len(payload) // 16] = payload.view(np.float32).reshape(-1, 4)
        return out

    def gather_labels(
        self, images: I64, objects: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """Object ids and confidences, attribute ids and confidences, each (images, objects)."""
        ids = np.zeros((2, len(images), objects), dtype=np.int64)
        confidences = np.zeros((2, len(images), objects), dtype=np.float32)
        for i, payload in enumerate(self._payloads(images, self.merged.labels_offset, 16)):
            columns = payload.reshape(4, -1)
            n = columns.shape[1] // 4
            for k in range(2):
                ids[k, i, :n] = columns[2 * k].view(np.int32)
                confidences[k, i, :n] = columns[2 * k + 1].view(np.float32)
        return ids[0], confidences[0], ids[1], confidences[1]

    def _payloads(self, images: I64, offset: I64, width: int) -> list[NDArray[np.uint8]]:
        sizes = self.merged.image_objects[images].astype(np.int64) * width
        rows = zip(
            self.shard_of_image(images).tolist(),
            offset[images].tolist(),
            sizes.tolist(),
            strict=True,
        )
        return [self.tar(shard)[at : at + size].copy() for shard, at, size in rows]

    def gather_objects(self, images: I64, objects: I64) -> NDArray[np.float16]:
        """Single objects' features, (n, feature_dim): object `objects[i]` of `images[i]`."""
        dim = self.manifest.schema.feature_dim
        out = np.empty((len(images), dim), dtype=np.float16)
        flat = out.view(np.uint8)
        offsets = self.merged.features_offset[images] + objects * dim * 2
        shards = self.shard_of_image(images).tolist()
        for i, (shard, offset) in enumerate(zip(shards, offsets.tolist(), strict=True)):
            flat[i] = self.tar(shard)[offset : offset + dim * 2]
        return out

    def answers(self) -> list[str]:
        """The answer table: the answer of each id."""
        return list(json.loads(self.file(self.manifest.answers).read_text()))

    def file(self, info: FileInfo) -> Path:
        """A verified local copy of the vocabulary or the answer table."""
        return local_file(store.join(self.url, info.file), info.sha256, info.size, self.cache)

    def record(self, image: int) -> bytes:
        """The JSON of an image record."""
        at, size = int(self.merged.record_offset[image]), int(self.merged.record_size[image])
        shard = int(self.shard_of_image(np.asarray([image]))[0])
        return self.tar(shard)[at : at + size].tobytes()


def open_dataset(url: str, cache: str | Path | None = None) -> Dataset:
    """Open a data set; tables are fetched and merged on the node's first call.

    Raises DataError naming the file when the manifest or a table is missing or damaged.
    """
    folder = Path(cache) if cache else default_cache()
    manifest = load_manifest(url)
    path = folder / f"merged-{manifest.fingerprint}-{_LAYOUT}.safetensors"

    def build(temporary: Path) -> None:
        tables = [
            local_file(store.join(url, s.table), s.table_sha256, s.table_size, folder)
            for s in manifest.shards
        ]
        save_arrays(temporary, _merge(manifest, tables))

    write_once(path, build)
    return Dataset(url, manifest, Merged(**map_arrays(path)), folder)
