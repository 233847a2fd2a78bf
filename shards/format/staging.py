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
# There from before the first file is brought or removed until all are there: what lies beside it
# without a commit point is of a build that was killed.
_UNFINISHED = ".unfinished"


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


def check_free(out: str, commit: str, owned: re.Pattern[str]) -> None:
    """DataError where publishing at `out` would replace something: what has the commit point, or
    files of names of ours without one, which somebody else's shards may have, too."""
    names = objects.list_names(out)
    if commit in names:
        raise DataError(
            f"there is a data set at {out}: choose another place, or replace it with --overwrite"
        )
    taken = [name for name in names if owned.fullmatch(name)]
    if taken and _UNFINISHED not in names:
        raise DataError(
            f"{out} has {taken[0]}, but no {commit}: choose another place, or have --overwrite "
            f"remove it and everything else there that a data set's files may be called "
            f"({len(taken)} files)"
        )


def publish(
    folder: Path,
    out: str,
    names: list[str],
    owned: re.Pattern[str],
    progress: Progress,
    overwrite: bool,
) -> None:
    """Bring the staged files to `out`; the last of `names` is the commit point.

    An earlier commit point is removed before anything else changes, and files whose names match
    `owned` but are not in `names` go too; without `overwrite`, where either is there (see
    `check_free`) that is an error, and all stays as it is. When it fails, what it has brought is
    removed again.

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
        if not overwrite:
            check_free(out, names[-1], owned)
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
    unfinished = objects.join(out, _UNFINISHED)
    objects.write_bytes(unfinished, b"")
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
        with contextlib.suppress(Exception):
            if not any(owned.fullmatch(name) for name in objects.list_names(out)):
                objects.delete(unfinished)
        raise
    # Beside a commit point it says nothing: a store that is gone by now has lost nothing.
    with contextlib.suppress(DataError):
        objects.delete(unfinished)
