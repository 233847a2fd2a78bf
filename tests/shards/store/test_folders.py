"""Files that are whole or not there, and folders that die with their process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.store.atomic import written_whole
from shards.store.folders import owned_folder, sweep
from tests.conftest import subprocess_environment


def test_a_file_changes_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "x"
    with written_whole(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with written_whole(path) as temporary:
        temporary.write_text("damaged")
        temporary.unlink()
    assert path.read_text() == "one"
    stale = path.with_name(".x.0badf00d.tmp")
    stale.write_text("of a dead process, or of a living one")
    with written_whole(path) as temporary:
        temporary.write_text("two")
    assert path.read_text() == "two" and stale.exists()
    stale.unlink()
    dead = path.with_name(".x.tmp")
    dead.write_text("of a dead process")
    with written_whole(path, alone=True) as temporary:
        assert temporary == dead and not dead.exists()
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def test_what_a_write_costs_does_not_grow_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(100):
        (tmp_path / str(i)).touch()

    def no_listing(*arguments: object) -> None:
        raise AssertionError("the folder is listed")

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, no_listing)
    with written_whole(tmp_path / "x", alone=True, durable=False) as temporary:
        temporary.write_text("")


HOLDER = """
import sys
from pathlib import Path
from shards.store.folders import owned_folder
with owned_folder(Path(sys.argv[1]), "kind-") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_goes_with_its_process_however_that_ends(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=subprocess_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    held = Path(child.stdout.readline().strip())
    for name in ("kind-without-lock", "other"):
        (tmp_path / name).mkdir()
    with owned_folder(tmp_path, "kind-") as own:
        assert held.exists() and own != held  # that of a living process is left alone
        child.kill()
        child.wait()
        sweep(tmp_path, "kind-", keep=lambda folder: folder == held)
        assert held.exists()
        sweep(tmp_path, "kind-")
        assert not held.exists() and own.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"kind-without-lock", "other"}


def test_a_renamed_folder_outlives_its_block(tmp_path: Path) -> None:
    with owned_folder(tmp_path / "new", "kind-") as folder:
        (folder / "log").touch()
        folder.rename(tmp_path / "kept")
    assert (tmp_path / "kept" / "log").exists()
    assert not (tmp_path / "new").exists()


def test_what_had_to_be_made_for_a_folder_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for parent in (tmp_path / "there", tmp_path / "new" / "deep", tmp_path / "used" / "deep"):
        with owned_folder(parent, "kind-"):
            if parent.parent.name == "used":
                (parent.parent / "file").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "there", "used"]


_FORK = """
import os, sys
from pathlib import Path
from shards.store.folders import owned_folder, sweep
with owned_folder(Path(sys.argv[1]), "kind-") as folder:
    child = os.fork()
    if not child:
        sys.exit()
    os.waitpid(child, 0)
    print(folder.exists())
print(folder.exists())
"""


def test_a_forked_child_leaves_the_folder_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORK, str(tmp_path)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "False"], done


def test_a_folder_that_a_process_made_again_after_its_end_is_swept(tmp_path: Path) -> None:
    for name, age in (("kind-new", 0), ("kind-old", 3600), ("other", 3600)):
        (tmp_path / name / "ray").mkdir(parents=True)
        os.utime(tmp_path / name, (0, time.time() - age))
    sweep(tmp_path, "kind-")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kind-new", "other"]
