"""The folder that features go into: which pictures are in its tars, which failed, what is next.

    extract.json                            what all features there follow from
    regions-0002-of-0008-000000.tar         2,000 pictures of the 2nd of 8 partitions
    regions-0002-of-0008-000000.failures.jsonl      those of its pictures that failed
    regions-0002-of-0008-000000-r1.tar      those of them that a retry mended

A picture is done when a tar has it, and has failed when the list of a tar that is there names it:
what is next follows from the folder alone, after a kill, after pictures have been added, and with
another number of partitions. Memory grows by some 300 bytes with each picture.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.format.record import record_key
from shards.sources import tars
from shards.sources.pictures import is_text, pictures
from shards.store.atomic import written_whole

SETTINGS = "extract.json"
IN_TAR = 2000  # pictures, at most: 300 MB of 36 boxes

_STALE_S = 3600  # no run leaves a tar alone for so long while it writes it
_TAR = re.compile(r"regions-(\d{4})-of-(\d{4})-\d{6}(-r\d+)?\.tar")

_STEM = "regions-{:04d}-of-{:04d}"

Partition = tuple[int, int]
"""Which, from 1 on, of how many."""


@dataclass(frozen=True)
class Chunk:
    """The pictures of a tar that is to be written."""

    stem: Path
    """Of its file."""
    names: list[str]
    first: Path
    """The stem of the tar whose failures it takes up, else its own."""

    @property
    def tar(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.tar")

    @property
    def retries(self) -> bool:
        return self.stem != self.first


@dataclass(frozen=True)
class Plan:
    """What is there of a partition, and what is to be done."""

    there: int
    """Pictures in tars."""
    failed: int
    """Pictures that are listed as failed and will not be tried."""
    chunks: list[Chunk]

    @property
    def left(self) -> int:
        return sum(len(c.names) for c in self.chunks)


def plan(folder: Path, out: Path, partition: Partition, retry: bool) -> Plan:
    """What a run on the pictures below `folder` has to do; retry: only what has failed. DataError
    where there is no picture, or what is in `out` cannot be read."""
    every = [name for name, _ in pictures(str(folder))]
    if not every:
        raise DataError(f"{folder} has no picture: give a folder of .jpg or .png files")
    names = [name for name in every if _dealt(name, partition)]
    there, lists = _found(out, partition)
    done = {name for name in names if is_text(name) and record_key(name) in there}
    stem = _STEM.format(*partition)
    if retry:
        own = {path: listed for path, listed in lists.items() if path.name.startswith(stem)}
        if not own and lists:
            other = _TAR.fullmatch(f"{next(iter(lists)).name}.tar")
            assert other is not None
            raise DataError(
                f"{out} lists failures of {int(other[2])} partitions: try them again with "
                f"--partition I/{int(other[2])}"
            )
        there_now = set(names) - done
        chunks = []
        for path, listed in own.items():
            if again := [name for name in listed if name in there_now]:
                k = next(k for k in itertools.count(1) if not _tar(path, f"-r{k}").exists())
                chunks.append(Chunk(path.with_name(f"{path.name}-r{k}"), again, path))
        return Plan(len(done), 0, chunks)
    failed = {name for listed in lists.values() for name in listed}.intersection(names) - done
    todo = [name for name in names if name not in done and name not in failed]
    free = (s for k in itertools.count() if not _tar(s := out / f"{stem}-{k:06d}").exists())
    parts = (todo[k : k + IN_TAR] for k in range(0, len(todo), IN_TAR))
    return Plan(len(done), len(failed), [Chunk(s, p, s) for p, s in zip(parts, free, strict=False)])


def _dealt(name: str, partition: Partition) -> bool:
    """Whether a picture is of a partition; whatever other pictures there are."""
    i, n = partition
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n == i - 1


def _tar(stem: Path, suffix: str = "") -> Path:
    return stem.with_name(f"{stem.name}{suffix}.tar")


def _found(out: Path, partition: Partition) -> tuple[set[str], dict[Path, list[str]]]:
    """The keys in tars, and by their tar's stem the names that lists of failures have. Tars of
    other partitions of as many hold nothing of this one."""
    keys: set[str] = set()
    lists: dict[Path, list[str]] = {}
    for path in sorted(out.glob("regions-*.tar")):
        match = _TAR.fullmatch(path.name)
        if not match or (int(match[2]) == partition[1] and int(match[1]) != partition[0]):
            continue
        keys.update(_keys(path))
        stem = path.with_suffix("")
        if not match[3] and (listed := [entry["image"] for entry in failures_of(stem)]):
            lists[stem] = listed
    return keys, lists


def _keys(tar: Path) -> Iterator[str]:
    try:
        with tars.opened(str(tar)) as f:
            for sample in tars.samples(f, lambda _suffix: False):
                yield sample.key
    except tars.TarError as error:
        raise DataError(f"{tar}: {error}; remove it, and it is made again") from None


def sweep(out: Path, partition: Partition) -> None:
    """Remove what killed runs of a partition have left half-written."""
    for path in out.glob(f".{_STEM.format(*partition)}-*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()


# --- lists of failures --------------------------------------------------------------------------


def _list(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.failures.jsonl")


def failures_of(stem: Path) -> list[dict[str, str]]:
    """The list beside a tar: `{"image", "reason"}`; empty where there is none."""
    path = _list(stem)
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(e, dict) and isinstance(e.get("image"), str) for e in entries):
            raise ValueError("a line without an image")
        return entries
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}): remove it and its tar, and both are made again"
        ) from None


def list_failures(stem: Path, failures: list[dict[str, str]]) -> None:
    """Write the list beside a tar, or remove it where there are none."""
    path = _list(stem)
    if not failures:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as temporary:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in failures)
        # A name that is no UTF-8 becomes JSON's escape of it.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


# --- settings -----------------------------------------------------------------------------------


def check_settings(out: Path, settings: dict[str, object]) -> None:
    """The folder's settings are these, or there are none yet: then they are written. DataError
    where they are others."""
    path = out / SETTINGS
    text = json.dumps(settings, sort_keys=True, indent=1) + "\n"
    try:
        found = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    if found != text:
        raise DataError(
            f"{path} says that the regions there were made otherwise: {' '.join(found.split())}; "
            "features of several kinds are no substitutes, so choose another folder"
        )
