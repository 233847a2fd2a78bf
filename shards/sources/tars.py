"""Samples of WebDataset tars that others wrote, read to a proven end.

A sample is a run of members with one key, the part of their names before the first dot after the
last slash; what follows is the suffix. Python's tarfile takes a header that is cut off, damaged or
zeroed for the end of the archive: here, an end is where nothing but zeros follows.
"""

from __future__ import annotations

import contextlib
import math
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import braceexpand

from shards.errors import DataError
from shards.store import objects

_LARGEST = 256 << 20  # bytes of a member; 1,000 boxes have 8 MB of features
_BYTES = 1 << 20  # read at a time
_MOST = 1_000_000  # tars of a pattern
# First bytes of compressed files, and what unpacks them.
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")
_COUNTED = re.compile(r"\0(\d+)\0")
# As webdataset: `__meta__` and the like belong to no sample.
_META = re.compile(r"__[^/]*__($|/)")
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


class TarError(DataError):
    """The tar is damaged from here on."""


@dataclass
class Sample:
    """Members of one key."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """The contents of those that were asked for, by suffix."""

    problem: str | None = None
    """Why it cannot be used, where that is known."""

    offset: int = 0
    """Where its first member begins in the tar."""

    places: dict[str, int] = field(default_factory=dict)
    """Where the contents of `members` begin in the tar."""


def expand(patterns: Iterable[str]) -> list[str]:
    """The tars of brace patterns (`{000..009}`): paths or s3:// URLs. Nothing is run: DataError for
    `pipe:` and every other kind of place, and for patterns of far too many."""
    found: list[str] = []
    for pattern in patterns:
        try:
            if (count := _count(pattern)) > _MOST:
                raise DataError(
                    f"{pattern} stands for {count:,} tars, and {_MOST:,} are the limit: check its "
                    "ranges"
                )
            found += braceexpand.braceexpand(pattern)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{pattern} is no brace pattern: {error}") from None
    for url in found:
        remote = objects.local_path(url) is None
        if url.startswith("pipe:") or (remote and not url.startswith("s3://")):
            raise DataError(f"{url} is no place that tars are read from: give paths or s3:// URLs")
    return found


def _count(pattern: str) -> int:
    """How many names a brace pattern stands for, at most; none is made. From the innermost braces
    outwards, each is replaced by its count between zero characters."""

    def product(text: str) -> int:
        return math.prod(int(count) for count in _COUNTED.findall(text))

    def counted(braces: re.Match[str]) -> str:
        if limits := _RANGE.fullmatch(braces[1]):
            first, last = (int(t) if t[-1].isdigit() else ord(t) for t in limits.group(1, 2))
            count = abs(last - first) // (int(limits[3] or 1) or 1) + 1
        else:
            count = sum(product(part) for part in braces[1].split(","))
        return f"\0{count}\0"

    text = re.sub(r"\\.", "", pattern)  # what is escaped is no brace and no comma
    while (outer := _BRACES.sub(counted, text)) != text:
        text = outer
    return product(text)


@contextlib.contextmanager
def opened(url: str, room: Path | None = None) -> Iterator[IO[bytes]]:
    """The tar's file; one in object storage is copied to a temporary file in `room` first.

    DataError for what can be no tar: a device, a pipe, a folder, a compressed file.
    """
    path = objects.local_path(url)
    with contextlib.ExitStack() as stack:
        try:
            if path is None:
                if room is not None:
                    room.mkdir(parents=True, exist_ok=True)
                f: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=room))
                objects.download(url, f)
                f.seek(0)
            elif path.exists() and not path.is_file():
                raise DataError(f"{url} is no plain file: give the paths of tars")
            else:
                f = stack.enter_context(open(path, "rb"))
            start = f.read(max(map(len, _COMPRESSED)))
            f.seek(0)
        except OSError as error:
            raise DataError(
                f"cannot read {url}: {error.strerror} ({error.filename or 'a temporary file'})"
            ) from None
        for magic, program in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(f"{url} is compressed, no plain tar: unpack it first ({program})")
        yield f


def samples(f: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The samples of an open tar in its order, with the members whose suffix is wanted.

    Raises TarError at damage; the sample that was read then is not yielded, as it may have lost
    members.
    """
    return _grouped(_members(f, lambda name: wanted(_split(name)[1])), wanted)


def sample_at(f: IO[bytes], offset: int, wanted: Callable[[str], bool]) -> Sample | None:
    """The sample whose first member begins there; None where none does. Of what comes after it, one
    header is read at most: damage there is another sample's."""
    f.seek(offset)
    first = ""

    def of_it(name: str) -> bool:
        nonlocal first
        key, suffix = _split(name)
        first = first or key
        return key == first and wanted(suffix)

    return next(_grouped(_members(f, of_it), wanted), None)


def _grouped(
    members: Iterator[tuple[tarfile.TarInfo, bytes | None]], wanted: Callable[[str], bool]
) -> Iterator[Sample]:
    sample: Sample | None = None
    for info, payload in members:
        key, suffix = _split(info.name)
        if not key or _META.match(info.name):
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key, offset=info.offset)
        if suffix in sample.members:
            sample.problem = f"{suffix} is there twice"
        elif payload is not None:
            sample.members[suffix] = payload
            sample.places[suffix] = info.offset_data
        elif wanted(suffix):
            sample.problem = f"{suffix} has {info.size:,} bytes, or is no plain file"
    if sample is not None:
        yield sample


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member's name, empty where it has no suffix."""
    match = _NAME.fullmatch(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else ("", "")


def _members(
    f: IO[bytes], wanted: Callable[[str], bool]
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Files of a tar, each with its content if its name is wanted and it is a plain file of a
    size that fits into memory."""
    try:
        tar = tarfile.open(fileobj=f, mode="r:")  # noqa: SIM115  it owns nothing
        while info := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
            if info.size < 0:
                raise ValueError("a member of less than no bytes")
            if info.isdir():
                continue
            payload = None
            plain = info.isreg() and not info.issparse() and info.size <= _LARGEST
            if plain and wanted(info.name):
                file = tar.extractfile(info)
                assert file is not None
                payload = file.read()
            yield info, payload
        end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
        raise TarError(f"it is damaged, cut off, or no plain tar ({error})") from None
    if problem := _after(f, end):
        raise TarError(problem)


def _after(f: IO[bytes], end: int) -> str | None:
    """What is wrong with the end of an archive whose last member ends before `end`."""
    f.seek(end)
    rest = f.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        return f"it is cut off: at byte {end:,} there is neither a member nor the end of a tar"
    while rest:
        if rest.strip(b"\0"):
            return f"at byte {end:,} there is neither a member nor the end of a tar: it is damaged"
        rest = f.read(_BYTES)
    return None
