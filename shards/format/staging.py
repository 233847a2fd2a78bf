"""Staging: nothing appears under a final name before it is complete."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.errors import DataError
from shards.store import objects
from shards.store.atomic import flush
from shards.store.folders import abandoned, owned_folder

_STAGING = ".lxscale-build-"


@contextlib.contextmanager
def staging_folder(out: str, staging: str | Path | None = None) -> Iterator[Path]:
    """A folder for a build to `out`, removed at the end of the block, or by a later build if this
    one is killed. An OSError in the block becomes a DataError that names the place.

    For a local `out` it lies inside, so that publishing is renaming. Else it lies in `staging` or
    the temporary folder.
    """
    parent = objects.local_path(out) or Path(staging or tempfile.gettempdir())
    try:
        with owned_folder(parent, _STAGING) as folder:
            yield folder
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or parent}: {error.strerror or error}: give a folder "
            "with room that you may write to"
        ) from error


def killed(out: str) -> set[str]:
    """The names of the folders that builds to a local `out` have left there when they were killed;
    a build that is at work has its own locked."""
    target = objects.local_path(out)
    return {folder.name for folder in abandoned(target, _STAGING)} if target else set()


def publish_files(folder: Path, out: str, names: list[str]) -> None:
    """Bring staged files to `out`, over what is there; the last of `names` comes last, and is gone
    before any other changes. When it fails, what it has brought is removed again."""
    target = objects.local_path(out)
    for name in names:
        if target and (target / name).is_dir():
            raise DataError(
                f"{target / name} is a folder where a file is to be written: remove it, or "
                "choose another place"
            )
    objects.delete(objects.join(out, names[-1]))
    done: list[str] = []
    try:
        for name in names:
            done.append(name)
            bring(folder / name, objects.join(out, name))
    except BaseException:
        remove([objects.join(out, name) for name in done])
        raise


def bring(path: Path, url: str) -> None:
    """One staged file to its place; a local one is on the disk then, and its name is."""
    target = objects.local_path(url)
    if target is None:
        objects.upload(path, url)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    flush(path)
    os.replace(path, target)
    flush(target.parent)


def remove(urls: list[str]) -> None:
    """Remove what was brought, as far as that can be done."""
    for url in urls:
        with contextlib.suppress(Exception):
            objects.delete(url)
    remove_folders(urls)


def remove_folders(urls: list[str]) -> None:
    """Remove the folders that these files were in, where they are empty."""
    folders = {path.parent for url in urls if (path := objects.local_path(url))}
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
