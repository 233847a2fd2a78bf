"""`lxscale shards clean` on real places: what it says is what it removes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli.main import main
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.clean import clean, leftovers
from shards.format.manifest import MANIFEST, load_manifest
from shards.format.publish import commit_point
from shards.format.record import ImageRecord
from shards.format.staging import staging_folder
from shards.format.verify import verify
from shards.store import objects
from tests.conftest import small_records

SETTINGS = BuildSettings("clean", "test", images_per_shard=3)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "set")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_what_a_replaced_build_has_left_goes_when_asked(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(small_records(5), place, SETTINGS)
    second = build(small_records(7), place, replace(SETTINGS, overwrite=True))
    objects.write_bytes(f"{place}/notes.txt", b"somebody's")
    for kind in ("tar", "table.safetensors"):
        objects.write_bytes(f"{place}/shard-000004.{kind}", b"of a build before each had a folder")
    names = objects.list_names(first.place(place))
    assert main(["shards", "clean", place, "--older", "0"]) == 0
    out = capsys.readouterr().out
    assert f"nothing refers to {len(names) + 2} objects" in out
    assert all(f"{first.folder}/{name}" in out for name in names)
    assert second.folder not in out and "notes" not in out
    assert objects.list_names(first.place(place)) == names
    # What is young may be read, or be of a build that is at work.
    assert main(["shards", "clean", place, "--remove"]) == 0
    out = capsys.readouterr().out
    assert "removed 0 objects" in out and f"{len(names) + 2} more stay: " in out
    assert main(["shards", "clean", place, "--remove", "--older", "0"]) == 0
    assert f"removed {len(names) + 2} objects" in capsys.readouterr().out
    assert objects.list_names(first.place(place)) == []
    assert objects.list_names(place) == [MANIFEST, "notes.txt"]
    assert load_manifest(place) == second and verify(place) == []
    if "://" not in place:
        assert sorted(p.name for p in Path(place).iterdir()) == sorted(
            [second.folder, MANIFEST, "notes.txt"]
        )


def test_where_there_is_no_data_set(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "build-badbadb0/shard-000000.tar",
        "probe-0123456789abcdef",
        ".manifest.json.0a1b2c3d.tmp",
    )
    for name in names:
        objects.write_bytes(f"{place}/{name}", b"of a build that was killed")
    assert main(["shards", "clean", f"{place}/", "--remove", "--older", "0"]) == 0
    assert "removed 3 objects" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no data set at .*shards build"):
        load_manifest(place)
    made = build(small_records(5), place, SETTINGS)
    assert load_manifest(place) == made and verify(place) == []


def test_a_build_that_commits_meanwhile_is_safe(place: str) -> None:
    build(small_records(5), place, SETTINGS)
    found = leftovers(place)
    objects.write_bytes(f"{place}/build-badbadb0/shard-000000.tar", b"x")
    late = leftovers(place)
    second = build(small_records(7), place, replace(SETTINGS, overwrite=True))
    clean(place, found)  # there was nothing
    with pytest.raises(DataError, match="has changed meanwhile: nothing was removed"):
        clean(place, late)
    assert objects.exists(f"{place}/build-badbadb0/shard-000000.tar")
    assert load_manifest(place) == second and verify(place) == []


# --- what is nobody's to remove -----------------------------------------------------------------


def everything(place: str) -> set[str]:
    return {o.name for o in objects.list_tree(place)}


@pytest.fixture
def paged(place: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set whose list of shards is in pages, cleaned once."""
    monkeypatch.setattr("shards.format.manifest.INLINE", 2)
    monkeypatch.setattr("shards.format.manifest.PAGE", 2)
    build(small_records(12), place, SETTINGS)
    objects.write_bytes(f"{place}/build-badbadb0/shard-000000.tar", b"of a build that was killed")
    clean(place, leftovers(place))
    assert load_manifest(place).cleaned == 1 and load_manifest(place).pages
    return place


def test_a_data_set_in_pages_is_not_replaced_unasked(paged: str) -> None:
    names = everything(paged)
    with pytest.raises(DataError, match=r"there is a data set at .*--overwrite"):
        build(small_records(3), paged, SETTINGS)
    assert everything(paged) == names and verify(paged) == []


@pytest.mark.parametrize("which", ["page", "shard", "vocab"])
def test_nothing_goes_while_a_file_of_the_data_set_is_missing(paged: str, which: str) -> None:
    manifest = load_manifest(paged)
    names = {"page": manifest.pages[0].file, "shard": manifest.shards[1].name}
    lost = f"{manifest.place(paged)}/{names.get(which, manifest.vocab.file)}"
    objects.delete(lost)
    left = everything(paged)
    with pytest.raises(DataError, match=r"is missing|are not there") as error:
        leftovers(paged)
    assert lost.rpartition("/")[2] in str(error.value)
    if which == "page":
        with pytest.raises(DataError, match=r"is missing: .*restore it"):
            load_manifest(paged)
    assert everything(paged) == left


