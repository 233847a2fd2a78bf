"""Where a node keeps a run's snapshots: a folder in memory that outlives its processes.

Nobody else can write there or put one there in its place: the user's folder is looked at before it
is used. What lies in it is verified like everything that is read.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Container
from pathlib import Path

from shards.errors import NodeError
from shards.store.objects import local_path
from trainer.checkpoint.fast_format import MANIFEST
from trainer.checkpoint.format import ObjectEntry, sha256_of

# Seconds after which what nobody has touched is nobody's.
_ABANDONED_S = 24 * 3600

_IN_MEMORY = {"tmpfs", "ramfs"}

# Of objects, whole ones and what a killed process has left of one.
_OBJECT = re.compile(r"step-(?P<step>\d+)-a(?P<attempt>\d+)-")


def open_folder(place: str, run_url: str) -> Path:
    """The run's folder on this node, made if it is not there; NodeError says why there is none.
    place: checkpoint.fast_folder."""
    parent = local_path(place)
    try:
        if parent is None or not parent.is_dir():
            raise NodeError(f"checkpoint.fast_folder={place} is no folder of this machine")
        if not _in_memory(parent):
            raise NodeError(f"checkpoint.fast_folder={place} is not in memory (tmpfs)")
        home = _home(parent)
        folder = home / sha256_of(run_url.encode())[:32]
        make_whole(folder)
        return folder
    except OSError as error:
        raise NodeError(f"cannot use checkpoint.fast_folder={place}: {error}") from None


def make_whole(folder: Path) -> None:
    """Have the run's folder and what it is in, which may have been removed since, and are this
    user's alone. Raises NodeError or OSError."""
    for path in (folder.parent, folder, folder / "checkpoints", objects_folder(folder)):
        _make(path)


def objects_folder(folder: Path) -> Path:
    return folder / "checkpoints" / ObjectEntry.folder


def _home(parent: Path) -> Path:
    return parent / f"lxscale-fast-{os.getuid()}"


def _make(path: Path) -> None:
    """Have a folder that is this user's alone."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise NodeError(f"{path} is not a folder of this user's alone: remove it")


def _in_memory(path: Path) -> bool:
    """Whether the file system of a path is."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number:
            return kind.split()[0] in _IN_MEMORY
    return False


def room(folder: Path) -> int:
    """Bytes that can be written there: neither the file system nor the machine may be full then."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) << 10)
    return free


def used(folder: Path) -> int:
    """Bytes of what lies there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- what lies there ----------------------------------------------------------------------------


def manifests(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Attempt and step of each snapshot that has a manifest here, newest first."""
    found = [(MANIFEST.fullmatch(p.name), p) for p in (folder / "checkpoints").iterdir()]
    return sorted((((int(m["attempt"]), int(m["step"])), p) for m, p in found if m), reverse=True)


def prune(folder: Path, landed: tuple[int, int], keep: int) -> None:
    """Keep the newest snapshots up to the one that has landed, which is attempt and step, and what
    is newer: another attempt's."""
    known = [place for place, _ in manifests(folder)]
    _remove(folder, landed, {p for p in known if p > landed} | set(_upto(known, landed)[:keep]))


def drop(folder: Path, failed: tuple[int, int]) -> None:
    """Remove what there is of a snapshot that failed, and leave the others before it."""
    known = [place for place, _ in manifests(folder) if place != failed]
    _remove(folder, failed, known)


def drop_from(folder: Path, attempt: int) -> None:
    """Remove what attempts from this one on have left, which are of an earlier life of the run."""
    end = (1 << 62, 0)
    _remove(folder, end, [p for p, _ in manifests(folder) if p[0] < attempt], attempt)


def remove_run(folder: Path) -> None:
    """Remove all of the run's snapshots on this node."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(place: str, but: Path | None) -> None:
    """Remove what the user's other runs have left that nobody has touched for a day."""
    parent = local_path(place)
    with contextlib.suppress(OSError):
        if parent is None or (home := _home(parent)).lstat().st_uid != os.getuid():
            return
        for folder in home.iterdir():
            if folder == but or folder.is_symlink():
                continue
            touched = max(p.stat().st_mtime for p in (folder, *folder.glob("checkpoints/**/")))
            if time.time() - touched > _ABANDONED_S:
                remove_run(folder)


def _upto(places: list[tuple[int, int]], last: tuple[int, int]) -> list[tuple[int, int]]:
    return [p for p in places if p <= last]


def _remove(
    folder: Path, last: tuple[int, int], kept: Container[tuple[int, int]], first_attempt: int = 0
) -> None:
    """Remove everything of snapshots up to `last` that are not kept; manifests first, so that none
    is ever without its objects."""
    for pattern, where in ((MANIFEST, folder / "checkpoints"), (_OBJECT, objects_folder(folder))):
        for path in where.iterdir():
            m = pattern.search(path.name)
            if m is None:
                continue
            place = int(m["attempt"]), int(m["step"])
            if first_attempt <= place[0] and place <= last and place not in kept:
                path.unlink(missing_ok=True)
