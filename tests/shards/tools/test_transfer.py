"""Data sets that are pushed and pulled: whole or not there, and nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shards.errors import DataError
from shards.format.build import build
from shards.format.clean import clean, leftovers
from shards.format.manifest import MANIFEST, load_manifest
from shards.format.staging import bring
from shards.format.verify import verify
from shards.store import objects
from shards.tools.migrate import migrate
from shards.tools.transfer import transfer
from tests.conftest import contents, files_of, small_records, subprocess_environment
from tests.object_store import FaultProxy
from tests.shards.tools.sets import SETTINGS, run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data") / "set"
    build(small_records(14), place, SETTINGS)
    return place


def test_there_and_back(data: Path, tmp_path: Path, s3: str) -> None:
    there, back = f"{s3}/{tmp_path.name}", tmp_path / "back"
    size = sum(p.stat().st_size for p in files_of(data).iterdir())
    plan = transfer(str(data), there, dry_run=True)
    assert (plan.files, plan.bytes, plan.there) == (10, size, 0) and not objects.list_tree(there)
    sent = transfer(str(data), there)
    assert (sent.files, sent.bytes, sent.there) == (10, size, 0)
    assert verify(there) == [] and sent.manifest == load_manifest(there) == load_manifest(str(data))
    assert transfer(str(data), there).files == 0
    transfer(there, str(back), jobs=2)
    assert contents(back) == contents(data) and verify(back) == []
    assert sorted(p.name for p in back.iterdir()) == [load_manifest(str(back)).folder, MANIFEST]
    # From store to store, and what is lost or damaged is mended.
    transfer(there, f"{there}-2")
    copied = files_of(back)
    (copied / "shard-000001.tar").write_bytes(b"x" * (copied / "shard-000001.tar").stat().st_size)
    (copied / "vocab.txt").unlink()
    assert transfer(f"{there}-2", str(back)).files == 2
    assert contents(back) == contents(data)


def test_some_shards(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "some"
    assert run("pull", data, out, "--shards", "0,2-3", "--name", "b", "--json", "--quiet") == 0
    told = json.loads(capsys.readouterr().out)
    whole, some = load_manifest(str(data)), load_manifest(str(out))
    assert list(some.shards) == [whole.shards[i] for i in (0, 2, 3)]
    assert told["name"] == some.name == "b"
    assert told["images"] == some.images == 10 and told["files_copied"] == 8
    assert verify(out) == []
    with pytest.raises(DataError, match="has shards 0 to 3"):
        transfer(str(data), str(tmp_path / "x"), shards=[4])
    assert not (tmp_path / "x").exists()
    with pytest.raises(DataError, match=r"there is a data set at"):
        run("push", data, out, "--quiet")
    assert run("push", data, out, "--overwrite", "--quiet") == 0
    assert contents(out) == contents(data)
    # As of a data set of very many shards.
    monkeypatch.setattr("shards.format.manifest.INLINE", 1)
    monkeypatch.setattr("shards.format.manifest.PAGE", 2)
    build(small_records(14), tmp_path / "paged", SETTINGS)
    transfer(str(tmp_path / "paged"), str(tmp_path / "a"))
    transfer(str(tmp_path / "paged"), str(tmp_path / "b"), shards=[1, 2, 3])
    assert verify(tmp_path / "a") == [] == verify(tmp_path / "b")
    assert len(load_manifest(str(tmp_path / "a")).pages) == 2
    assert load_manifest(str(tmp_path / "b")).images == 10


def test_damage_is_not_passed_on(data: Path, tmp_path: Path, s3: str) -> None:
    build(small_records(14), tmp_path / "set", SETTINGS)
    tar = files_of(tmp_path / "set") / "shard-000002.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    out = f"{s3}/{tmp_path.name}/damaged"
    for place in (out, str(tmp_path / "copy")):
        with pytest.raises(DataError, match=r"shard-000002.tar is damaged \(sha256"):
            transfer(str(tmp_path / "set"), place)
        assert MANIFEST not in objects.list_names(place)
        found = {o.name.rpartition("/")[2] for o in objects.list_tree(place)}
        assert "shard-000002.tar" not in found
        assert not [name for name in found if name.endswith(".tmp")]
        # What has come stays for another try; `clean` knows it.
        assert {o.name for o in objects.list_tree(place)} == {
            o.name for o in (leftovers(place).objects if found else [])
        }
    # Once it is restored the rest follows.
    content[700] ^= 1
    tar.write_bytes(content)
    done = transfer(str(tmp_path / "set"), out)
    assert done.files + done.there == 10 and done.there >= 1 and verify(out) == []


_PUSH = """
import sys
from shards.tools.transfer import transfer
print(transfer(sys.argv[1], sys.argv[2], jobs=1).files)
"""


def test_a_push_that_was_killed_goes_on(data: Path, tmp_path: Path, proxy: FaultProxy) -> None:
    place = f"s3://lxscale-test/{tmp_path.name}"
    slow = "import shards.tools.transfer as t, time\nsend = t._send\n"
    slow += "def late(*a):\n    send(*a)\n    time.sleep(0.2)\nt._send = late\n"
    with subprocess.Popen(
        [sys.executable, "-c", slow + _PUSH, str(data), place], env=subprocess_environment()
    ) as process:
        deadline = time.monotonic() + 60
        while len(objects.list_tree(place)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    came = objects.list_tree(place)
    assert 3 <= len(came) < 10 and not objects.exists(f"{place}/{MANIFEST}")
    with pytest.raises(DataError, match="no data set at"):
        load_manifest(place)
    done = transfer(str(data), place)
    assert (done.files, done.there) == (10 - len(came), len(came)) and verify(place) == []
    assert {o.name for o in came} < {o.name for o in objects.list_tree(place)}
    assert not leftovers(place).objects


def test_a_pull_that_was_killed_leaves_no_half_file(
    data: Path, tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there, out = f"{s3}/{tmp_path.name}", tmp_path / "out"
    transfer(str(data), there)
    code = "import shards.tools.transfer as t, time\ncopy = t.copy\n"
    code += "def half(file, path, *a):\n    copy(file, path, *a)\n"
    code += "    if file.url.endswith('1.tar'):\n        open(path, 'r+b').truncate(99)\n"
    code += "        import os; os.kill(os.getpid(), 9)\n    return path\nt.copy = half\n"
    done = subprocess.run(
        [sys.executable, "-c", code + _PUSH, there, str(out)], env=subprocess_environment()
    )
    assert done.returncode == -signal.SIGKILL
    came = [p for p in out.glob("build-*/*") if p.is_file()]
    assert came and not (out / MANIFEST).exists()
    whole = files_of(data)
    assert all(p.read_bytes() == (whole / p.name).read_bytes() for p in came)
    assert run("pull", there, out, "--quiet") == 0
    assert f"{10 - len(came)} files" in capsys.readouterr().out
    assert contents(out) == contents(data)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_of_a_push_and_a_build_at_once_one_stops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")

    def late(path: Path, url: str) -> None:
        monkeypatch.setattr("shards.tools.transfer.bring", bring)
        build(small_records(3), out, SETTINGS)
        bring(path, url)

    monkeypatch.setattr("shards.tools.transfer.bring", late)
    with pytest.raises(DataError, match="another build has finished at"):
        transfer(str(data), out, jobs=1)
    assert load_manifest(out).images == 3 and verify(out) == []
    # A cleaning may take what it has brought; the next try does not count on it.
    found = leftovers(out)
    assert len(found.objects) == 10
    clean(out, found)
    done = transfer(str(data), out, overwrite=True)
    assert done.there == 0 and verify(out) == []
    assert {o.name.partition("/")[0] for o in found.objects} != {done.manifest.folder}


def test_a_file_that_changes_while_it_is_sent(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small_records(3), tmp_path / "set", SETTINGS)
    upload = objects.upload

    def late(path: Path, url: str, *rest: Any) -> None:
        if path.name.endswith(".tar"):
            path.write_bytes(path.read_bytes()[::-1])
        upload(path, url, *rest)

    monkeypatch.setattr(objects, "upload", late)
    place = f"{s3}/{tmp_path.name}"
    with pytest.raises(DataError, match=r"shard-000000.tar changed while it was copied"):
        transfer(str(tmp_path / "set"), place)
    assert not [o for o in objects.list_tree(place) if o.name.endswith((".tar", MANIFEST))]


def test_too_little_room_is_said_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("shards.tools.transfer.shutil", usage)
    with pytest.raises(DataError, match=r"has room for 1,000 bytes, and [\d,]+ are to come"):
        transfer(str(data), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- migrate ------------------------------------------------------------------------------------


def older(place: Path) -> None:
    """The data set as a build wrote it before builds had folders of their own."""
    build(small_records(9), place, SETTINGS)
    manifest = load_manifest(str(place))
    for path in (place / manifest.folder).iterdir():
        path.rename(place / path.name)
    (place / manifest.folder).rmdir()
    (place / MANIFEST).write_bytes(replace(manifest, folder="").to_json())


def test_an_older_layout_becomes_the_present(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "old"
    older(place)
    before = load_manifest(str(place))
    assert before.folder == "" and verify(place) == []
    made = migrate(str(place), str(tmp_path / "new"))
    assert made and made.folder and made.fingerprint == before.fingerprint
    assert verify(tmp_path / "new") == []
    with pytest.raises(DataError, match=r"--overwrite"):
        migrate(str(place), str(place))
    assert run("migrate", place, "--out", place, "--overwrite", "--quiet") == 0
    assert load_manifest(str(place)).folder and verify(place) == []
    assert contents(place) == contents(tmp_path / "new")
    clean(str(place), leftovers(str(place)))
    assert sorted(p.name for p in place.iterdir()) == [load_manifest(str(place)).folder, MANIFEST]
    capsys.readouterr()
    assert run("migrate", place, "--out", tmp_path / "x", "--quiet") == 0
    assert "nothing is to be done" in capsys.readouterr().out and not (tmp_path / "x").exists()


def test_a_format_of_later_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ('{"format": "lxscale-9"}', r"has format 'lxscale-9', .* knows lxscale-1"),
        ("[1]", r"has format None"),
        ("{", r"is not a manifest"),
    ):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(DataError, match=message):
            migrate(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(DataError, match="no data set at"):
        migrate(str(tmp_path / "none"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
