"""Pictures as they are described: RGB, as their pixels are stored.

A turn that EXIF asks for is not made: boxes of COCO and of bottom-up-attention are of the stored
pixels. What is transparent shows the colour beneath.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from shards.sources.features.grid import open_picture


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8, as ids are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_stored(folder: Path, name: str) -> Image.Image:
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
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture: {error}; replace it") from None
    if mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {mode}: save it with 8 bits a channel")
    return open_picture(path)
