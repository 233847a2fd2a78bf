"""Which images of Visual Genome are COCO's: its image_data.json,
`[{"image_id", "coco_id", …}, …]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.sources.json_stream import list_items

_VG = re.compile(r"vg/([0-9]{1,18})")  # other names may begin so: pictures in a folder `vg`
_MOST = 10**18  # as `image_ids` has numbers


@dataclass(frozen=True)
class VgImages:
    """Ids of the images that both have; sorted by Visual Genome's, 16 bytes an image."""

    vg: NDArray[np.int64]
    coco: NDArray[np.int64]

    def resolve(self, image: str) -> str:
        """`coco/M` for a `vg/N` that is one of COCO's; every other id as it is."""
        if not (match := _VG.fullmatch(image)):
            return image
        number = int(match[1])
        at = int(np.searchsorted(self.vg, number))
        same = at < len(self.vg) and int(self.vg[at]) == number
        return f"coco/{int(self.coco[at])}" if same else image


NO_VG_IMAGES = VgImages(np.empty(0, np.int64), np.empty(0, np.int64))


def load_vg_images(path: Path) -> VgImages:
    """Read image_data.json, streamed. DataError naming file and entry where it is not of the
    form."""
    vg, coco = [], []
    for i, entry in list_items(path, "file of Visual Genome's images"):
        found = entry if isinstance(entry, dict) else {}
        number, same = found.get("image_id"), found.get("coco_id")
        if not _is_id(number) or not (same is None or _is_id(same)):
            raise DataError(
                f"{path}: entry {i} has no image_id and coco_id: give Visual Genome's "
                "image_data.json"
            )
        if same is not None:
            vg.append(number)
            coco.append(same)
    order = np.argsort(np.asarray(vg, dtype=np.int64), kind="stable")
    return VgImages(np.asarray(vg, dtype=np.int64)[order], np.asarray(coco, dtype=np.int64)[order])


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST
