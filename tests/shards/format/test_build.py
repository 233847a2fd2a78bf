"""Building: the bytes, who can read them, and what is left when it goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.manifest import MANIFEST, load_manifest
from shards.format.members import LABELS
from shards.format.record import ImageRecord, Report, Sentence, record_key
from shards.format.table import open_table
from shards.format.tokenizer import load_tokenizer
from shards.format.verify import verify
from shards.store import objects
from tests.conftest import MakeRecords, contents, files_of, subprocess_environment


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output, in a folder and on S3."""
    if request.param == "folder":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


SETTINGS = BuildSettings("small", "random", vocab_size=200, images_per_shard=4)


def test_what_is_written_is_what_was_given(tmp_path: Path, make_records: MakeRecords) -> None:
    records = make_records(10, labels=True)
    settings = replace(SETTINGS, answers=["blue", "green", "red"])
    with pytest.raises(
        DataError, match=r"image pictures/image 0.*'rare' is not in the answer table"
    ):
        build(records, tmp_path, settings)
    assert list(tmp_path.iterdir()) == []
    settings = replace(settings, skip_bad=True)
    report = Report()
    manifest = build(records, tmp_path, settings, report=report)
    assert manifest == load_manifest(str(tmp_path))
    assert [s.images for s in manifest.shards] == [4, 4, 2]
    assert manifest.schema.labels and manifest.schema.max_objects == max(
        len(r.boxes) for r in records
    )
    assert manifest.sources == ("coco_cap", "vqa") and manifest.question_sources == ("vqa",)
    assert report.counts == {"answers that are not in the answer table": 10}
    files = files_of(tmp_path)
    tokenizer = load_tokenizer(files / "vocab.txt")
    at = 0
    for shard in manifest.shards:
        table, data = open_table(files / shard.table), (files / shard.name).read_bytes()
        for i in range(shard.images):
            record = records[at]
            at += 1
            n = int(table.image_objects[i])

            def payload(offset: int, size: int, data: bytes = data) -> bytes:
                return data[int(offset) :][: int(size)]

            assert payload(table.offset["features"][i], n * 16) == record.features.tobytes()
            assert payload(table.offset["boxes"][i], n * 16) == record.boxes.tobytes()
            assert record.labels is not None
            assert payload(table.offset["labels"][i], n * 16) == LABELS.payload(record)
            document = json.loads(payload(table.offset["record"][i], table.record_size[i]))
            assert document["image"] == record.image
            begin, end = table.image_sentences[i : i + 2]
            assert end - begin == len(record.sentences)
            for s, sentence in zip(range(begin, end), record.sentences, strict=True):
                ids = table.tokens[table.token_start[s] : table.token_start[s + 1]].tolist()
                assert ids == tokenizer.encode(sentence.text).ids[:18]
                assert manifest.sources[table.sentence_source[s]] == sentence.source
                answers = slice(table.answer_start[s], table.answer_start[s + 1])
                known = {settings.answers[a] for a in table.answer_id[answers].tolist()}
                assert known == set(sentence.answers or {}) - {"rare"}
    assert verify(tmp_path) == []


def test_stock_readers_read_a_shard(tmp_path: Path, make_records: MakeRecords) -> None:
    import webdataset

    records = make_records(5, labels=True)
    build(records, tmp_path, replace(SETTINGS, images_per_shard=None))
    tar = files_of(tmp_path) / "shard-000000.tar"
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert len(samples) == 5
    for sample, record in zip(samples, records, strict=True):
        assert sample["__key__"] == record_key(record.image)
        assert json.loads(sample["json"])["image"] == record.image
        features = np.frombuffer(sample["features.f16"], "<f2").reshape(record.features.shape)
        np.testing.assert_array_equal(features, record.features)
        np.testing.assert_array_equal(
            np.frombuffer(sample["boxes.f32"], "<f4").reshape(-1, 4), record.boxes
        )
        assert {"labels.bin"} < set(sample)
    listed = subprocess.run(["tar", "tvf", tar], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 20
    assert all(line.startswith("-rw-r--r--") for line in listed.splitlines())
    assert all(" 1970-01-01 " in line for line in listed.splitlines())


def test_s3_gets_the_same_bytes(tmp_path: Path, make_records: MakeRecords, s3: str) -> None:
    url = f"{s3}/same"
    local = build(make_records(9), tmp_path / "data", SETTINGS)
    remote = build(make_records(9), url, SETTINGS, staging=tmp_path / "staging")
    assert remote == local == load_manifest(url)
    assert objects.list_names(url) == [MANIFEST]
    names, files = objects.list_names(remote.place(url)), files_of(tmp_path / "data")
    assert names == sorted(p.name for p in files.iterdir())
    for name in names:
        assert objects.read_bytes(f"{remote.place(url)}/{name}") == (files / name).read_bytes()
    assert not (tmp_path / "staging").exists()
    assert verify(url) == []
    with pytest.raises(DataError, match="--overwrite"):
        build(make_records(3), url, SETTINGS)
    fewer = build(make_records(3), url, replace(SETTINGS, overwrite=True))
    assert load_manifest(url) == fewer != local
    tars = [n for n in objects.list_names(fewer.place(url)) if n.endswith(".tar")]
    assert tars == ["shard-000000.tar"]
    # Whoever reads the one before goes on.
    assert objects.list_names(remote.place(url)) == names


def test_an_existing_data_set_is_replaced_only_on_request(
    tmp_path: Path, make_records: MakeRecords
) -> None:
    build(make_records(9), tmp_path, SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"there is a data set.*--overwrite"):
        build(make_records(3), tmp_path, SETTINGS)
    with pytest.raises(DataError, match="has features"):  # a failing one leaves the old as it was
        bad = [*make_records(5), *make_records(1, feature_dim=9, seed=1)]
        bad[-1] = replace(bad[-1], image="other")
        build(bad, tmp_path, replace(SETTINGS, overwrite=True))
    assert contents(tmp_path) == before
    build(make_records(3), tmp_path, replace(SETTINGS, overwrite=True))
    assert [p.name for p in files_of(tmp_path).glob("*.tar")] == ["shard-000000.tar"]
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.ones((2, 4), np.float32) * 2}, "boxes outside of 0..1"),
        ({"features": np.full((2, 8), np.nan, np.float16)}, "not finite"),
        ({"features": np.zeros((3, 8), np.float16)}, r"features of shape \(3, 8\)"),
        ({"sentences": ()}, "no sentence"),
        ({"sentences": (Sentence("\ud800", "vqa"),)}, "not valid Unicode"),
        ({"image": "pictures/image 0.png"}, "comes twice.*--skip-bad"),
        ({"boxes": np.zeros((0, 4), np.float32)}, "0 objects.*--skip-bad"),
        ({"width": 0}, "a size of 0"),
    ],
)
def test_bad_records_are_named_and_can_be_skipped(
    tmp_path: Path, make_records: MakeRecords, change: dict, message: str
) -> None:
    good = make_records(2)
    bad = replace(
        good[1],
        **{
            "boxes": np.zeros((2, 4), np.float32),
            "features": np.zeros((2, 8), np.float16),
            "image": "bad one",
            **change,
        },
    )
    with pytest.raises(DataError, match=message) as caught:
        build([good[0], bad], tmp_path / "a", SETTINGS)
    assert bad.image in str(caught.value)
    assert not (tmp_path / "a").exists()
    report = Report()
    manifest = build(
        [good[0], bad], tmp_path / "a", replace(SETTINGS, skip_bad=True), report=report
    )
    assert manifest.images == 1 and report.counts["bad image records"] == 1


def test_a_first_record_of_garbage_does_not_decide_the_layout(
    tmp_path: Path, make_records: MakeRecords
) -> None:
    good = make_records(6, labels=True)
    wide = make_records(2, labels=True, feature_dim=9, seed=1)
    bare = make_records(1, seed=2)
    other = [replace(r, image=f"other {i}") for i, r in enumerate([*wide, *bare])]
    flat = replace(good[0], image="flat", features=np.zeros(8, np.float16))
    nan = replace(good[0], image="nan", features=np.full_like(good[0].features, np.nan))
    settings = replace(SETTINGS, skip_bad=True)
    for i, bad in enumerate((*other, flat, nan)):
        report = Report()
        manifest = build([bad, *good], tmp_path / f"{i}", settings, report=report)
        assert (manifest.images, manifest.schema.feature_dim, manifest.schema.labels) == (
            6,
            8,
            True,
        )
        assert report.counts["bad image records"] == 1
        with pytest.raises(DataError, match=r"image .*--skip-bad"):
            build([bad, *good], tmp_path / "none", SETTINGS)
    # The same bytes as without them, several layouts or not.
    mixed = build([flat, *other, *good], tmp_path / "mixed", settings)
    assert mixed == build(good, tmp_path / "good", settings)
    assert contents(tmp_path / "mixed") == contents(tmp_path / "good")
    # Of as many, the earliest; and of nothing good there is nothing to build.
    assert build([*wide, *good[:2]], tmp_path / "even", settings).schema.feature_dim == 9
    with pytest.raises(DataError, match="no image record to build from"):
        build([flat, nan], tmp_path / "none", settings)


SLOW_BUILD = """
import sys, time, resource
from tests.conftest import small_records
from shards.format.build import BuildSettings, build
from shards.errors import DataError

def slow(records):
    for i, record in enumerate(records):
        if i == 9 and sys.argv[2] == "hang":
            time.sleep(60)
        yield record

if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
records = small_records(12, feature_dim=512)
try:
    build(slow(records), sys.argv[1], BuildSettings("x", "y", vocab_size=200, images_per_shard=4))
except DataError as error:
    sys.exit(str(error))
"""


def run_slow_build(out: Path, kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(out), kind],
        env=subprocess_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_leaves_no_final_name(tmp_path: Path, make_records: MakeRecords) -> None:
    out = tmp_path / "out"
    child = run_slow_build(out, "hang")
    deadline = time.monotonic() + 30
    while not list(out.glob(".lxscale-build-*/shard-000002.tar")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert [p.name for p in out.iterdir() if not p.name.startswith(".lxscale-build-")] == []
    # A living build's folder is not taken for a dead one's.
    build(make_records(2), out, SETTINGS)
    assert len(list(out.glob(".lxscale-build-*"))) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    build(make_records(2), out, replace(SETTINGS, overwrite=True))
    assert list(out.glob(".lxscale-build-*")) == []
    assert verify(out) == []


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = run_slow_build(out, "full")
    _, errors = child.communicate()
    assert (
        child.returncode == 1 and errors.startswith("cannot write ") and "Traceback" not in errors
    )
    assert not out.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_builds_at_once_none_mixes_with_the_other(
    tmp_path: Path, make_records: MakeRecords, overwrite: bool
) -> None:
    settings = replace(SETTINGS, overwrite=overwrite)
    ready, ended = threading.Event(), []

    def second() -> None:
        def show(what: str, done: int, total: int | None) -> None:
            if what == "tables written" and done == total:
                ready.set()

        try:
            build(make_records(5, seed=1), tmp_path, settings, progress=show)
            ended.append("built")
        except DataError as error:
            ended.append(str(error))

    other = threading.Thread(target=second)

    def show(what: str, done: int, total: int | None) -> None:
        if what == "files published" and done == 1:
            other.start()
            assert ready.wait(30)
            other.join()

    (tmp_path / ".manifest.json.lock").touch()  # as a process that was killed leaves it
    if overwrite:
        build(make_records(2), tmp_path, SETTINGS)
    with pytest.raises(DataError, match=r"another build has finished at .*--overwrite"):
        build(make_records(9), tmp_path, settings, progress=show)
    assert ended == ["built"] and load_manifest(str(tmp_path)).images == 5
    assert verify(tmp_path) == []
    manifest = load_manifest(str(tmp_path))
    due = {n for s in manifest.shards for n in (s.name, s.table)}
    assert set(contents(tmp_path)) == due | {"fingerprint", "vocab.txt", "answers.json"}
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [MANIFEST]


@pytest.mark.parametrize("name", ["shard_bytes", "images_per_shard"])
def test_shards_of_nothing_are_refused(tmp_path: Path, name: str) -> None:
    for value in (0, -1):
        with pytest.raises(DataError, match=f"{name} is {value}: give at least 1"):
            build([], tmp_path / "out", replace(SETTINGS, **{name: value}))


def test_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image record"):
        build([], tmp_path / "out", SETTINGS)


def test_keys_are_safe_distinct_and_bounded() -> None:
    ids = ["a/b.png", "a_b.png", "a=2Fb", "ä", "x" * 300, "x" * 301, "COCO_val2014_000000000042"]
    keys = [record_key(i) for i in ids]
    assert keys[0] == "a=2Fb=2Epng" and keys[-1] == ids[-1]
    assert len(set(keys)) == len(keys)
    assert all(len(k) <= 80 and not set(k) & set("./\\ ") for k in keys)
    tarfile.TarInfo(f"{keys[4]}.features.f16").tobuf(tarfile.USTAR_FORMAT)  # no error


def test_every_stage_of_a_build_and_of_a_check_ends(
    tmp_path: Path, make_records: MakeRecords
) -> None:
    last: dict[str, tuple[int, int | None]] = {}

    def show(what: str, done: int, total: int | None) -> None:
        last[what] = (done, total)

    build(make_records(9), tmp_path, SETTINGS, progress=show)
    assert verify(tmp_path, show) == []
    assert last == {
        "images written": (9, 9),
        "vocabulary trained": (1, 1),
        "tables written": (3, 3),
        "files published": (9, 9),
        "shards verified": (3, 3),
    }


@pytest.mark.parametrize("theirs", ["shard-000077.tar", "vocab.txt", "answers.json"])
def test_what_is_no_data_set_is_not_touched(
    place: str, make_records: MakeRecords, theirs: str
) -> None:
    """Many a WebDataset is of such names, the one that is read perhaps."""
    objects.write_bytes(f"{place}/{theirs}", b"precious")
    build(make_records(2), place, SETTINGS)
    build(make_records(3), place, replace(SETTINGS, overwrite=True))
    assert objects.read_bytes(f"{place}/{theirs}") == b"precious"
    assert verify(place) == []


def _killed_while_it_publishes(place: str, records: list[ImageRecord], overwrite: bool) -> None:
    def show(what: str, done: int, total: int | None) -> None:
        if what == "files published" and done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    build(records, place, replace(SETTINGS, overwrite=overwrite), progress=show)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_build_that_is_killed_while_it_publishes_changes_nothing(
    place: str, make_records: MakeRecords, overwrite: bool
) -> None:
    if overwrite:
        build(make_records(5), place, SETTINGS)
    context = multiprocessing.get_context("spawn")
    arguments = (place, list(make_records(9)), overwrite)
    child = context.Process(target=_killed_while_it_publishes, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    if overwrite:
        assert load_manifest(place).images == 5 and verify(place) == []
    else:
        assert not objects.exists(f"{place}/{MANIFEST}")
    build(make_records(2), place, replace(SETTINGS, overwrite=overwrite))
    assert load_manifest(place).images == 2 and verify(place) == []
