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

import webdataset

from shards.errors import DataError
from shards.format.features import as_numbers
from shards.format.manifest import Schema, load_manifest
from shards.format.members import FEATURES, FEATURES_OF, MEMBERS, RECORD, members_of
from shards.format.publish import is_index
from shards.sources import tars
from shards.store.cache import cache_folder, local_file
from shards.store.locks import open_shared
from shards.store.stored import StoredFile

_SUFFIXES = frozenset(m.suffix for m in (*MEMBERS, *FEATURES_OF.values()))


class Records(webdataset.DataPipeline, webdataset.FluidInterface):
    """A pipeline of records on which `.map`, `.shuffle`, `.batched` and the like go on."""


def as_webdataset(url: str, cache: str | Path | None = None, *, shuffle: int = 0) -> Records:
    """The records of the data set at `url` (a folder or s3:// prefix), each a dict of

        __key__, __url__                 name in its shard, and the shard
        image, width, height             id in the source; size in pixels
        boxes                            f32 (n, 4): x1 y1 x2 y2 over width and height, 0..1
        features                         f16 or f32 (n, feature_dim)
        object_id, attribute_id          i32 (n,) and
        object_conf, attribute_conf      f32 (n,): only in data sets with labels
        sentences                        dicts of text, source, id, kind and answers (if any):
                                         {answer: score}
        sides, pictures                  only in records of two images: u8 (n,), which of them an
                                         object is of; their ids and sizes
        split                            only where the source said it

    cache: folder of the node's cache for remote shards (default: as every command's).
    shuffle: each record is drawn from so many that are read ahead, and shards are taken in random
    order, another one in each epoch and process.
    `.batched` stacks arrays, for which all n must be the same; `.listed` does not.
    Of N nodes or loader workers each takes every N-th shard (webdataset's split_by_node and
    split_by_worker); where there are more of them than shards, some get nothing.
    Raises DataError naming the object where the manifest, or later a shard, is absent or damaged.
    """
    manifest = load_manifest(url)
    if is_index(manifest):
        raise DataError(
            f"{url} is an index of tars that others wrote: read them with webdataset itself, or "
            "copy them to a data set of our own with `lxscale shards subset`"
        )
    shards = {file.url: file for file in (s.tar_at(manifest.place(url)) for s in manifest.shards)}
    folder = cache_folder(cache)
    return Records(
        webdataset.SimpleShardList(list(shards)),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.shuffle(len(shards), initial=len(shards)) if shuffle else None,
        partial(_records, shards=shards, schema=manifest.schema, cache=folder),
        webdataset.shuffle(shuffle, initial=shuffle) if shuffle else None,
    )


def _records(
    places: Iterable[Mapping[str, str]],
    shards: Mapping[str, StoredFile],
    schema: Schema,
    cache: Path,
) -> Iterator[dict[str, Any]]:
    """The records of the shards whose URLs come in."""
    for place in places:
        url, f = place["url"], None
        while f is None:  # evicted before it was opened: fetched again
            f = open_shared(local_file(shards[url], cache))
        with f:
            for sample in tars.samples(f, _SUFFIXES.__contains__):
                try:
                    decoded = _decoded(sample.members, schema)
                except (KeyError, ValueError) as error:
                    raise DataError(
                        f"{url}: record {sample.key:.80} is not as the manifest says ({error}): "
                        "`lxscale shards verify` says what is damaged"
                    ) from None
                yield {"__key__": sample.key, "__url__": url, **decoded}


def _decoded(members: Mapping[str, bytes], schema: Schema) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(members[RECORD.suffix])
    n = record.pop("num_objects")
    for member in members_of(schema):
        if member is not RECORD:
            value = member.value(members[member.suffix], n, schema)
            columns = vars(value) if member.holder else {member.name: value}
            if member.name == FEATURES.name:
                columns = {member.name: as_numbers(value)}
            # Copies: tensors are made of arrays that may be written to.
            record |= {name: column.copy() for name, column in columns.items()}
    return record
