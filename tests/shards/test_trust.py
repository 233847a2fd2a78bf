"""Nothing is read that was not checked: derived files, tables and manifests of wrong content."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batch import Batch
from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format import index, shard_list
from shards.format import manifest as manifest_file
from shards.format.arrays import map_arrays, save_arrays
from shards.format.build import BuildSettings, build
from shards.format.manifest import load_manifest
from shards.format.shard_list import ShardList
from shards.order.settings import SamplerSettings
from shards.store.stored import hash_file
from tests.conftest import small_records
from trainer.data.batch import make_batch, settings_of
from trainer.data.digest import digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = BuildSettings("trust", "test", images_per_shard=5)
    build(small_records(12, labels=True), tmp_path / "set", settings)
    return tmp_path


def batches(folder: Path) -> list[Batch]:
    """Some steps of a process that opens the data set, as a training process does."""
    data = open_dataset(str(folder / "set"), folder / "cache")
    sampler = data.sampler(SamplerSettings(window=2), 3)
    drawn = settings_of(data, 3, 0.15, 0.15)
    steps = sampler.steps_ahead(sampler.start(), 8, 64)
    return [make_batch(data, sampler, sampler.plan(step), drawn) for step in steps]


def told(folder: Path) -> list[int]:
    return [digest(batch, 0) for batch in batches(folder)]


def merged(folder: Path) -> Path:
    (path,) = (folder / "cache").glob("merged-*.safetensors")
    return path


def overwrite_tokens(path: Path) -> None:
    arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
    arrays["tokens"][:] = 7
    save_arrays(path, arrays)


def flip_an_offset(path: Path) -> None:
    arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
    arrays["features_offset"][2] ^= 1 << 9
    save_arrays(path, arrays)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [overwrite_tokens, flip_an_offset, cut, Path.unlink])
def test_a_changed_index_is_made_again(folder: Path, change: Callable[[Path], None]) -> None:
    before = told(folder)
    good = merged(folder).read_bytes()
    change(merged(folder))
    assert told(folder) == before
    assert merged(folder).read_bytes() == good


# --- tables -------------------------------------------------------------------------------------


def change_table(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Change a shard's table and vouch for it in the manifest; the table's name."""
    place = folder / "set"
    manifest = load_manifest(str(place))
    shard = manifest.shards[1]
    files = list(place.rglob(shard.table))
    (path,) = files
    arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
    change(arrays)
    save_arrays(path, arrays)
    rows = list(manifest.shards)
    rows[1] = dataclasses.replace(
        shard, table_size=path.stat().st_size, table_sha256=hash_file(path)
    )
    changed = dataclasses.replace(manifest, shards=ShardList.of(rows, manifest.sources))
    (place / "manifest.json").write_bytes(changed.to_json())
    return shard.table


def put(name: str, at: int, value: float) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays[name].__setitem__(at, value)


def long_sentence(arrays: dict[str, Any]) -> None:
    arrays["tokens"] = np.concatenate([arrays["tokens"], np.full(5000, 9, np.uint16)])
    arrays["token_start"][-1] += 5000


def pile_up(arrays: dict[str, Any]) -> None:
    arrays["boxes_offset"][1] = arrays["features_offset"][1]


