"""Staging and publishing a build: nothing appears under a final name before all is complete."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.errors import DataError
from shards.progress import Progress
from shards.store import objects
from shards.store.atomic import flush
from shards.store.folders import owned_folder
from shards.store.locks import alone

_LOCK = ".publishing"  # a file in a local output while one process publishes there


@contextlib.contextmanager
def staging_folder(out: str, staging: str | Path | None = None) -> Iterator[Path]:
    """A folder for a build to `out`, removed at the end of the block, or by a later build if this
    one is killed. An OSError in the block becomes a DataError that names the place.

    For a local `out` it lies inside, so that publishing is renaming. Else it lies in `staging` or
    the temporary folder.
    """
    parent = objects.local_path(out) or Path(staging or tempfile.gettempdir())
    try:
        with owned_folder(parent, ".building-") as folder:
            yield folder
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or parent}: {error.strerror or error}: give a folder "
            "with room that you may write to"
        ) from error


def publish(
    folder: Path,
    out: str,
    names: list[str],
    owned: re.Pattern[str],
    progress: Progress,
    overwrite: bool,
) -> None:
    """Bring the staged files to `out`; the last of `names` is the commit point.

    An earlier commit point is removed before anything else changes (without `overwrite`, it is an
    error, and all stays as it is), and files whose names match `owned` but are not in `names` go
    too. When it fails, what it has brought is removed again.

    At a local `out` this is done by one process at a time. On object storage two that publish at
    once to one place are not told apart.
    """
    target = objects.local_path(out)
    with alone(target / _LOCK) if target else contextlib.nullcontext():
        if not overwrite and objects.exists(objects.join(out, names[-1])):
            raise DataError(
                f"another build has finished at {out} meanwhile: this one stops; choose another "
                "place, or replace it with --overwrite"
            )
        for name in names:
            if target and (target / name).is_dir():
                raise DataError(
                    f"{target / name} is a folder where a file is to be written: remove it, or "
                    "choose another place"
                )
        _publish(folder, out, names, owned, progress)


def _publish(
    folder: Path, out: str, names: list[str], owned: re.Pattern[str], progress: Progress
) -> None:
    commit, target = names[-1], objects.local_path(out)
    objects.delete(objects.join(out, commit))
    for name in objects.list_names(out):
        if owned.fullmatch(name) and name not in names:
            objects.delete(objects.join(out, name))
    done: list[str] = []
    try:
        for name in names:
            done.append(name)
            if target is None:
                objects.upload(folder / name, objects.join(out, name))
            else:
                flush(folder / name)
                if name == commit:
                    # All other names are on the disk before the one that vouches for them.
                    flush(target)
                os.replace(folder / name, target / name)
            progress("files published", len(done), len(names))
        if target is not None:
            flush(target)
    except BaseException:
        for name in done:
            with contextlib.suppress(Exception):
                objects.delete(objects.join(out, name))
        raise
