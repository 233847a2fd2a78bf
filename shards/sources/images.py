"""Image records from a folder of pictures, without a detector.

The sentences file is a JSON list, one entry an image:

    [{"image": "images/0.png",                    a file name relative to the folder
      "sentences": [{"text": "what shape is it?",
                     "source": "vqa",             optional: the name of its set
                     "answers": {"circle": 1.0},  optional: answer → score 0..1
                     "id": 17}],                  optional: question id, string or integer
      "split": "train"}, …]                       optional

Regions are a fixed multi-scale grid instead of a detector's boxes (`grid_boxes`), features are
colour statistics and oriented gradients instead of a network's (`describe`). They are weak, and
good enough for simple pictures, demonstrations and tests: everything after them is the same.
"""

from __future__ import annotations

import multiprocessing
import signal
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.arguments import given_name, given_path, whole
from shards.errors import DataError
from shards.format.record import ImageRecord, Report, Sentence, check_sentence
from shards.json_files import read_list
from shards.processes import end_with_parent, make_home, without_signals
from shards.progress import Progress, no_progress
from shards.sources.source import Source

EXTRACTOR = "grid-colour-hog-2"  # change the number with anything that changes a feature

# Levels of each layout, (columns, rows), coarse to fine. A level of k boxes along an axis has boxes
# of 2/(k+1) of that side, each overlapping the next by half; one box covers the side.
LAYOUTS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 1),),
    5: ((1, 1), (2, 2)),
    10: ((1, 1), (3, 3)),
    14: ((1, 1), (2, 2), (3, 3)),
    36: ((1, 1), (3, 1), (1, 3), (2, 2), (3, 3), (4, 4)),
}

_SIDE = 32  # boxes are described at 32 × 32 pixels
_CHUNK = 32  # images a task of a worker


def grid_boxes(n: int = 36) -> NDArray[np.float32]:
    """The layout of n boxes, f32 (n, 4), x1 y1 x2 y2 in 0..1. DataError for an n without one.

    10 = the image and 3 × 3 half-overlapping quarters; 36 = the image, 3 upright and 3 level
    strips, 2 × 2, 3 × 3 and 4 × 4 boxes.
    """
    if n not in LAYOUTS:
        raise DataError(f"there is no grid of {n} boxes: choose one of {sorted(LAYOUTS)}")
    boxes = []
    for columns, rows in LAYOUTS[n]:
        for r in range(rows):
            for c in range(columns):
                boxes.append(
                    (
                        c / (columns + 1) if columns > 1 else 0.0,
                        r / (rows + 1) if rows > 1 else 0.0,
                        (c + 2) / (columns + 1) if columns > 1 else 1.0,
                        (r + 2) / (rows + 1) if rows > 1 else 1.0,
                    )
                )
    return np.asarray(boxes, dtype=np.float32)