def lose_a_pair(arrays: dict[str, Any]) -> None:
    arrays["image_objects"] = arrays["image_objects"][:-1]
    for name in ("features_offset", "boxes_offset", "labels_offset", "record_offset"):
        arrays[name] = arrays[name][:-1]
    arrays["record_size"] = arrays["record_size"][:-1]
    cut = int(arrays["image_sentences"][-2])
    arrays["image_sentences"] = arrays["image_sentences"][:-1]
    for name in ("token_start", "answer_start"):
        arrays[name] = arrays[name][: cut + 1]
    arrays["sentence_source"] = arrays["sentence_source"][:cut]
    arrays["tokens"] = arrays["tokens"][: arrays["token_start"][-1]]
    for name in ("answer_id", "answer_score"):
        arrays[name] = arrays[name][: arrays["answer_start"][-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("features_offset", 1, -512), r"features_offset\[1\] is -512"),
        (put("features_offset", 1, 1 << 40), r"features_offset\[1\] is 1099511627776"),
        (put("labels_offset", 2, 513), r"labels_offset\[2\] is 513"),
        (pile_up, r"_offset\[1\] is \d+, which overlaps"),
        (put("image_objects", 0, 10**9), r"image_objects\[0\] is 1000000000, outside of 1\.\.4"),
        (put("image_objects", 0, 0), r"image_objects\[0\] is 0"),
        (put("tokens", 3, 65000), r"tokens\[3\] is 65000, outside"),
        (put("answer_id", 0, 10**6), r"answer_id\[0\] is 1000000, outside"),
        (put("answer_id", 0, -1), r"answer_id\[0\] is -1, outside"),
        (put("answer_score", 0, np.nan), r"answer_score\[0\] is nan, outside"),
        (put("sentence_source", 0, 9), r"sentence_source\[0\] is 9, outside"),
        (put("record_size", 0, -5), r"record_size\[0\] is -5, outside"),
        (put("token_start", 1, -3), "token_start does not rise"),
        (put("answer_start", 1, 10**12), "answer_start does not rise"),
        (put("image_sentences", -1, 3), "image_sentences does not rise"),
        (long_sentence, r"tokens of sentence\[\d+\] is 50\d\d, outside of 0\.\.18"),
        (lose_a_pair, "images and .* pairs, not as the manifest"),
        (lambda a: a.update(tokens=a["tokens"].astype(np.int64)), "tokens has type int64"),
        (lambda a: a.pop("answer_id"), r"missing or unknown arrays \['answer_id'\]"),
        (lambda a: a.update(tokens=a["tokens"][None]), "tokens has shape"),
    ],
)
def test_a_table_of_wrong_numbers_is_one_error(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    name = change_table(folder, change)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(str(folder / "set"), folder / "cache")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not list((folder / "cache").glob("merged-*"))


DEEP = b"[" * 200_000


def test_nested_json_is_one_error(folder: Path) -> None:
    path = folder / "set" / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(b'{"format":' + DEEP)
    with pytest.raises(DataError, match=r"manifest\.json is not a manifest"):
        open_dataset(str(folder / "set"), folder / "cache")
    path.write_bytes(content)
    manifest = load_manifest(str(folder / "set"))
    (table,) = (folder / "set").rglob(manifest.shards[1].table)
    table.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP)
    rows = list(manifest.shards)
    rows[1] = dataclasses.replace(
        rows[1], table_size=table.stat().st_size, table_sha256=hash_file(table)
    )
    changed = dataclasses.replace(manifest, shards=ShardList.of(rows, manifest.sources))
    path.write_bytes(changed.to_json())
    with pytest.raises(DataError, match="is not a whole table"):
        open_dataset(str(folder / "set"), folder / "cache")


@pytest.mark.parametrize("key", ["max_objects", "feature_dim", "max_tokens"])
def test_a_schema_of_impossible_sizes_is_refused_before_memory_is_made(
    folder: Path, key: str
) -> None:
    manifest = load_manifest(str(folder / "set"))
    schema = dataclasses.replace(manifest.schema, **{key: 10**9})
    path = folder / "set" / "manifest.json"
    path.write_bytes(dataclasses.replace(manifest, schema=schema).to_json())
    with pytest.raises(DataError, match=rf"manifest\.schema\.{key} is 1000000000"):
        open_dataset(str(folder / "set"), folder / "cache")


# --- pages --------------------------------------------------------------------------------------


@pytest.fixture
def paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Equal to `folder`, but for that its manifest lists the shards in two pages."""
    monkeypatch.setattr(manifest_file, "INLINE", 1)
    monkeypatch.setattr(manifest_file, "PAGE", 2)
    settings = BuildSettings("trust", "test", images_per_shard=5)
    build(small_records(12, labels=True), tmp_path / "paged" / "set", settings)
    yield tmp_path / "paged"


def pages_of(folder: Path) -> list[Path]:
    return sorted((folder / "set").rglob("shards-*.safetensors"))


def test_a_manifest_in_pages_is_the_same_data_set(folder: Path, paged: Path) -> None:
    one, two = load_manifest(str(folder / "set")), load_manifest(str(paged / "set"))
    assert len(pages_of(paged)) == 2 and two.pages and two.shards == one.shards
    document = json.loads((paged / "set" / "manifest.json").read_text())
    assert [page["count"] for page in document["shards"]["pages"]] == [2, 1]
    assert two.fingerprint == document["fingerprint"] != one.fingerprint
    assert two.to_json() == (paged / "set" / "manifest.json").read_bytes()
    assert told(folder) == told(paged)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "another"])
def test_a_damaged_page_is_one_error(paged: Path, damage: str) -> None:
    first, second = pages_of(paged)
    content = bytearray(first.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        first.write_bytes(content)
    elif damage == "short":
        first.write_bytes(content[:-8])
    elif damage == "gone":
        first.unlink()
    else:
        shutil.copy(second, first)
    for cache in (None, paged / "cache"):
        with pytest.raises(DataError, match=first.name):
            load_manifest(str(paged / "set"), cache)


def test_pages_hold_what_cannot_be_as_little_as_a_manifest(paged: Path) -> None:
    manifest = load_manifest(str(paged / "set"))
    good = manifest.shards

    def changed(**columns: Any) -> None:
        bad = dataclasses.replace(manifest.shards, **columns)
        page = pages_of(paged)[0]
        bad[:2].save_page(page)
        info = dataclasses.replace(
            manifest.pages[0], sha256=hash_file(page), size=page.stat().st_size
        )
        again = dataclasses.replace(manifest, pages=(info, manifest.pages[1]))
        (paged / "set" / "manifest.json").write_bytes(again.to_json())

    for columns, message in (
        ({"name": np.full(3, b"../x", "S99")}, "not a plain file name"),
        ({"table": good.name}, "named twice"),
        ({"pairs": good.pairs + 1}, "do not add up"),
        ({"size": -good.size}, "cannot be"),
    ):
        changed(**columns)
        with pytest.raises(DataError, match=message):
            load_manifest(str(paged / "set"))
        changed()
        assert load_manifest(str(paged / "set")).shards == good


def test_a_long_manifest_is_read_without_an_object_a_shard(tmp_path: Path) -> None:
    """Memory and time of 50,000 shards are those of arrays."""
    script = """
