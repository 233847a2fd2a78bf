"""Staging and publishing a build: nothing appears under a final name before all is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.store import objects

_PREFIX = ".building-"


@contextlib.contextmanager
def staging_folder(out: str, staging: str | Path | None = None) -> Iterator[Path]:
    """An empty folder for a build to `out`, removed afterwards however the block ends.

    For a local `out` it lies inside (publishing is renaming); builds that were killed there are
    cleaned up first: their lock is free. Else it lies in `staging` or the temporary folder.
    """
    target = objects.local_path(out)
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        _remove_dead(target)
        parent = target
    else:
        parent = Path(staging) if staging else Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(parent)
    folder = parent / f"{_PREFIX}{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        with open(folder / "unlocked", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # It gets its name when it is held: other builds take a free lock for a dead build's.
            os.rename(folder / "unlocked", folder / "lock")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_dead(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with open(folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # alive, or not ours


def publish(folder: Path, out: str, names: list[str], owned: re.Pattern[str]) -> None:
    """Bring the staged files to `out`; the last of `names` is the commit point.

    An earlier commit point is removed before anything else changes, and files whose names match
    `owned` but are not in `names` go too. When it fails, what it has brought is removed again.
    """
    commit = names[-1]
    objects.delete(objects.join(out, commit))
    for name in objects.list_names(out):
        if owned.fullmatch(name) and name not in names:
            objects.delete(objects.join(out, name))
    target = objects.local_path(out)
    done: list[str] = []
    try:
        for name in names:
            done.append(name)
            if target is None:
                objects.upload(folder / name, objects.join(out, name))
                continue
            with open(folder / name, "rb") as f:
                os.fsync(f.fileno())
            if name == commit:
                objects.sync_folder(target)
            os.replace(folder / name, target / name)
        if target is not None:
            objects.sync_folder(target)
    except BaseException:
        for name in done:
            with contextlib.suppress(Exception):
                objects.delete(objects.join(out, name))
        raise
