"""Small JPEGs of the pictures that records are of, found by image id."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

from PIL import Image

_SIDE = 384  # pixels, the longer one
_QUALITY = 80
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")


def find_picture(folder: Path, image: str) -> Path | None:
    """The file of an image id in a folder: named as the id, with or without a suffix. An id may
    name folders below; one that leads out of the folder finds nothing."""
    parts = PurePosixPath(image).parts
    if not parts or "\0" in image or ".." in parts or PurePosixPath(image).is_absolute():
        return None
    for suffix in _SUFFIXES:
        path = folder / f"{image}{suffix}"
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name too long, or not valid Unicode
            return None
    return None


def thumbnail(path: Path) -> bytes | None:
    """A JPEG of at most 384 pixels a side; None where the file is no picture that can be read."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (_SIDE, _SIDE))  # a JPEG is then decoded small
            picture = opened.convert("RGB")
        picture.thumbnail((_SIDE, _SIDE))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=_QUALITY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return out.getvalue()
