"""Checking a data set: every byte against its hash, every member against its table.

Shards are checked side by side by several processes, all of them or some, and what was found whole
can be kept in a file, so that a check that was interrupted goes on where it was.
"""

from __future__ import annotations

import base64
import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from io import RawIOBase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError, NodeError, node_error
from shards.format.manifest import Manifest, load_manifest
from shards.format.sentences import SentenceEncoder
from shards.format.shard_list import ShardInfo
from shards.format.verify_shard import HASH, Check, make_encoder, verify_shard
from shards.processes import end_with_parent, make_home, without_signals
from shards.progress import Progress, no_progress
from shards.store import objects
from shards.store.folders import owned_folder

_AHEAD = 4  # shards that wait for each process
_WORTH = 64 << 20  # bytes, which take a process longer than its start


@dataclass(frozen=True)
class Found:
    """What a shard's check has found."""

    shard: int
    problems: list[str]
    images: bytes
    """A hash of each image's id, of HASH bytes."""


def verify(
    url: str | Path,
    progress: Progress = no_progress,
    *,
    jobs: int | None = None,
    shards: Sequence[int] | None = None,
    state: Path | None = None,
) -> list[str]:
    """Everything that is wrong with the data set at `url`, one sentence each; empty when it is
    whole. Object storage is read shard by shard through the system's temporary folder, past the
    cache.

    jobs: processes, by default one a core where there is enough to do. shards: numbers of those to
    check, by default all.
    state: a file of the shards that were found whole, which are not checked again.
    Raises DataError only where the manifest or the state cannot be read; StoreError and NodeError
    where the store or this machine, and not the data, is at fault.
    """
    manifest = load_manifest(str(url))
    count = len(manifest.shards)
    chosen = sorted(set(range(count) if shards is None else shards))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise DataError(f"{url} has shards 0 to {count - 1}, not {chosen[0]} to {chosen[-1]}")
    state = Path(os.path.realpath(state)) if state else None
    before = _read_state(state, manifest, str(url)) if state else {}
    whole = {i: before[i] for i in chosen if i in before}
    if whole:
        progress("shards found whole before", len(whole), len(whole))
    found = {i: Found(i, [], images) for i, images in whole.items()}
    with owned_folder(Path(tempfile.gettempdir()), "lxscale-verify-") as folder:
        check = Check(manifest.place(str(url)), manifest, folder)
        encoder = make_encoder(check)
        problems = list(check.problems)
        left = [i for i in chosen if i not in found]
        with _opened(state, manifest, str(url), before) as file:
            for one in _checked(
                check, encoder, left, min(jobs or _jobs(manifest, left), len(left))
            ):
                found[one.shard] = one
                if state and file and not one.problems:
                    _note(state, file, _line(manifest.shards[one.shard], one.images))
                progress("shards verified", len(found), len(chosen))
        if not left:
            progress("shards verified", len(chosen), len(chosen))
    for i in chosen:
        problems += found[i].problems
    return problems + _twice(manifest, [found[i] for i in chosen])


