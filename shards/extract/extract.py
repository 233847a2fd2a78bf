"""Pictures → tars of regions, one partition of them.

A tar appears when it is whole, and its pictures are done: a killed run goes on with the others.
What failed is listed beside the tar, for a run that tries these alone again. The same pictures and
settings, `batch` among them, give the same bytes on a CPU.
"""

from __future__ import annotations

import contextlib
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
from shards.extract.folder import (
    Chunk,
    Partition,
    check_settings,
    failures_of,
    list_failures,
    plan,
    sweep,
)
from shards.format.members import BOXES, FEATURES, LABELS
from shards.format.record import record_key
from shards.format.tar import TarWriter
from shards.progress import Progress, no_progress
from shards.sources import checks
from shards.sources.pictures import open_picture
from shards.store.atomic import written_whole

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
    partition: Partition = (1, 1)
    batch: int = 8
    retry_failed: bool = False
    """Only the pictures that have failed."""


@dataclass(frozen=True)
class Outcome:
    """What has become of the pictures of a partition."""

    pictures: int
    there: int
    """In tars that were there already."""
    failed: int
    """Listed as failed, by this run or one before."""
    tars: int
    """Written now."""


def extract(given: Extraction, describe: Describe, progress: Progress = no_progress) -> Outcome:
    """Write what is not there yet. DataError for a folder of other settings, and for what cannot be
    read or written as a whole; pictures that cannot be used are failures."""
    with explained(given.out):
        todo = plan(given.folder, given.out, given.partition, given.retry_failed)
        given.out.mkdir(parents=True, exist_ok=True)
        check_settings(given.out, given.settings)
        sweep(given.out, given.partition)
        done, failed, written = 0, todo.failed, 0
        progress("pictures", 0, todo.left)
        for chunk in todo.chunks:
            failed += _write(given, chunk, describe, partial(_tell, progress, done, todo.left))
            written += chunk.tar.exists()
            done += len(chunk.names)
    return Outcome(todo.there + todo.failed + todo.left, todo.there, failed, written)


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress("pictures", before + done, total)


def _write(given: Extraction, chunk: Chunk, describe: Describe, told: Callable[[int], None]) -> int:
    """Write a chunk's tar and list of failures; how many there are."""
    failures: list[dict[str, str]] = []
    with written_whole(chunk.tar, renaming=_alone(chunk.tar)) as temporary:
        writer = TarWriter(temporary)
        try:
            for done, (name, result) in enumerate(_described(given, chunk.names, describe), 1):
                problem = (
                    result if isinstance(result, str) else _append(writer, given, name, result)
                )
                if problem:
                    failures.append({"image": name, "reason": problem})
                told(done)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        # A list counts where its tar is there: it comes first, so that a kill loses nothing. A
        # retry takes from the list, which a kill must not do before the tar is there.
        if not chunk.retries:
            list_failures(chunk.stem, failures)
        elif len(failures) == len(chunk.names):
            temporary.unlink()  # nothing was mended
    if chunk.retries:
        tried = set(chunk.names)
        kept = [entry for entry in failures_of(chunk.first) if entry["image"] not in tried]
        list_failures(chunk.first, kept + failures)
    return len(failures)


@contextlib.contextmanager
def _alone(tar: Path) -> Iterator[None]:
    """Nobody else has written the tar meanwhile: what is there may hold other pictures."""
    if tar.exists():
        raise DataError(
            f"another run has written {tar.name} meanwhile: give each run a --partition of its own"
        )
    yield


def _described(
    given: Extraction, names: list[str], describe: Describe
) -> Iterator[tuple[str, _Result | str]]:
    """Each picture's size, regions and features, or why there are none, in order; the next pictures
    are opened meanwhile. Two batches of pictures are in memory."""

    def opened(name: str) -> Image.Image | str:
        try:
            return open_picture(given.folder, name)
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
    writer.add(f"{key}.{FEATURES.suffix}", half.tobytes())
    return ""
