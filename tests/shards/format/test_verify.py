"""`verify` and the manifest find what is wrong with a data set."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli.main import main
from shards.errors import DataError, NodeError
from shards.format.arrays import map_arrays, save_arrays
from shards.format.build import BuildSettings, build
from shards.format.manifest import Counts, Manifest, load_manifest
from shards.format.shard_list import ShardList
from shards.format.table import Table, open_table
from shards.format.verify import verify
from shards.store import objects
from shards.store.stored import hash_file
from tests.conftest import MakeRecords, files_of, subprocess_environment, upload_set

TAR, TABLE = "shard-000001.tar", "shard-000001.table.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_records: MakeRecords) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    settings = BuildSettings("small", "random", vocab_size=200, images_per_shard=4)
    build(make_records(9, labels=True), folder, settings)
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_data_set_has_no_problem(data: Path) -> None:
    assert verify(data) == []


@pytest.mark.parametrize("name", [TAR, TABLE, "vocab.txt", "answers.json"])
def test_flipped_truncated_and_missing_files_are_named(data: Path, name: str) -> None:
    path = files_of(data) / name
    flip(path, -1)
    assert verify(data) == [f"{path} has another sha256 than the manifest says"]
    flip(path, -1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    assert verify(data) == [f"{path} has {size - 3} bytes, the manifest says {size}"]
    path.unlink()
    (problem,) = verify(data)
    assert problem.startswith(f"{path} cannot be read") and "does not exist" in problem


def reseal(data: Path) -> None:
    """A manifest that vouches for the files as they are: hashes alone find nothing then."""
    manifest = load_manifest(str(data))
    shards = tuple(
        dataclasses.replace(
            s,
            size=(files_of(data) / s.name).stat().st_size,
            sha256=hash_file(files_of(data) / s.name),
            table_size=(files_of(data) / s.table).stat().st_size,
            table_sha256=hash_file(files_of(data) / s.table),
        )
        for s in manifest.shards
    )
    (data / "manifest.json").write_bytes(dataclasses.replace(manifest, shards=shards).to_json())


def change_table(data: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    arrays = {k: np.array(v) for k, v in map_arrays(files_of(data) / TABLE).items()}
    change(arrays[name])
    save_arrays(files_of(data) / TABLE, arrays)
    reseal(data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", lambda a: a.__setitem__(3, 7), "tokens differs"),
        ("answer_id", lambda a: a.__setitem__(0, 99), "answer_id differs"),
        ("answer_score", lambda a: a.__setitem__(0, 0.7), "answer_score differs"),
        ("sentence_source", lambda a: a.__setitem__(0, 1 - a[0]), "sentence_source differs"),
        ("features_offset", lambda a: a.__setitem__(2, a[2] + 512), "record 2: .*features.f16"),
        ("image_objects", lambda a: a.__setitem__(1, a[1] + 1), "record 1: .*boxes.f32"),
        ("record_size", lambda a: a.__setitem__(0, a[0] - 1), "record 0: "),
        ("labels_offset", lambda a: a.__setitem__(0, 0), "record 0: .*labels.bin"),
        ("image_sentences", lambda a: a.__setitem__(0, 1), "image_sentences does not rise"),
    ],
)
def test_a_wrong_table_under_a_right_hash(
    data: Path, name: str, change: Callable[[np.ndarray], object], message: str
) -> None:
    change_table(data, name, change)
    problems = verify(data)
    assert len(problems) == 1 and "shard-000001" in problems[0]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems[0])


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("features_offset", np.float16(np.inf).tobytes(), "not finite"),
        ("boxes_offset", np.float32(1.5).tobytes(), "boxes outside of 0..1"),
        ("labels_offset", np.int32(1600).tobytes(), "object id outside"),
        ("record_offset", b"[", "record 0: "),
    ],
)
def test_wrong_members_under_a_right_hash(
    data: Path, array: str, value: bytes, message: str
) -> None:
    at = int(map_arrays(files_of(data) / TABLE)[array][0])
    content = bytearray((files_of(data) / TAR).read_bytes())
    content[at : at + len(value)] = value
    (files_of(data) / TAR).write_bytes(content)
    reseal(data)
    (problem,) = verify(data)
    assert TAR in problem and message in problem


def test_tables_read_without_a_copy_and_by_the_library(data: Path) -> None:
    import safetensors.numpy

    file = files_of(data) / TABLE
    arrays, library = map_arrays(file), safetensors.numpy.load_file(file)
    assert set(arrays) == set(library)
    for name, array in arrays.items():
        assert array.dtype == library[name].dtype and not array.flags.owndata
        np.testing.assert_array_equal(array, library[name])
    table = open_table(files_of(data) / TABLE)
    assert isinstance(table, Table) and not table.tokens.flags.writeable
    content = (files_of(data) / TABLE).read_bytes()
    for damaged in (content[:-8], content + b"12345678", content[:4], b"", b"\xff" * 64):
        (files_of(data) / TABLE).write_bytes(damaged)
        with pytest.raises(DataError, match=TABLE):
            open_table(files_of(data) / TABLE)


def test_the_manifest_round_trips_and_refuses_damage(data: Path) -> None:
    path = data / "manifest.json"
    manifest = load_manifest(str(data))
    content = path.read_bytes()
    assert manifest.to_json() == content
    document = json.loads(content)
    assert document["fingerprint"] == manifest.fingerprint

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_manifest(str(data))

    path.write_bytes(content.replace(b'"random"', b'"rundom"'))
    refused("manifest.json is damaged")
    path.write_bytes(content[:-20])
    refused("manifest.json is not a manifest")
    path.write_bytes(content.replace(b"lxscale-1", b"lxscale-9"))
    refused("has format 'lxscale-9', this lxscale reads 'lxscale-1'")
    bad = np.full(len(manifest.shards), b"../x")
    for changes, message in (
        ({"name": 3}, "manifest.name is 3"),
        ({"sources": ("vqa", "coco_cap")}, "not sorted"),
        (
            {"shards": dataclasses.replace(manifest.shards, name=bad)},
            "not a plain file name",
        ),
        ({"shards": manifest.shards[:1]}, "not the sums"),
    ):
        changed: Manifest = dataclasses.replace(manifest, **changes)
        path.write_bytes(changed.to_json())
        refused(message)
    path.unlink()
    refused("no data set at .*lxscale shards build")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("name"), r"manifest\.name: field required"),
        (lambda d: d.update(extra=1), r"manifest\.extra: unexpected"),
        (lambda d: d["schema"].update(extra=1), r"manifest\.schema\.extra: unexpected"),
        (lambda d: d["schema"].pop("labels"), r"manifest\.schema\.labels: field required"),
        (lambda d: d["schema"].update(labels=1), r"manifest\.schema\.labels is 1: "),
        (lambda d: d["schema"].update(max_objects=True), r"max_objects is True: .*integer"),
        (lambda d: d["schema"].update(max_objects=36.0), r"max_objects is 36\.0: .*integer"),
        (lambda d: d["shards"][1].update(size="7"), r"manifest\.shards\[1\]\.size is '7': "),
        (lambda d: d["shards"][1].update(size=-1), r"manifest\.shards\[1\]\.size is -1: "),
        (
            lambda d: d["shards"][0]["pairs_per_source"].update(vqa=-4),
            r"manifest\.shards\[0\]\.pairs_per_source\.vqa is -4: ",
        ),
        (lambda d: d.update(sources="vqa"), r"manifest\.sources is 'vqa': "),
        (lambda d: d.update(schema=[]), r"manifest\.schema is \[\]: "),
    ],
)
def test_a_manifest_is_read_as_it_was_written_or_not_at_all(
    data: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = data / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["fingerprint"], document["folder"], document["checksum"]
    change(document)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"{path} is not usable: .*{message}"):
        load_manifest(str(data))


# --- what a tar may hold, and parts of a check ----------------------------------------------------


def change_tar(data: Path, change: Callable[[bytearray, int], None]) -> list[str]:
    """What is found once a tar was changed behind its first record, and vouched for."""
    path = files_of(data) / TAR
    content = bytearray(path.read_bytes())
    change(content, int(map_arrays(files_of(data) / TABLE)["boxes_offset"][1]))
    path.write_bytes(content)
    reseal(data)
    return verify(data)


def as_kind(kind: bytes) -> Callable[[bytearray, int], None]:
    def change(content: bytearray, at: int) -> None:
        header = tarfile.TarInfo.frombuf(bytes(content[at - 512 : at]), "ascii", "strict")
        header.type, header.linkname = kind, "/etc/passwd"
        content[at - 512 : at] = header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")

    return change


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_a_member_that_is_no_plain_file_is_refused(data: Path, kind: bytes) -> None:
    (problem,) = change_tar(data, as_kind(kind))
    assert TAR in problem and "record 1" in problem and "no plain file" in problem


def test_bytes_between_members_and_after_them_are_refused(data: Path) -> None:
    (problem,) = change_tar(data, lambda content, at: content.__setitem__(at - 513, 7))
    assert TAR in problem and "something between" in problem


def test_bytes_after_the_last_member_are_refused(data: Path) -> None:
    (problem,) = change_tar(data, lambda content, at: content.__setitem__(-1, 7))
    assert TAR in problem and "something after the last record" in problem


def test_nested_json_in_a_record_is_one_problem(data: Path) -> None:
    def nest(content: bytearray, at: int) -> None:
        begin = int(map_arrays(files_of(data) / TABLE)["record_offset"][1])
        size = int(map_arrays(files_of(data) / TABLE)["record_size"][1])
        content[begin : begin + size] = b"[" * size

    path = files_of(data) / TABLE
    arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
    assert arrays["record_size"][1] < 5000
    (problem,) = change_tar(data, nest)
    assert TAR in problem and "record 1" in problem


def test_processes_find_what_one_finds(data: Path) -> None:
    flip(files_of(data) / TAR, 3000)
    flip(files_of(data) / "shard-000002.table.safetensors", -1)
    alone = verify(data, jobs=1)
    assert len(alone) == 2 and verify(data, jobs=3) == alone


def test_an_image_that_is_in_two_shards_is_found(data: Path, make_records: MakeRecords) -> None:
    """As of two builds' tars under one manifest, which no build makes."""
    manifest, files = load_manifest(str(data)), files_of(data)
    first, second = manifest.shards[0], manifest.shards[1]
    for name in ("name", "table"):
        (files / getattr(second, name)).write_bytes((files / getattr(first, name)).read_bytes())
    rows = [first, dataclasses.replace(first, name=second.name, table=second.table)]
    rows.append(manifest.shards[2])
    shards = ShardList.of(rows, manifest.sources)
    totals = dict(zip(manifest.sources, shards.pairs_per_source.sum(0).tolist(), strict=True))
    counts = Counts(int(shards.images.sum()), int(shards.pairs.sum()), totals)
    changed = dataclasses.replace(manifest, shards=shards, counts=counts)
    (data / "manifest.json").write_bytes(changed.to_json())
    for jobs in (1, 2):
        problems = verify(data, jobs=jobs)
        assert len(problems) == first.images
        assert "record 0 of shard-000000.tar is record 0 of shard-000001.tar" in problems[0]


