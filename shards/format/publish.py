"""Publishing a data set: its files in a folder of the build's own, then the manifest, at once.

A build of records writes below `<out>/build-<random>/`, where no other one does; one of users'
files in a folder whose name follows from what its bytes follow from (shards/convert). Nothing there
is changed again. The manifest, `<out>/manifest.json`, is the only commit point: created if there is
none, or replaced if it is still the one that the build began with. So of several builds to one
place one succeeds, and the others end with an error. Readers of a data set that is replaced go on
with its files, which `lxscale shards clean` removes when told to (clean.py).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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


_INDEX = "index-"


@dataclass
class Delivery:
    """A build that is being brought to its place, file by file."""

    out: str
    before: str | None
    """What `commit_point` gave when the build began."""
    mark: str
    """Like no other build's: its folder, or what the names of its files begin with."""
    beside: bool = False
    """Its files are beside the manifest, and have names that begin with the mark: those of an
    index, which belongs to tars that are there (shards/tools/index.py)."""
    done: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where its files go."""
        return self.out if self.beside else objects.join(self.out, self.mark)

    def bring(self, path: Path) -> None:
        """Bring a staged file there: a local place gets the file itself, a store a copy."""
        if not self.done and not self.beside and (local := objects.local_path(self.place)):
            # Not one that is there already, however unlikely.
            local.parent.mkdir(parents=True, exist_ok=True)
            local.mkdir()
        assert not self.beside or path.name.startswith(self.mark)
        self.done.append(objects.join(self.place, path.name))
        bring(path, self.done[-1])

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest; as it is there. DataError where another build, or a cleaning, has
        come in between."""
        committed = replace(manifest, folder="" if self.beside else self.mark)
        where = objects.join(self.out, MANIFEST)
        try:
            won = replace_bytes(where, committed.to_json(), self.before)
        except BaseException:
            # A store may have it in spite of the error, or will have: then it needs its files.
            if objects.local_path(where) is None or _may_name(where, self.mark):
                self.done.clear()
            raise
        if not won:
            raise _late(self.out)
        self.done.clear()  # they are the data set's now
        return committed


@contextlib.contextmanager
def delivery(out: str, before: str | None, *, beside: bool = False) -> Iterator[Delivery]:
    """A build to `out`; when the block fails, what it has brought is removed again."""
    # Never eight digits, as of a date.
    token = f"{secrets.choice('abcdef')}{secrets.token_hex(4)[1:]}"
    it = Delivery(out, before, f"{_INDEX}{token}-" if beside else f"build-{token}", beside)
    try:
        yield it
    except BaseException:
        remove(it.done)
        raise


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
    with delivery(out, before) as build:
        for number, name in enumerate(names, 1):
            build.bring(folder / name)
            progress("files published", number, len(names) + 1)
        committed = build.commit(manifest)
    progress("files published", len(names) + 1, len(names) + 1)
    return committed


def is_index(manifest: Manifest) -> bool:
    """Whether its tars are those of others, which an index stands beside."""
    return manifest.vocab.file.startswith(_INDEX)


def commit(out: str, manifest: Manifest, before: str | None) -> None:
    """Write the manifest of a data set whose files are in their places. DataError where another
    build, or a cleaning, has come in between."""
    if not replace_bytes(objects.join(out, MANIFEST), manifest.to_json(), before):
        raise _late(out)


def _late(out: str) -> DataError:
    return DataError(
        f"another build has finished at {out} meanwhile, or a cleaning: this one stops; look what "
        "is there, and run it again (with --overwrite, to replace that)"
    )


def _may_name(where: str, build: str) -> bool:
    """Whether a manifest in a folder may name the files of a build."""
    try:
        return build.encode() in objects.read_bytes(where)
    except NotFoundError:
        return False
    except DataError:
        return True
