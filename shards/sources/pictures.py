"""Pictures in a folder: their names, and their pixels as RGB, as they are stored.

A turn that EXIF asks for is not made: boxes of COCO and of bottom-up-attention are of the stored
pixels. What is transparent shows the colour beneath.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import DataError

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif"})
"""Of file names, in lower case, that are taken for pictures."""


def pictures(folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The pictures below a folder: their names relative to it, in the order of names; links to
    folders are not followed. DataError where the folder cannot be read."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            for name, picture in pictures(entry.path):
                yield f"{entry.name}/{name}", picture
        elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
            yield entry.name, entry


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8, as ids are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_picture(folder: Path, name: str) -> Image.Image:
    """A picture below a folder, as RGB. ValueError where it cannot be read, or is too large to be
    (Pillow's limit against decompression bombs)."""
    if not is_text(name):
        raise ValueError("its name is no UTF-8: rename it")
    path = folder / name
    try:
        if not path.is_file():
            raise ValueError("it is no file, or a link to none")
        with Image.open(path) as header:  # reads no pixel
            mode = header.mode
            if mode.startswith("I;16"):  # else Pillow makes all but the darkest white
                grey = np.asarray(header).astype(np.uint16) >> 8
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if mode not in ("I", "F"):
                return header.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture: {error}; replace it") from None
    raise ValueError(f"its pixels are of kind {mode}: save it with 8 bits a channel")
