"""A data set to another place, whole or some of its shards: `push` and `pull`.

Files go to a folder that is named after what is copied and what is at the place, several at a time,
each under a temporary name until its hash is right. The manifest comes last. So the same command,
given again after it was killed, finds what is whole, and of two at once both end well; where the
data set is at the place already, what is missing or damaged there is mended.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import DataError, NodeError, StoreError, explained
from shards.format.manifest import Counts, Manifest, load_manifest, with_pages
from shards.format.publish import commit, commit_point
from shards.format.shard_list import ShardList
from shards.format.staging import bring, staging_folder
from shards.progress import Progress, no_progress
from shards.store import objects
from shards.store.marks import identity_of
from shards.store.retry import Retry
from shards.store.stored import StoredFile, hash_file
from shards.tools.copying import copy, scratch

JOBS = 4


@dataclass(frozen=True)
class Transferred:
    """A data set at another place."""

    manifest: Manifest
    files: int
    """That were copied, or would be."""
    bytes: int
    """Of these."""
    there: int
    """Files that were whole there."""


def transfer(
    url: str,
    out: str,
    *,
    shards: Sequence[int] | None = None,
    name: str | None = None,
    jobs: int = JOBS,
    overwrite: bool = False,
    staging: Path | None = None,
    anew: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Transferred:
    """Copy the data set at `url` to `out`, folders or s3:// prefixes.

    shards: numbers of those to copy, from 0; the data set at `out` has these only, and its sets and
    words are numbered as before. name: of that data set, in place of the whole one's.
    jobs: files at a time, each with 64 MiB of memory in a store, and with room in `staging` where
    both places are stores.
    anew: mend nothing, as the files are to have a folder of their own.
    dry_run: say what would be copied; a file at `out` counts as whole by its size then.
    Raises DataError naming the file that is missing or damaged, the place that cannot be written,
    and a data set that is at `out`; what is whole stays for the same command to go on with.
    """
    whole = load_manifest(url)
    with scratch(staging) if dry_run else staging_folder(out, staging) as folder:
        manifest, sources = _chosen(whole, url, shards, name, folder)
        there = None if anew else _at(out)
        before = None
        if there is None or there.fingerprint != manifest.fingerprint:
            before, there = commit_point(out, overwrite), None
        target = there or replace(manifest, folder=_build_of(manifest, before), cleaned=0, fence="")
        place = target.place(out)
        # One listing, and not a question for each file.
        sizes = {found.name: found.size for found in objects.list_tree(place)}
        files = [_Copy(file, objects.join(place, name), sizes.get(name)) for name, file in sources]
        missing = [one.file for one in files if one.there != one.file.size]
        size = sum(file.size for file in missing)
        if dry_run:
            return Transferred(target, len(missing), size, len(files) - len(missing))
        _check_room(out, size)
        copied = _copy_all(files, folder, jobs, progress)
        if there is None:
            commit(out, target, before)
    return Transferred(target, len(copied), sum(copied), len(files) - len(copied))


def _chosen(
    manifest: Manifest, url: str, numbers: Sequence[int] | None, name: str | None, folder: Path
) -> tuple[Manifest, list[tuple[str, StoredFile]]]:
    """The manifest of some shards, or of all, and the files that it names; pages of its own are in
    `folder`."""
    place = manifest.place(url)
    if numbers is None:
        pages = [page.at(place) for page in manifest.pages]
    else:
        count, chosen = len(manifest.shards), sorted(set(numbers))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
            raise DataError(f"{url} has shards 0 to {count - 1}: choose among them")
        shards = ShardList.of((manifest.shards[i] for i in chosen), manifest.sources)
        totals = zip(manifest.sources, shards.pairs_per_source.sum(0).tolist(), strict=True)
        counts = Counts(int(shards.images.sum()), int(shards.pairs.sum()), dict(totals))
        manifest = replace(manifest, shards=shards, counts=counts, name=name or manifest.name)
        manifest = with_pages(replace(manifest, pages=()), folder)
        pages = [page.at(str(folder)) for page in manifest.pages]
    files = [file for s in manifest.shards for file in (s.tar_at(place), s.table_at(place))]
    files += [manifest.vocab.at(place), manifest.answers.at(place), *pages]
    return manifest, [(file.url.rpartition("/")[2], file) for file in files]


def _at(out: str) -> Manifest | None:
    """The data set at a place; None where there is none that can be read."""
    try:
        return load_manifest(out)
    except (StoreError, NodeError):
        raise
    except DataError:
        return None


def _build_of(manifest: Manifest, before: str | None) -> str:
    """The folder that a data set is copied to, where `before` is the tag of what is there."""
    digest = hashlib.sha256(json.dumps([manifest.fingerprint, before]).encode()).hexdigest()
    # Never eight digits, as of a date.
    return f"build-{'abcdef'[int(digest[0], 16) % 6]}{digest[1:8]}"


def _check_room(out: str, size: int) -> None:
    path = objects.local_path(out)
    if path is not None and size > (free := shutil.disk_usage(path).free):
        raise DataError(
            f"{out} has room for {free:,} bytes, and {size:,} are to come: make room, or name "
            "another place"
        )


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Copy:
    """A file, where it goes, and the size of what is there; None for nothing."""

    file: StoredFile
    to: str
    there: int | None

    @property
    def is_whole(self) -> bool:
        """Whether it is there; by its size alone in a store, where an upload is whole or not there
        at all, and every reader hashes it."""
        path = objects.local_path(self.to)
        same = self.there == self.file.size
        return same and (path is None or hash_file(path) == self.file.sha256)


def _copy_all(files: list[_Copy], folder: Path, jobs: int, progress: Progress) -> list[int]:
    """Copy those files that are not whole at their places, some at a time; the sizes of these. The
    first error ends it all."""
    over = threading.Event()
    retry = Retry(over=over)
    with ThreadPoolExecutor(jobs, "lxscale-transfer") as pool:
        running = [pool.submit(_copy_one, one, folder, retry) for one in files]
        try:
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                progress("files copied", done, len(files))
        except BaseException:
            over.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [one.file.size for one, f in zip(files, running, strict=True) if f.result()]


def _copy_one(one: _Copy, folder: Path, retry: Retry) -> bool:
    """Copy a file unless it is whole there; whether it was not."""
    if one.is_whole:
        return False
    file, to = one.file, one.to
    source = objects.local_path(file.url)
    if source is not None and objects.local_path(to) is None:
        _send(file, source, to, retry)
        return True
    # Not a page's name, which is made in the same folder.
    staged = copy(file, folder / f"{file.url.rpartition('/')[2]}.copy", retry)
    if objects.local_path(to) is None:
        objects.upload(staged, to, retry)
        staged.unlink()
    else:
        bring(staged, to)
    return True


def _send(file: StoredFile, source: Path, to: str, retry: Retry) -> None:
    """Upload a local file, which is what its manifest says before and after."""
    with explained(source):
        before = identity_of(source.stat())
        problem = file.problem(before[2], hash_file(source))
    if problem:
        raise DataError(f"{source} is damaged ({problem}): restore it or build it again")
    objects.upload(source, to, retry)
    if identity_of(source.stat()) != before:
        objects.delete(to)
        raise DataError(f"{source} changed while it was copied: let no one write to it")
