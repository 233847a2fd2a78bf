"""`lxscale shards clean` on real places: what it says is what it removes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli.main import main
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.clean import clean, leftovers
from shards.format.manifest import MANIFEST, load_manifest
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
    objects.write_bytes(f"{place}/shard-000004.tar", b"of a build before builds had folders")
    names = objects.list_names(first.place(place))
    assert main(["shards", "clean", place, "--older", "0"]) == 0
    out = capsys.readouterr().out
    assert f"nothing refers to {len(names) + 1} objects" in out
    assert all(f"{first.folder}/{name}" in out for name in names)
    assert second.folder not in out and "notes" not in out
    assert objects.list_names(first.place(place)) == names
    # What is young may be read, or be of a build that is at work.
    assert main(["shards", "clean", place, "--remove"]) == 0
    assert "removed 0 objects" in capsys.readouterr().out
    assert main(["shards", "clean", place, "--remove", "--older", "0"]) == 0
    assert f"removed {len(names) + 1} objects" in capsys.readouterr().out
    assert objects.list_names(first.place(place)) == []
    assert objects.list_names(place) == [MANIFEST, "notes.txt"]
    assert load_manifest(place) == second and verify(place) == []
    if "://" not in place:
        assert sorted(p.name for p in Path(place).iterdir()) == sorted(
            [second.folder, MANIFEST, "notes.txt"]
        )


def test_where_there_is_no_data_set(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    objects.write_bytes(f"{place}/build-0badbadb/shard-000000.tar", b"of a build that was killed")
    assert main(["shards", "clean", place, "--remove", "--older", "0"]) == 0
    assert "removed 1 objects" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no data set at .*shards build"):
        load_manifest(place)
    made = build(small_records(5), place, SETTINGS)
    assert load_manifest(place) == made and verify(place) == []


def test_a_build_that_commits_meanwhile_is_safe(place: str) -> None:
    build(small_records(5), place, SETTINGS)
    found = leftovers(place)
    objects.write_bytes(f"{place}/build-0badbadb/shard-000000.tar", b"x")
    late = leftovers(place)
    second = build(small_records(7), place, replace(SETTINGS, overwrite=True))
    clean(place, found)  # there was nothing
    with pytest.raises(DataError, match="has changed meanwhile: nothing was removed"):
        clean(place, late)
    assert objects.exists(f"{place}/build-0badbadb/shard-000000.tar")
    assert load_manifest(place) == second and verify(place) == []