def test_some_shards_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(files_of(data) / TAR, 3000)
    assert verify(data, shards=[0, 2]) == []
    assert main(["shards", "verify", str(data), "--shards", "0,2"]) == 0
    assert main(["shards", "verify", str(data), "--shards", "0-1"]) == 1
    assert TAR in capsys.readouterr().out
    for wrong in ("1-0", "x", "-1", "1-"):
        with pytest.raises(SystemExit):
            main(["shards", "verify", str(data), f"--shards={wrong}"])
    capsys.readouterr()
    assert main(["shards", "verify", str(data), "--shards", "3"]) == 2
    assert "has shards 0 to 2, not 3 to 3" in capsys.readouterr().err
    found = {
        main(["shards", "verify", str(data), "--sample", "1", "--seed", f"{i}"]) for i in "0123456"
    }
    assert found == {0, 1}
    assert "drawn with --seed 4" in capsys.readouterr().err


def test_an_interrupted_check_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    command = ["shards", "verify", str(data), "--jobs", "1", "--state", str(state)]
    flip(files_of(data) / TAR, 3000)
    assert main(command) == 1
    flip(files_of(data) / TAR, 3000)
    # As it is when a crash cuts a line off.
    state.write_bytes(state.read_bytes() + b'0badbadb {"shard": "shard-0000')
    done: list[tuple[str, int]] = []
    assert verify(data, lambda what, n, _t: done.append((what, n)), jobs=1, state=state) == []
    assert done == [("shards found whole before", 2), ("shards verified", 3)]
    done.clear()
    assert verify(data, lambda what, n, _t: done.append((what, n)), jobs=1, state=state) == []
    assert done[0] == ("shards found whole before", 3)
    # The same place by another way, and a file of mktemp's.
    (tmp_path / "link").symlink_to(data)
    assert verify(tmp_path / "link", lambda what, n, _t: done.append((what, n)), state=state) == []
    assert done == [("shards found whole before", 3), ("shards verified", 3)] * 2
    empty = tmp_path / "empty"
    empty.touch()
    assert verify(data, state=empty) == [] and empty.stat().st_size == state.stat().st_size
    # What is in it is not read again, and what is no state of this data set is refused.
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (files_of(data) / TAR).unlink()
    assert main(command) == 0
    assert "shards found whole before: 3 of 3" in capsys.readouterr().err
    assert main(["shards", "verify", str(copy), "--state", str(state)]) == 2
    assert "of another data set" in capsys.readouterr().err
    content = state.read_bytes()
    for wrong in (
        b"nothing\n",
        content.replace(b"shard-000001", b"shard-000009"),
        b"[]\n" + content,
        *(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in (2, 90, 300, 500)),
        b"no line",
    ):
        state.write_bytes(wrong)
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert str(state) in error and len(error.splitlines()) == 1
        assert state.read_bytes() == wrong


