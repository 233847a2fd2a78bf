"""Our data sets as a webdataset pipeline, for training loops of one's own.

    import torch, webdataset
    from shards.webdataset import as_webdataset

    records = as_webdataset("s3://bucket/lxmert/train", shuffle=1000).map(my_function)
    loader = webdataset.WebLoader(records.batched(32), batch_size=None, num_workers=4)

What lxscale's own training has, this has not: an exact order that any number of workers shares,
resuming, pairs instead of images, tokens. A shard is fetched into the node's cache and its hash is
checked before its first record is used; nothing in it is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from shards.format.manifest import ShardInfo, load_manifest
from shards.format.record import labels_from_bytes
from shards.sources import tars
from shards.store import objects
from shards.store.cache import local_file
from shards.store.locks import open_shared

_MEMBERS = frozenset({"json", "boxes.f32", "features.f16", "labels.bin"})


class Records(webdataset.DataPipeline, webdataset.FluidInterface):
    """A pipeline of records on which `.map`, `.shuffle`, `.batched` and the like go on."""


def as_webdataset(url: str, cache: str | Path | None = None, *, shuffle: int = 0) -> Records:
    """The records of the data set at `url` (a folder or s3:// prefix), each a dict of

        __key__, __url__                 name in its shard, and the shard
        image, width, height             id in the source; size in pixels
        boxes                            f32 (n, 4): x1 y1 x2 y2 over width and height, 0..1
        features                         f16 (n, feature_dim)
        object_id, attribute_id          i32 (n,) and
        object_conf, attribute_conf      f32 (n,): only in data sets with labels
        sentences                        dicts of text, source, id (if any), answers (if any):
                                         {answer: score}
        split                            only where the source said it

    cache: folder of the node's cache for remote shards (default: as every command's).
    shuffle: each record is drawn from so many that are read ahead, and shards are taken in random
    order, another one in each epoch and process.
    `.batched` stacks arrays, for which all n must be the same; `.listed` does not.
    Nodes and loader workers take every so-manieth shard (webdataset's split_by_node and
    split_by_worker): where they are more than the shards, some get nothing.
    Raises DataError naming the object where the manifest, or later a shard, is absent or damaged.
    """
    shards = {objects.join(url, s.name): s for s in load_manifest(url).shards}
    return Records(
        webdataset.SimpleShardList(list(shards)),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.shuffle(len(shards), initial=len(shards)) if shuffle else None,
        partial(_records, shards=shards, cache=cache),
        webdataset.shuffle(shuffle, initial=shuffle) if shuffle else None,
    )


def _records(
    places: Iterable[Mapping[str, str]], shards: Mapping[str, ShardInfo], cache: str | Path | None
) -> Iterator[dict[str, Any]]:
    """The records of the shards whose URLs come in."""
    for place in places:
        url, f = place["url"], None
        shard = shards[url]
        while f is None:  # evicted before it was opened: fetched again
            f = open_shared(local_file(url, shard.sha256, shard.size, cache))
        with f:
            for sample in tars.samples(f, _MEMBERS.__contains__):
                yield {"__key__": sample.key, "__url__": url, **_decoded(sample.members)}


def _decoded(members: Mapping[str, bytes]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(members["json"])
    n = record.pop("num_objects")
    # Copies: tensors are made of arrays that may be written to.
    record["boxes"] = np.frombuffer(members["boxes.f32"], "<f4").reshape(n, 4).copy()
    record["features"] = np.frombuffer(members["features.f16"], "<f2").reshape(n, -1).copy()
    if "labels.bin" in members:
        labels = labels_from_bytes(members["labels.bin"], n)
        record |= {name: column.copy() for name, column in vars(labels).items()}
    return record