def _jobs(manifest: Manifest, shards: list[int]) -> int:
    """Processes that are worth their start: one a core, and no more than there is work for."""
    total = int(manifest.shards.size[np.asarray(shards, dtype=np.int64)].sum())
    return min(len(os.sched_getaffinity(0)), 1 + total // _WORTH)


def _twice(manifest: Manifest, found: list[Found]) -> list[str]:
    """Images that come more than once, in whichever shards."""
    hashes = np.frombuffer(b"".join(f.images for f in found), dtype=f"V{HASH}")
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    ends = np.cumsum([len(f.images) // HASH for f in found])
    out = []
    for couple in sorted(sorted(order[i : i + 2].tolist()) for i in same.tolist()):
        where = []
        for image in couple:
            at = int(np.searchsorted(ends, image, side="right"))
            first = int(ends[at - 1]) if at else 0
            where.append(f"record {image - first} of {manifest.shards[found[at].shard].name}")
        out.append(f"an image comes twice in the data set: {where[0]} is {where[1]}")
    return out


# --- processes ----------------------------------------------------------------------------------


def _checked(
    check: Check, encoder: SentenceEncoder | None, shards: list[int], jobs: int
) -> Iterator[Found]:
    """What is found in each of some shards, as it is."""
    if jobs <= 1:
        for i in shards:
            own = replace(check, problems=[])
            images = verify_shard(own, check.manifest.shards[i], encoder)
            yield Found(i, own.problems, images)
        return
    make_home()
    context = multiprocessing.get_context("spawn")
    # A process needs what is said of the data set, and one shard at a time.
    bare = replace(check, manifest=replace(check.manifest, shards=check.manifest.shards[:0]))
    pool = None
    try:
        pool = ProcessPoolExecutor(jobs, context, _begin, (bare,))
        waiting = iter(shards)
        with without_signals(signal.SIGINT):  # the first of them start the processes
            running = {
                pool.submit(_in_process, i, check.manifest.shards[i])
                for i in islice(waiting, jobs * _AHEAD)
            }
        while running:
            done = next(as_completed(running))
            running.discard(done)
            for i in waiting:
                running.add(pool.submit(_in_process, i, check.manifest.shards[i]))
                break
            yield done.result()
    except BrokenProcessPool:
        raise NodeError(
            "a process of the check was killed, perhaps for lack of memory: run it again, with "
            "fewer --jobs; with --state it goes on where it was"
        ) from None
    except OSError as error:  # of what processes need beside the files
        raise node_error(check.folder, error) from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


_check: Check
_encoder: SentenceEncoder | None


def _begin(check: Check) -> None:
    global _check, _encoder
    end_with_parent()
    # Other processes fetch at the same time: each has a folder of its own.
    folder = check.folder / str(os.getpid())
    folder.mkdir()
    _check = replace(check, folder=folder, problems=[])
    _encoder = make_encoder(_check)


def _in_process(number: int, shard: ShardInfo) -> Found:
    check = replace(_check, problems=[])
    images = verify_shard(check, shard, _encoder)
    return Found(number, check.problems, images)


# --- state --------------------------------------------------------------------------------------


def _head(manifest: Manifest, url: str) -> dict[str, str]:
    """What a state is of: the data, and this place of it, not a copy."""
    place = manifest.place(url)
    local = objects.local_path(place)
    return {"verified": manifest.fingerprint, "at": os.path.realpath(local) if local else place}


def _read_state(path: Path, manifest: Manifest, url: str) -> dict[int, bytes]:
    """Shard -> the hashes of its images, of shards that were found whole before."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if lines == [b""]:  # as of mktemp
        return {}
    number = {name.decode(): i for i, name in enumerate(manifest.shards.name.tolist())}
    out = {}
    try:
        head, *rest = lines[:-1]  # the last line is empty, or cut off by a crash
        if _entry(head) != _head(manifest, url):
            raise DataError(f"{path} is of another data set: name another file for --state")
        for line in rest:
            entry = _entry(line)
            i = number[entry["shard"]]
            images = base64.b64decode(entry["images"], validate=True)
            shard = manifest.shards[i]
            if [shard.sha256, shard.table_sha256] != entry["sha256"]:
                raise ValueError("another hash")
            if len(images) != HASH * shard.images:
                raise ValueError("another number of images")
            out[i] = images
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is no state of a check ({error}): name another file for --state"
        ) from None
    return out


@contextlib.contextmanager
def _opened(
    path: Path | None, manifest: Manifest, url: str, before: dict[int, bytes]
) -> Iterator[RawIOBase | None]:
    """The state file, open to be added to."""
    if path is None:
        yield None
        return
    # Written anew: without a line that a crash has cut off.
    lines = [_checked_line(_head(manifest, url))]
    lines += [_line(manifest.shards[i], images) for i, images in before.items()]
    objects.write_bytes(str(path), b"".join(lines))
    with open(path, "ab", buffering=0) as file:
        yield file


def _note(path: Path, file: RawIOBase, line: bytes) -> None:
    problem = "No space left on device"
    try:
        if file.write(line) == len(line):
            return
    except OSError as error:
        problem = error.strerror or str(error)
    raise NodeError(
        f"cannot write {path}: {problem}: make room there and run it again, it goes on from what "
        "is in it; or name another file for --state"
    )


def _line(shard: ShardInfo, images: bytes) -> bytes:
    return _checked_line(
        {
            "shard": shard.name,
            "sha256": [shard.sha256, shard.table_sha256],
            "images": base64.b64encode(images).decode(),
        }
    )


def _checked_line(entry: dict[str, Any]) -> bytes:
    """A line of a state, after its checksum."""
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _entry(line: bytes) -> Any:
    """What `_checked_line` has written; ValueError where it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("a damaged line")
    return json.loads(text)
