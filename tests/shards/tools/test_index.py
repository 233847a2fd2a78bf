"""Tars of others, trained on where they are."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli.main import main
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.format.arrays import map_arrays, save_arrays
from shards.format.build import build
from shards.format.clean import clean, leftovers
from shards.format.manifest import MANIFEST, load_manifest
from shards.format.record import ImageRecord, Report
from shards.format.shard_list import ShardList
from shards.format.table import check_table, open_table
from shards.format.verify import verify
from shards.store import objects
from shards.store.stored import hash_file
from shards.tools.filters import Filter
from shards.tools.index import Indexing, index
from shards.tools.merge import merge
from shards.tools.migrate import migrate
from shards.tools.rewriting import Rewriting
from shards.tools.subset import Choice, subset
from shards.tools.transfer import transfer
from shards.webdataset import as_webdataset
from tests.conftest import contents, small_records, upload_set
from tests.shards.tools.sets import (
    SETTINGS,
    foreign_members,
    npy,
    renamed,
    run,
    summary,
    with_words_of,
    write_foreign,
    write_tar,
)

HOW = Indexing("foreign", "test", vocab_size=200)


def gathered(data: Dataset) -> tuple[Any, ...]:
    """All that a step reads of a data set, image by image."""
    images = np.arange(data.manifest.images)
    shards, count = data.shard_of_image(images), data.manifest.schema.max_objects
    features = np.empty((len(images), count, data.manifest.schema.feature_dim), dtype=np.float16)
    columns = data.gather_images(images, shards, features)
    single = data.gather_objects(images, shards, np.zeros_like(images))
    m = data.index
    words = [m.tokens[a:b].tolist() for a, b in zip(m.token_start, m.token_start[1:], strict=False)]
    answers = m.answer_start, m.answer_id, m.answer_score
    return features, columns, single, words, m.source, *answers, data.answers()


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_equal(a, b)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "npy"])
def test_it_reads_as_a_build_of_the_same_records(tmp_path: Path, raw: bool) -> None:
    records, place = small_records(9), tmp_path / "theirs"
    write_foreign(place, records, raw)
    theirs = {p.name: p.read_bytes() for p in place.iterdir()}
    made = index(str(place), HOW)
    assert {p.name: p.read_bytes() for p in place.glob("*.tar")} == theirs
    assert verify(place) == [] and made == load_manifest(str(place))
    built = build(records, tmp_path / "built", with_words_of(place, name="foreign"))
    assert summary(made) == summary(built)
    one, two = (open_dataset(str(p), cache=tmp_path / "c") for p in (place, tmp_path / "built"))
    assert_same(gathered(one), gathered(two))
    assert json.loads(one.record(3))["image"] == records[3].image


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "npy"])
def test_it_is_looked_at(
    tmp_path: Path, raw: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LXSCALE_CACHE", str(tmp_path / "cache"))
    records, place = small_records(9), tmp_path / "theirs"
    write_foreign(place, records, raw)
    index(str(place), HOW)
    assert main(["shards", "inspect", str(place), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9
    assert main(["shards", "dump", str(place), "0:2", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == records[2].image
    with pytest.raises(DataError, match="is an index of tars that others wrote"):
        as_webdataset(str(place))


def test_in_a_store(tmp_path: Path, s3: str) -> None:
    place = f"{s3}/{tmp_path.name}"
    write_foreign(tmp_path / "theirs", small_records(6))
    upload_set(tmp_path / "theirs", place)
    assert run("index", place, "--vocab-size", "200", "--quiet", "--name", "x") == 0
    assert verify(place) == []
    data = open_dataset(place, cache=tmp_path / "c")
    assert gathered(data)[0].any() and data.manifest.images == 6


def test_tools_take_it(tmp_path: Path) -> None:
    records, place = small_records(9), tmp_path / "theirs"
    write_foreign(place, records)
    index(str(place), HOW)
    # Written anew, it is a build; copied, it stays as it is.
    subset(str(place), str(tmp_path / "own"), Choice(), Rewriting("own", images_per_shard=4))
    cleaned = [
        replace(
            r, sentences=tuple(replace(s, answers=s.answers or {}, id=None) for s in r.sentences)
        )
        for r in records
    ]
    build(cleaned, tmp_path / "built", with_words_of(place, name="own"))
    assert contents(tmp_path / "own") == contents(tmp_path / "built")
    transfer(str(place), str(tmp_path / "copy"))
    assert verify(tmp_path / "copy") == []
    assert (
        load_manifest(str(tmp_path / "copy")).fingerprint == load_manifest(str(place)).fingerprint
    )
    assert migrate(str(place), str(tmp_path / "no")) is None
    build(renamed(small_records(5), "b"), tmp_path / "b", SETTINGS)
    made = merge([str(tmp_path / "b"), str(place)], str(tmp_path / "both"), "both")
    assert made.images == 14 and verify(tmp_path / "both") == []
    some = Choice(Filter(images=frozenset({records[1].image})))
    assert subset(str(place), str(tmp_path / "one"), some, Rewriting("one")).images == 1


# --- what is the owner's ------------------------------------------------------------------------


def test_clean_never_takes_a_tar_of_the_owner(tmp_path: Path) -> None:
    place = tmp_path / "theirs"
    write_foreign(place, small_records(8))
    for name in ("vocab.txt", "answers.json", "shard-000009.table.safetensors", "index-1.txt"):
        (place / name).write_bytes(b"the owner's")
    theirs = {p.name: p.read_bytes() for p in place.iterdir()}

    def is_theirs() -> bool:
        return {n: (place / n).read_bytes() for n in theirs} == theirs

    first = index(str(place), HOW)
    assert leftovers(str(place)).objects == []
    with pytest.raises(DataError, match=r"there is a data set at .*--overwrite"):
        index(str(place), HOW)
    second = index(str(place), replace(HOW, vocab_size=100), overwrite=True)
    old = {first.vocab.file, first.answers.file, *(s.table for s in first.shards)}
    assert {o.name for o in leftovers(str(place)).objects} == old
    clean(str(place), leftovers(str(place)))
    assert verify(place) == [] and is_theirs()
    # Replaced by a build, and with no manifest at all.
    build(small_records(3), place, replace(SETTINGS, overwrite=True))
    old = {second.vocab.file, second.answers.file, *(s.table for s in second.shards)}
    assert {o.name for o in leftovers(str(place)).objects} == old
    (place / MANIFEST).unlink()
    clean(str(place), leftovers(str(place)))
    assert is_theirs() and not [p for p in place.iterdir() if p.name.startswith("index-a")]
    assert sorted(theirs) == sorted(p.name for p in place.iterdir() if p.name != MANIFEST)


def test_one_that_fails_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", small_records(6))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="vocabulary of 3 tokens"):
        index(str(tmp_path / "theirs"), replace(HOW, vocab_size=3))
    assert sorted(tmp_path.rglob("*")) == before


# --- what cannot be used in place ---------------------------------------------------------------


def _without(name: str) -> Callable[[ImageRecord, dict[str, bytes]], None]:
    return lambda _, members: members.pop(name) and None


def _json(**changes: Any) -> Callable[[ImageRecord, dict[str, bytes]], None]:
    def change(_: ImageRecord, members: dict[str, bytes]) -> None:
        members["json"] = json.dumps(json.loads(members["json"]) | changes).encode()

    return change


def _array(name: str, make: Callable[[ImageRecord], np.ndarray]) -> Any:
    return lambda record, members: members.__setitem__(f"{name}.npy", npy(make(record)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_array("boxes", lambda r: r.boxes * 640), r"boxes.npy: boxes are not in 0..1"),
        (_array("boxes", lambda r: r.boxes.astype("f8")), r"boxes.npy: its values are float64"),
        (_array("features", lambda r: r.features.astype("f4")), r"features.npy: .* float32 where"),
        (_array("features", lambda r: r.features.astype(">f2")), r"its values are >f2 where"),
        (_array("features", lambda r: np.asfortranarray(r.features)), r"npy: its shape is"),
        (_array("features", lambda r: r.features[:, :3]), r"features.npy: .* bytes of features"),
        (_array("features", lambda r: r.features[:-1]), r"features.npy: .* bytes of features"),
        (_array("features", lambda r: r.features * np.float16(np.nan)), r"not finite"),
        (lambda _, m: m.__setitem__("features.npy", m["features.npy"][:-1]), r"not of shape"),
        (lambda _, m: m.__setitem__("features.npy", b"\x93NUMPY\x01"), r"npy: it is no .npy"),
        (_without("features.npy"), r"it has no features.f16 or features.npy"),
        (_without("json"), r"it has no json"),
        (lambda _, m: m.__setitem__("json", b"[" * 100_000), r"004"),
        (_json(image=None), r'json: it has no "image"'),
        (_json(width=0), r'json: its "width" is no number'),
        (_json(num_objects=77), r"json: num_objects is not"),
        (_json(sentences=[{"text": "a"}]), r"sentence 0 has no source"),
        (_json(sentences=[{"text": " ", "source": "x"}]), r"sentence 0 has no text"),
        (_json(image="pictures/image 1.png"), r"image 'pictures/image 1.png' .* is in .*, too"),
        (_json(image="\ud800"), r"004"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_in_place_is_named(
    tmp_path: Path, change: Callable[[ImageRecord, dict[str, bytes]], None], message: str
) -> None:
    samples = []
    records = [r for r in small_records(12) if len(r.boxes) > 1]
    for i, record in enumerate(records[:6]):
        members = foreign_members(record)
        if i == 4:
            before = dict(members)
            change(record, members)
            assert members != before
        samples.append((f"{i:03d}", members))
    samples[1][1]["json"] = samples[1][1]["json"].replace(
        records[1].image.encode(), b"pictures/image 1.png"
    )
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=message) as error:
        index(str(tmp_path), HOW)
    assert "a.tar" in str(error.value) and len(str(error.value)) < 600
    assert "shards build" in str(error.value) or "too: each may come once" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_damaged_tars_and_odd_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .tar at"):
        index(str(tmp_path), HOW)
    write_foreign(tmp_path / "x", small_records(6))
    tar = tmp_path / "x" / "shard-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"shard-000001.tar: it is .*; copy it again"):
        index(str(tmp_path / "x"), HOW)
    tar.write_bytes(whole)
    tar.rename(tmp_path / "x" / "a b.tar")
    with pytest.raises(DataError, match=r"'a b.tar' is not a plain file name: give it another"):
        index(str(tmp_path / "x"), HOW)
    (tmp_path / "x" / "a b.tar").rename(tmp_path / "x" / "._b.tar")
    report = Report()
    empty = foreign_members(small_records(7)[6])
    empty["json"] = json.dumps(json.loads(empty["json"]) | {"sentences": []}).encode()
    write_tar(tmp_path / "x" / "c.tar", [("z", empty)], tarfile.GNU_FORMAT)
    made = index(str(tmp_path / "x"), HOW, report=report)
    assert [s.name for s in made.shards] == ["shard-000000.tar"] and verify(tmp_path / "x") == []
    assert report.counts == {"samples without sentences": 1}


# --- tables -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("indexed") / "theirs"
    write_foreign(place, small_records(8))
    index(str(place), HOW)
    return place


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features_offset", lambda a, t: a.__setitem__(1, t["boxes_offset"][1])),
        ("features_offset", lambda a, t: a.__setitem__(1, t["features_offset"][0])),
        ("features_offset", lambda a, t: a.__setitem__(1, a[1] + 1)),
        ("features_offset", lambda a, t: a.__setitem__(3, 1 << 40)),
        ("boxes_offset", lambda a, t: a.__setitem__(0, 16)),
        ("boxes_offset", lambda a, t: a.__setitem__(0, a[0] + 2)),
        ("record_offset", lambda a, t: a.__setitem__(2, t["record_offset"][3])),
        ("sample_offset", lambda a, t: a.__setitem__(1, a[2])),
        ("sample_offset", lambda a, t: a.__setitem__(0, -(1 << 62))),
        ("sample_offset", lambda a, t: a.__setitem__(3, 1 << 62)),
        ("sample_offset", lambda a, t: a.__setitem__(2, a[2] + 8)),
        ("image_objects", lambda a, t: a.__setitem__(0, a[0] + 1)),
    ],
)
def test_a_wrong_table_under_a_right_hash(
    indexed: Path, tmp_path: Path, name: str, change: Callable[..., None]
) -> None:
    """What can be in no tar is refused when a data set is opened, and verify finds it."""
    place = tmp_path / "x"
    shutil.copytree(indexed, place)
    manifest = load_manifest(str(place))
    info = manifest.shards[1]
    table = place / info.table
    arrays = {n: a.copy() for n, a in map_arrays(table).items()}
    before = {n: a.copy() for n, a in arrays.items()}
    change(arrays[name], before)
    assert not np.array_equal(arrays[name], before[name])
    table.unlink()
    save_arrays(table, arrays)
    info = replace(info, table_sha256=hash_file(table), table_size=table.stat().st_size)
    shards = ShardList.of([manifest.shards[0], info], manifest.sources)
    (place / MANIFEST).write_bytes(replace(manifest, shards=shards).to_json())
    assert verify(place)
    with pytest.raises(DataError, match=info.table):
        check_table(open_table(table), info, manifest, str(table))


def test_verify_finds_a_sample_that_the_table_lacks(indexed: Path, tmp_path: Path) -> None:
    place = tmp_path / "x"
    shutil.copytree(indexed, place)
    manifest = load_manifest(str(place))
    tar, info = place / "shard-000001.tar", manifest.shards[1]
    more = tmp_path / "more.tar"
    write_tar(more, [("zz", foreign_members(small_records(20)[19]))])
    content = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(content + bytes(-len(content) % 512) + more.read_bytes())
    info = replace(info, sha256=hash_file(tar), size=tar.stat().st_size)
    shards = ShardList.of([manifest.shards[0], info], manifest.sources)
    (place / MANIFEST).write_bytes(replace(manifest, shards=shards).to_json())
    assert any("differs from what is in it" in problem for problem in verify(place))


def test_no_table_of_a_build_is_read_more_loosely(tmp_path: Path) -> None:
    manifest = build(small_records(3), tmp_path / "own", SETTINGS)
    table = Path(manifest.place(str(tmp_path / "own"))) / manifest.shards[0].table
    arrays = dict(map_arrays(table))
    arrays["features_offset"] = arrays["features_offset"] + 2
    copy = tmp_path / "t.safetensors"
    save_arrays(copy, arrays)
    with pytest.raises(DataError, match=r"no multiple of 512"):
        check_table(open_table(copy), manifest.shards[0], manifest, "t")


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "x", small_records(6))
    (tmp_path / "answers.json").write_text('["red", "green"]')
    line = (tmp_path / "x", "--answers", tmp_path / "answers.json", "--json", "--quiet")
    assert run("index", *line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 6 and told["name"] == "x" and told["shards"] == 2
    assert list(told["left_out"]) == ["answers that are not in the answer table"]
    assert objects.exists(str(tmp_path / "x" / MANIFEST))
