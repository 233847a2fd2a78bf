"""Publishing a data set: its files in a folder of the build's own, then the manifest, at once.

A build writes below `<out>/build-<random>/`, where no other one does, and nothing there is changed
again. The manifest, `<out>/manifest.json`, is the only commit point: created if there is none, or
replaced if it is still the one that the build began with. So of several builds to one place one
succeeds, and the others end with an error and leave nothing. Readers of a data set that is replaced
go on with its files, which `lxscale shards clean` removes when told to (clean.py).
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import replace
from pathlib import Path

from shards.errors import DataError, NotFoundError
from shards.format.manifest import MANIFEST, Manifest, tombstone
from shards.format.staging import bring, remove
from shards.progress import Progress
from shards.store import objects
from shards.store.create import check_conditions, replace_bytes


def commit_point(out: str, overwrite: bool) -> str | None:
    """The tag of the manifest at `out`, which a build may replace; None where there is none.
    DataError where it is a data set's and may not be, and where the store cannot keep two builds
    apart."""
    tag: str | None = None
    with contextlib.suppress(NotFoundError):
        data, tag = objects.read_tagged(objects.join(out, MANIFEST))
        if not overwrite and tombstone(data) is None:
            raise DataError(
                f"there is a data set at {out}: choose another place, or replace it with "
                "--overwrite"
            )
    check_conditions(out)
    return tag


def publish(
    folder: Path,
    out: str,
    manifest: Manifest,
    names: list[str],
    before: str | None,
    progress: Progress,
) -> Manifest:
    """Bring the staged files `names` and the manifest to `out`; the manifest as it is there.

    before: what `commit_point` gave when the build began. When it fails, what it has brought is
    removed again. Raises DataError where another build, or a cleaning, has come in between.
    """
    # Never eight digits, as of a date.
    build = f"build-{secrets.choice('abcdef')}{secrets.token_hex(4)[1:]}"
    committed = replace(manifest, folder=build)
    place, where = objects.join(out, build), objects.join(out, MANIFEST)
    if (local := objects.local_path(place)) is not None:
        # Not one that is there already, however unlikely.
        local.parent.mkdir(parents=True, exist_ok=True)
        local.mkdir()
    done: list[str] = []
    try:
        for name in names:
            done.append(objects.join(place, name))
            bring(folder / name, done[-1])
            progress("files published", len(done), len(names) + 1)
        try:
            won = replace_bytes(where, committed.to_json(), before)
        except BaseException:
            # A store may have it in spite of the error, or will have: then it needs its files.
            if local is None or _may_name(where, build):
                done.clear()
            raise
        if not won:
            raise DataError(
                f"another build has finished at {out} meanwhile, or a cleaning: this one stops; "
                "look what is there, and run it again (with --overwrite, to replace that)"
            )
    except BaseException:
        remove(done)
        raise
    progress("files published", len(names) + 1, len(names) + 1)
    return committed


def _may_name(where: str, build: str) -> bool:
    """Whether a manifest in a folder may name the files of a build."""
    try:
        return build.encode() in objects.read_bytes(where)
    except NotFoundError:
        return False
    except DataError:
        return True