def test_a_part_that_is_whole_is_not_called_the_whole(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(files_of(data) / TAR, 3000)
    other = next(i for i in range(3) if load_manifest(str(data)).shards[i].name != TAR)
    assert main(["shards", "verify", str(data), "--shards", f"{other},{other}"]) == 0
    assert capsys.readouterr().out.endswith(f"{data}: 1 shards are whole\n")


def test_a_fault_of_this_machine_is_none_of_the_data(
    s3: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/{tmp_path.name}"
    upload_set(data, url)

    real = objects.download

    def full(url: str, target: Any, *arguments: Any, **options: Any) -> None:
        if hasattr(target, "name"):  # a file, not memory
            raise OSError(errno.ENOSPC, "No space left on device")
        real(url, target, *arguments, **options)

    monkeypatch.setattr(objects, "download", full)
    with pytest.raises(NodeError, match=r"No space left on device; make room"):
        verify(url)


_FULL = """
import resource, signal, sys
from cluster.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (350, 350))
sys.exit(main(["shards", "verify", sys.argv[1], "--jobs", "1", "--state", sys.argv[2]]))
"""


def test_a_state_that_cannot_be_written_is_one_error(data: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(data), str(state)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(rf"^error: cannot write {state}: .*run it again", line)
    assert verify(data, state=state) == []


_LOSING = """
import contextlib, resource, sys, threading, time
import psutil
from cluster.cli.main import main

def kill():
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
        time.sleep(0.01)

if __name__ == "__main__":
    if sys.argv[1] == "killed":
        threading.Thread(target=kill, daemon=True).start()
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    sys.exit(main(["shards", "verify", sys.argv[2], "--jobs", "30"]))
"""


@pytest.mark.parametrize(("fault", "message"), [("killed", "was killed"), ("few", "ulimit -n")])
def test_a_check_that_loses_a_process_says_nothing_of_the_data(
    data: Path, tmp_path: Path, fault: str, message: str
) -> None:
    script = tmp_path / "check.py"
    script.write_text(_LOSING)
    done = subprocess.run(
        [sys.executable, str(script), fault, str(data)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75, done.stderr
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert message in line
    assert "Traceback" not in done.stderr and "problem" not in done.stdout
