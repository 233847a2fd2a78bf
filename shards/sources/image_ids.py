"""One id for an image that several files name differently, so that sentences meet their features.

    COCO_train2014_000000318556   COCO's file names of 2014        → coco/318556
    000000318556                  COCO's file names of 2017        → coco/318556
    318556                        a number in a file about COCO    → coco/318556
    2370799                       a number in a file about VG      → vg/2370799
    anything else                 stays as it is

A picture's ending after a name does not count, nor do folders before COCO's names and numbers.
"""

from __future__ import annotations

import re
from typing import Literal

Collection = Literal["coco", "vg"]

_ENDING = re.compile(r"\.(jpe?g|png|bmp|webp|gif)$", re.IGNORECASE)
_COCO_2014 = re.compile(r"COCO_(?:train|val|test)20\d\d_(\d{12})")
_COCO_2017 = re.compile(r"\d{12}")
_NUMBER = re.compile(r"\d{1,18}")


def image_id(name: str, numbers: Collection | None = None) -> str:
    """The id of an image that a file calls `name`; numbers: the collection of bare numbers, where
    that is known."""
    base = _ENDING.sub("", name)
    last = base.rpartition("/")[2]
    if match := _COCO_2014.fullmatch(last):
        return f"coco/{int(match[1])}"
    if _COCO_2017.fullmatch(last):
        return f"coco/{int(last)}"
    if numbers and _NUMBER.fullmatch(last):
        return f"{numbers}/{int(last)}"
    return base