def describe(
    image: Image.Image, boxes: NDArray[np.float32], feature_dim: int = 2048
) -> NDArray[np.float16]:
    """Features of the boxes of an RGB image, f16 (n, feature_dim), values in -1..1.

    Per box, resized to 32 × 32: mean and standard deviation of each channel (6); a joint colour
    histogram of 4 levels a channel (64) in which a pixel counts by how far it is from the picture's
    median colour, as square roots (Hellinger's map); 4 × 4 mean differences from that colour (48);
    a histogram of oriented gradients (Dalal & Triggs 2005; 9 orientations, cells of 8 × 8, blocks
    of 2 × 2: 324); zero-padded. Deterministic. Without the difference from the median, a plain
    background outweighs everything in front of it.
    """
    from skimage.feature import hog

    used = 6 + 64 + 48 + 324
    if feature_dim < used:
        raise DataError(f"feature_dim is {feature_dim}: these features need at least {used}")
    width, height = image.size
    out = np.zeros((len(boxes), feature_dim), dtype=np.float16)
    median = np.median(np.asarray(image, dtype=np.float32).reshape(-1, 3), axis=0) / 255.0
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = min(round(x1 * width), width - 1), min(round(y1 * height), height - 1)
        right, bottom = max(round(x2 * width), left + 1), max(round(y2 * height), top + 1)
        crop = image.resize(
            (_SIDE, _SIDE), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
        pixels = np.asarray(crop, dtype=np.float32) / 255.0
        flat = pixels.reshape(-1, 3)
        levels = np.minimum((flat * 4).astype(np.int64), 3)
        bins = levels @ np.asarray([16, 4, 1])
        difference = pixels - median
        weight = np.abs(difference).mean(axis=-1).reshape(-1)
        histogram = np.bincount(bins, weights=weight, minlength=64)
        histogram = np.sqrt(histogram / max(float(weight.sum()), 1.0))
        grid = difference.reshape(4, _SIDE // 4, 4, _SIDE // 4, 3).mean(axis=(1, 3))
        # The luminance weights of ITU-R BT.601.
        grey = pixels @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
        gradients = hog(grey, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
        parts = (flat.mean(axis=0), flat.std(axis=0), histogram, grid.reshape(-1), gradients)
        out[i, :used] = np.concatenate(parts)
    return out


@dataclass(frozen=True)
class ImageEntry:
    """One entry of a sentences file."""

    path: Path
    """Of the picture."""

    image: str
    """Its name in the file."""

    sentences: tuple[Sentence, ...]
    split: str | None


def read_entries(
    folder: str | Path, sentences: str | Path, source: str = "images"
) -> list[ImageEntry]:
    """Parse and check a sentences file; `source` is given to sentences that name none.

    Raises DataError naming file and entry for anything that is not of the format above, for
    pictures named twice, and for names that lead out of the folder.
    """
    entries: list[ImageEntry] = []
    seen: dict[str, int] = {}
    for i, item in enumerate(read_list(sentences, "file of sentences")):
        where = f"{sentences}: entry {i}"
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            raise DataError(f'{where} is not an object with an "image"')
        name = item["image"]
        where = f"{where} ({name})"
        if unknown := set(item) - {"image", "sentences", "split"}:
            raise DataError(f"{where} has an unknown key {sorted(unknown)[0]!r}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{where} leads out of the folder")
        if name in seen:
            raise DataError(
                f"{where} is the same image as entry {seen[name]}: join their sentences"
            )
        seen[name] = i
        given, split = item.get("sentences"), item.get("split")
        if not isinstance(given, list):
            raise DataError(f'{where} has no list of "sentences"')
        if split is not None and not isinstance(split, str):
            raise DataError(f"{where}: split is not a string")
        checked = tuple(
            check_sentence(s, f"{where}, sentence {j}", source) for j, s in enumerate(given)
        )
        entries.append(ImageEntry(Path(folder) / name, name, checked, split))
    return entries


def read_images(
    folder: str | Path,
    sentences: str | Path,
    *,
    boxes: int = 36,
    feature_dim: int = 2048,
    source: str = "images",
    workers: int | None = None,
    skip_bad: bool = False,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Iterator[ImageRecord]:
    """Records of a folder of pictures, in the order of the sentences file.

    workers: processes that describe pictures, 0 for none; None takes every core.
    skip_bad: pictures that cannot be read are left out and reported, instead of DataError.
    Pictures without sentences are left out and reported.
    """
    report = report if report is not None else Report()
    layout = grid_boxes(boxes)
    entries = []
    for entry in read_entries(folder, sentences, source):
        if entry.sentences:
            entries.append(entry)
        else:
            report.add("images without sentences", entry.image)
    done = 0
    for chunk, results in _described(entries, layout, feature_dim, workers):
        for entry, result in zip(chunk, results, strict=True):
            done += 1
            if isinstance(result, str):
                if not skip_bad:
                    raise DataError(f"{result}; replace it, or leave such out with --skip-bad")
                report.add("images that cannot be read", result)
                continue
            width, height, features = result
            yield ImageRecord(
                image=entry.image,
                width=width,
                height=height,
                boxes=layout,
                features=features,
                sentences=entry.sentences,
                split=entry.split,
            )
        progress("images read", done, len(entries))


Described = tuple[int, int, NDArray[np.float16]] | str


def _described(
    entries: list[ImageEntry],
    layout: NDArray[np.float32],
    feature_dim: int,
    workers: int | None,
) -> Iterator[tuple[list[ImageEntry], list[Described]]]:
    """Chunks of entries with their results, in order; few chunks are in memory at a time."""
    chunks = [entries[i : i + _CHUNK] for i in range(0, len(entries), _CHUNK)]
    workers = multiprocessing.cpu_count() if workers is None else workers
    workers = min(workers, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield chunk, _describe_files([e.path for e in chunk], layout, feature_dim)
        return
    make_home()
    # Spawned: a forked child inherits locks that other threads of this process may hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    waiting: deque[tuple[list[ImageEntry], Future[list[Described]]]] = deque()
    try:
        for chunk in chunks:
            paths = [e.path for e in chunk]
            with without_signals(signal.SIGINT):  # the first starts the processes
                future = pool.submit(_describe_files, paths, layout, feature_dim)
            waiting.append((chunk, future))
            if len(waiting) > 3 * workers:
                first, ready = waiting.popleft()
                yield first, ready.result()
        for first, ready in waiting:
            yield first, ready.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _describe_files(
    paths: list[Path], layout: NDArray[np.float32], feature_dim: int
) -> list[Described]:
    """(width, height, features) of each picture, or what is wrong with it."""
    out: list[Described] = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            out.append(f"cannot read the picture {path}: {error}")
            continue
        out.append((*image.size, describe(image, layout, feature_dim)))
    return out


# --- `lxscale shards build images` --------------------------------------------------------------


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", required=True, type=given_path, metavar="DIR")
    add("--sentences", required=True, type=given_path, metavar="JSON")
    add("--boxes", type=whole(1), default=36, help=f"boxes a picture: {sorted(LAYOUTS)}")
    add("--source", type=given_name, default="images", help="set of sentences that name none")
    add("--workers", type=whole(0), help="processes (default: one per core)")


def _read(args: Namespace, report: Report, progress: Progress) -> Iterator[ImageRecord]:
    return read_images(
        args.images,
        args.sentences,
        boxes=args.boxes,
        feature_dim=args.feature_dim,
        source=args.source,
        workers=args.workers,
        skip_bad=args.skip_bad,
        report=report,
        progress=progress,
    )


SOURCE = Source(
    help="a folder of pictures and a sentences file",
    extractor=EXTRACTOR,
    add_arguments=_add_arguments,
    read=_read,
)