def test_no_flipped_bit_of_a_manifest_makes_its_files_leftovers(tmp_path: Path) -> None:
    place = str(tmp_path / "set")
    build(small_records(4), place, SETTINGS)
    objects.write_bytes(f"{place}/build-badbadb0/shard-000000.tar", b"of a build that was killed")
    clean(place, leftovers(place))
    manifest = load_manifest(place)
    named = {o.name for o in objects.list_tree(place)}
    path = tmp_path / "set" / MANIFEST
    whole = path.read_bytes()
    # All of what the fingerprint leaves out, and a part of the rest.
    at = [
        i
        for key in (b'"cleaned"', b'"checksum"', b'"fence"', b'"folder"', b'"shards"')
        for i in range(whole.index(key), whole.index(b"\n", whole.index(key)))
    ]
    for i in (*at, *range(0, len(whole), 97)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[i] ^= 1 << bit
            path.write_bytes(damaged)
            with contextlib.suppress(DataError):
                assert not leftovers(place).objects, (i, bit)
            with pytest.raises(DataError, match=f"at {place}|{MANIFEST}"):
                commit_point(place, overwrite=False)
    path.write_bytes(whole)
    assert {o.name for o in objects.list_tree(place)} == named
    assert load_manifest(place) == manifest


def test_what_others_have_at_the_place_is_left(place: str, tmp_path: Path) -> None:
    others = (
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.table.safetensors",
        "vocab.txt",
        "answers.json",
        "build-20261126/vocab.txt",
        "build-a0261126/deep/thesis.tex",
        ".building-projects/house.txt",
    )
    for name in others:
        objects.write_bytes(f"{place}/{name}", b"somebody's")
    if "://" not in place:
        os.utime(f"{place}/.building-projects", (0, 0))
    with pytest.raises(DataError, match="no data set at"):
        leftovers(place)
    # A data set of its own in a folder named as a build's.
    build(small_records(3), f"{place}/build-a0261125", SETTINGS)
    objects.write_bytes(f"{place}/build-a0261125/vocab.txt", b"somebody's")
    objects.write_bytes(f"{place}/build-badbadb0/shard-000000.tar", b"of a build that was killed")
    assert [o.name for o in leftovers(place).objects] == ["build-badbadb0/shard-000000.tar"]
    # A data set beside them, as of the user's own tars.
    build(small_records(3), place, SETTINGS)
    assert [o.name for o in leftovers(place).objects] == ["build-badbadb0/shard-000000.tar"]
    assert {o.name for o in objects.list_tree(place)} >= {*others}


def test_of_two_cleanings_at_once_one_gives_up(place: str) -> None:
    """Else a build that began between the two could commit without its files."""
    build(small_records(3), place, SETTINGS)
    objects.write_bytes(f"{place}/build-badbadb0/shard-000000.tar", b"of a build that was killed")
    first, second = leftovers(place), leftovers(place)
    clean(place, first)
    with pytest.raises(DataError, match="has changed meanwhile"):
        clean(place, second)


def test_readers_of_what_was_just_replaced_have_their_time(place: str) -> None:
    build(small_records(3), place, SETTINGS)
    if "://" not in place:
        for o in objects.list_tree(place):
            os.utime(Path(place) / o.name, (0, 0))  # written long ago
    build(small_records(4), place, replace(SETTINGS, overwrite=True))
    assert not leftovers(place, older=24).objects and leftovers(place).objects


def test_what_cannot_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "set")
    build(small_records(3), place, SETTINGS)
    old = f"{place}/build-badbadb0/shard-000000.tar"
    objects.write_bytes(old, b"of a build that was killed")
    real = objects.delete

    def delete(url: str) -> None:
        if url == old:
            raise PermissionError(13, "Permission denied")
        real(url)

    monkeypatch.setattr(objects, "delete", delete)
    with pytest.raises(
        DataError, match=r"1 objects could not be removed, .*shard-000000.tar.*denied"
    ):
        clean(place, leftovers(place))


def _killed_build(place: str) -> None:
    def records() -> Iterator[ImageRecord]:
        yield from small_records(5)
        os.kill(os.getpid(), signal.SIGKILL)

    build(records(), place, replace(SETTINGS, overwrite=True))


def test_what_a_build_had_when_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "set")
    made = build(small_records(3), place, SETTINGS)
    with staging_folder(place) as at_work:
        process = multiprocessing.get_context("fork").Process(target=_killed_build, args=(place,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (dead,) = {n for n in os.listdir(place) if n.startswith(".lxscale-build-")} - {at_work.name}
        (at_work / "shard-000000.tar").write_bytes(b"of a build that is at work")
        assert main(["shards", "clean", place, "--remove", "--older", "0"]) == 0
        out = capsys.readouterr().out
        assert f"{dead}/shard-000000.tar" in out and at_work.name not in out
        assert sorted(os.listdir(place)) == sorted([at_work.name, made.folder, MANIFEST])
        assert sorted(os.listdir(at_work)) == ["lock", "shard-000000.tar"]
    assert verify(place) == []
