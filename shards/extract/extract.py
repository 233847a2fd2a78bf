"""Pictures → tars of regions, one partition of them.

A tar has the regions of up to 2,000 pictures, in the order of their names, and appears when it is
whole: what is there already is passed over, so a killed run goes on. What failed is listed beside
the tar (`….failures.jsonl`), for a run that tries these alone again. The same pictures and settings
give the same bytes on a CPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import DataError, explained
from shards.extract.boxes import Boxes
from shards.format.members import BOXES, LABELS
from shards.format.record import record_key
from shards.format.tar import TarWriter
from shards.progress import Progress, no_progress
from shards.sources import checks, tars
from shards.sources.features.grid import open_picture, pictures
from shards.store.atomic import written_whole

SETTINGS = "extract.json"
_IN_TAR = 2000  # pictures
_THREADS = 4  # that open pictures

Describe = Callable[[Sequence[tuple[str, Image.Image]]], list[tuple[Boxes, np.ndarray] | str]]
"""Names and pictures → the regions of each with their features (n, D), or why there are none."""

_Result = tuple[int, int, Boxes, np.ndarray]  # width, height, regions, features


@dataclass(frozen=True)
class Extraction:
    """What is asked for."""

    folder: Path
    """Of the pictures."""
    out: Path
    settings: dict[str, object]
    """What the features follow from; tars of others are not added to."""
    partition: tuple[int, int] = (1, 1)
    """Which of how many."""
    batch: int = 8
    retry_failed: bool = False
    """Only the pictures that have failed."""


@dataclass(frozen=True)
class Outcome:
    """What has become of it."""

    pictures: int
    """Of the partition, or of those that failed before."""
    there: int
    """In tars that were there already."""
    failed: int
    tars: int
    """Written now."""


@dataclass(frozen=True)
class _Chunk:
    """The pictures of a tar."""

    stem: Path
    """Of its files."""
    names: list[str]

    @property
    def tar(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.tar")

    @property
    def failures(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.failures.jsonl")


def chunks_of(given: Extraction) -> list[_Chunk]:
    """The tars of a partition, in order."""
    i, n = given.partition
    names = [name for k, (name, _) in enumerate(pictures(str(given.folder))) if k % n == i - 1]
    if not names and i == 1:
        raise DataError(f"{given.folder} has no picture: give a folder of .jpg or .png files")
    stem = f"regions-{i:04d}-of-{n:04d}"
    return [
        _Chunk(given.out / f"{stem}-{k // _IN_TAR:06d}", names[k : k + _IN_TAR])
        for k in range(0, len(names), _IN_TAR)
    ]


def extract(given: Extraction, describe: Describe, progress: Progress = no_progress) -> Outcome:
    """Write what is not there yet. DataError for a folder of other settings, and for what cannot be
    read or written as a whole; pictures that cannot be used are failures."""
    with explained(given.out):
        _check_settings(given)
        chunks = chunks_of(given)
        if given.retry_failed:
            chunks = [c for chunk in chunks if (c := _failed(chunk)).names]
        total, done, there, failed, written = sum(len(c.names) for c in chunks), 0, 0, 0, 0
        for chunk in chunks:
            if chunk.tar.exists() and not given.retry_failed:
                there += len(chunk.names)
            else:
                failed += _write(given, chunk, describe, partial(_tell, progress, done, total))
                written += 1
            done += len(chunk.names)
            progress("pictures", done, total)
        if not chunks:
            progress("pictures", 0, 0)
        return Outcome(total, there, failed, written)


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress("pictures", before + done, total)


def _check_settings(given: Extraction) -> None:
    """The folder's settings are these, or there are none yet."""
    path = given.out / SETTINGS
    text = json.dumps(given.settings, sort_keys=True, indent=1) + "\n"
    try:
        found = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        given.out.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    if found != text:
        raise DataError(
            f"{path} says that the regions there were made otherwise: {' '.join(found.split())}; "
            "features of several kinds are no substitutes, so choose another folder"
        )