import resource, sys
from shards.format.manifest import load_manifest
import numpy, pydantic, s3fs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(load_manifest(sys.argv[1]).shards) == 50_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    build(small_records(3), tmp_path / "set", BuildSettings("long", "test", images_per_shard=1))
    manifest = load_manifest(str(tmp_path / "set"))
    count, shards = 50_000, manifest.shards[:1]
    columns = {n: np.repeat(getattr(shards, n), count, 0) for n in shard_list._COLUMNS}
    columns["name"] = np.asarray([f"shard-{i:06d}.tar" for i in range(count)], "S")
    columns["table"] = np.asarray([f"shard-{i:06d}.t" for i in range(count)], "S")
    long = ShardList(manifest.sources, **columns)
    totals = dict(zip(manifest.sources, (long.pairs_per_source.sum(0)).tolist(), strict=True))
    counts = manifest_file.Counts(int(long.images.sum()), int(long.pairs.sum()), totals)
    place = tmp_path / "long"
    place.mkdir()
    paged = manifest_file.with_pages(
        dataclasses.replace(manifest, shards=long, counts=counts, folder=""), place
    )
    assert len(paged.pages) == 5
    (place / "manifest.json").write_bytes(paged.to_json())
    assert (place / "manifest.json").stat().st_size < 10_000
    out = subprocess.run(
        [sys.executable, "-c", script, str(place)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 100_000, "KiB"


def test_a_table_that_goes_from_the_cache_meanwhile_is_fetched_again(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lxscale cache clean` has it, beside a run that opens its data."""
    url = f"{s3}/{tmp_path.name}"
    build(small_records(12), url, BuildSettings("set", "test", images_per_shard=4))
    real, gone = index.open_table, set()

    def open_table(path: Path) -> Any:
        if path not in gone:
            gone.add(path)
            path.unlink()
        return real(path)

    monkeypatch.setattr(index, "open_table", open_table)
    for text in ("all", "window"):
        gone.clear()
        data = open_dataset(url, tmp_path / text, text=text)
        sampler = data.sampler(SamplerSettings(), 1)
        plan = sampler.plan(sampler.step(sampler.start(), 8))
        assert len(make_batch(data, sampler, plan, settings_of(data, 1, 0.15, 0.15)).pair_id) == 8
        assert gone


def test_a_table_that_changes_after_it_was_verified_is_fetched_again(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit, or another's file, that comes while others are still fetched."""
    url = f"{s3}/{tmp_path.name}"
    build(small_records(12), url, BuildSettings("set", "test", images_per_shard=4))
    changed: set[Path] = set()

    def changing(read: Callable[[Path], Any], before: bool) -> Callable[[Path], Any]:
        def reading(path: Path) -> Any:
            found = None if before else read(path)
            if path not in changed:
                changed.add(path)
                arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
                arrays["tokens"][:] = 7  # in the vocabulary
                arrays["answer_id"] = arrays["answer_id"][:-1]
                # In place: what is mapped changes, too.
                save_arrays(path.with_name("other"), arrays)
                path.write_bytes(path.with_name("other").read_bytes()[: path.stat().st_size])
            return read(path) if before else found

        return reading

    good = open_dataset(url, tmp_path / "good").index
    for text in ("all", "window"):
        for before in (True, False):
            changed.clear()
            with monkeypatch.context() as patch:
                patch.setattr(index, "open_table", changing(index.open_table, before))
                cache = tmp_path / f"{text}-{before}"
                data = open_dataset(url, cache, text=text).over(np.arange(3))
            assert len(changed) == 3
            for name, value in vars(good).items():
                np.testing.assert_equal(getattr(data.index, name), value, err_msg=name)
