"""Our data sets as a webdataset pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.manifest import MANIFEST, load_manifest
from shards.format.record import ImageRecord
from shards.webdataset import as_webdataset
from tests.conftest import files_of, small_records

SETTINGS = BuildSettings("loop", "test", images_per_shard=4)
RECORDS = small_records(30, labels=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build(RECORDS, folder, SETTINGS)
    return folder


def assert_same(found: Mapping[str, Any], record: ImageRecord) -> None:
    assert (found["image"], found["width"], found["height"]) == (record.image, 640, 480)
    np.testing.assert_array_equal(found["boxes"], record.boxes)
    np.testing.assert_array_equal(found["features"], record.features)
    assert (found["boxes"].dtype, found["features"].dtype) == (np.float32, np.float16)
    for name, column in vars(record.labels).items() if record.labels else ():
        np.testing.assert_array_equal(found[name], column)
        assert found[name].dtype == column.dtype
    for given, sentence in zip(found["sentences"], record.sentences, strict=True):
        assert (given["text"], given["source"]) == (sentence.text, sentence.source)
        assert (given.get("id"), given.get("answers")) == (sentence.id, sentence.answers)


def images(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return [r["image"] for r in records]


def test_records_are_those_that_were_built(data: Path) -> None:
    found = list(as_webdataset(str(data)))
    for one, record in zip(found, RECORDS, strict=True):
        assert_same(one, record)
    assert found[0]["__url__"] == f"{files_of(data)}/shard-000000.tar"
    torch.from_numpy(found[0]["features"])[0] = 0.0  # no warning: it may be written to


def test_parts_that_are_not_there_have_no_key(tmp_path: Path) -> None:
    build(small_records(3), tmp_path, SETTINGS)
    for record in as_webdataset(str(tmp_path)):
        assert not {"object_id", "split"} & set(record)


def test_on_s3_through_the_cache(s3: str, tmp_path: Path) -> None:
    build(RECORDS, f"{s3}/loop", SETTINGS)
    for one, record in zip(as_webdataset(f"{s3}/loop", tmp_path), RECORDS, strict=True):
        assert_same(one, record)
    assert len(list((tmp_path / "files").iterdir())) == 8


def test_a_damaged_shard_gives_no_record(tmp_path: Path) -> None:
    build(RECORDS, tmp_path, SETTINGS)
    tar = files_of(tmp_path) / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    found = []
    with pytest.raises(DataError, match=r"shard-000001.tar is damaged"):
        for record in as_webdataset(str(tmp_path)):
            found.append(record["image"])
    assert found == [r.image for r in RECORDS[:4]]


@pytest.mark.parametrize(("start", "shuffle"), [("fork", 0), ("fork", 10), ("spawn", 10)])
def test_loader_workers_share_the_shards(data: Path, start: str, shuffle: int) -> None:
    records = as_webdataset(str(data), shuffle=shuffle).map(dict).listed(5)
    loader = webdataset.WebLoader(
        records, batch_size=None, num_workers=3, multiprocessing_context=start
    )
    batches = list(loader)
    assert max(map(len, batches)) == 5
    assert sorted(i for b in batches for i in images(b)) == sorted(r.image for r in RECORDS)


def test_nodes_share_the_shards(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found: list[str] = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found += images(as_webdataset(str(data), shuffle=10))
    assert sorted(found) == sorted(r.image for r in RECORDS)


def test_shuffling_and_the_methods_of_webdataset(data: Path) -> None:
    records = as_webdataset(str(data), shuffle=100)
    one, other = images(records), images(records)
    assert one != other and set(one) == set(other) == {r.image for r in RECORDS}
    assert len(set(one[:4]) & {r.image for r in RECORDS[:4]}) < 4  # shards, too
    shapes = [s for (s,) in as_webdataset(str(data)).to_tuple("boxes").map_tuple(np.shape)]
    assert shapes == [r.boxes.shape for r in RECORDS]
    few = as_webdataset(str(data)).select(lambda r: r["image"] == RECORDS[3].image).repeat(2)
    assert images(few) == [RECORDS[3].image] * 2


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set at"):
        as_webdataset(str(tmp_path))


def test_records_that_are_not_as_the_manifest_says(tmp_path: Path) -> None:
    """A manifest that is right in itself, of other features than the tars have."""
    build(small_records(3), tmp_path, SETTINGS)
    manifest = load_manifest(str(tmp_path))
    schema = replace(manifest.schema, feature_type="uint8")
    (tmp_path / MANIFEST).write_bytes(replace(manifest, schema=schema).to_json())
    with pytest.raises(DataError, match=r"shard-000000\.tar: record \S+ is not as the manifest"):
        list(as_webdataset(str(tmp_path)))