def _failed(chunk: _Chunk) -> _Chunk:
    """The chunk of a chunk's failures that no earlier retry has mended."""
    names = [str(entry["image"]) for entry in _entries(chunk.failures)]
    for k in itertools.count(1):
        again = _Chunk(chunk.stem.with_name(f"{chunk.stem.name}-r{k}"), names)
        if not again.tar.exists():
            return again
        there = _keys(again.tar)
        names = [name for name in names if record_key(name) not in there]
    raise AssertionError


def _keys(tar: Path) -> set[str]:
    with tars.opened(str(tar)) as f:
        return {sample.key for sample in tars.samples(f, lambda _suffix: False)}


def _entries(path: Path) -> list[dict[str, object]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}): remove it and its tar, and both are made again"
        ) from None


def _write(
    given: Extraction, chunk: _Chunk, describe: Describe, told: Callable[[int], None]
) -> int:
    """Write a chunk's tar and list of failures; how many there are."""
    failures: list[dict[str, str]] = []
    count = 0
    with written_whole(chunk.tar) as temporary:
        writer = TarWriter(temporary)
        try:
            for done, (name, result) in enumerate(_described(given, chunk.names, describe), 1):
                problem = (
                    result if isinstance(result, str) else _append(writer, given, name, result)
                )
                if problem:
                    failures.append({"image": name, "reason": problem})
                else:
                    count += 1
                told(done)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        # What is listed nowhere would be lost: a first attempt lists before the tar appears, a
        # retry takes from the list after that.
        if not given.retry_failed:
            _write_failures(chunk.failures, failures)
        elif not count:
            temporary.unlink()  # nothing was mended
    if given.retry_failed:
        _write_failures(_first(chunk).failures, failures)
    return len(failures)


def _first(retry: _Chunk) -> _Chunk:
    """The chunk whose failures a retry's are."""
    return _Chunk(retry.stem.with_name(retry.stem.name.rpartition("-r")[0]), retry.names)


def _write_failures(path: Path, failures: list[dict[str, str]]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as temporary:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in failures)
        temporary.write_text("".join(lines), encoding="utf-8")


def _described(
    given: Extraction, names: list[str], describe: Describe
) -> Iterator[tuple[str, _Result | str]]:
    """Each picture's size, regions and features, or why there are none, in order; the next pictures
    are opened meanwhile."""

    def opened(name: str) -> Image.Image | str:
        try:
            return open_picture(given.folder / name)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = [names[k : k + given.batch] for k in range(0, len(names), given.batch)]
        ahead = [list(pool.map(opened, part)) for part in parts[:1]]
        for k, part in enumerate(parts):
            found = ahead.pop()
            coming = pool.map(opened, parts[k + 1]) if k + 1 < len(parts) else ()
            good = [(n, p) for n, p in zip(part, found, strict=True) if not isinstance(p, str)]
            results = iter(describe(good) if good else [])
            for name, picture in zip(part, found, strict=True):
                if isinstance(picture, str):
                    yield name, picture
                    continue
                result = next(results)
                yield name, result if isinstance(result, str) else (*picture.size, *result)
            ahead.append(list(coming))


def _append(writer: TarWriter, given: Extraction, name: str, result: _Result) -> str:
    """Write a record; why it cannot be, where it cannot."""
    width, height, regions, features = result
    try:
        half = checks.half(features)
    except ValueError as error:
        return str(error)
    key = record_key(name)
    document = {"image": name, "width": width, "height": height, "num_objects": len(half)}
    document |= {"extracted": given.settings}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    writer.add(f"{key}.json", text.encode())
    writer.add(f"{key}.{BOXES.suffix}", regions.boxes.astype("<f4").tobytes())
    if regions.labels is not None:
        columns = [getattr(regions.labels, c.name).astype(c.type).tobytes() for c in LABELS.columns]
        writer.add(f"{key}.{LABELS.suffix}", b"".join(columns))
    writer.add(f"{key}.features.f16", half.tobytes())
    return ""
