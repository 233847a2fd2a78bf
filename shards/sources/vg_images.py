"""Which images of Visual Genome are COCO's: its image_data.json,
`[{"image_id", "coco_id", …}, …]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.sources.json_stream import list_items


@dataclass(frozen=True)
class VgImages:
    """Ids of the images that both have; sorted by Visual Genome's, 16 bytes an image."""

    vg: NDArray[np.int64]
    coco: NDArray[np.int64]

    def resolve(self, image: str) -> str:
        """`coco/M` for a `vg/N` that is one of COCO's; every other id as it is."""
        if not image.startswith("vg/"):
            return image
        number = int(image.removeprefix("vg/"))
        at = int(np.searchsorted(self.vg, number))
        same = at < len(self.vg) and int(self.vg[at]) == number
        return f"coco/{int(self.coco[at])}" if same else image


NO_VG_IMAGES = VgImages(np.empty(0, np.int64), np.empty(0, np.int64))


def load_vg_images(path: Path) -> VgImages:
    """Read image_data.json, streamed. DataError naming file and entry where it is not of the
    form."""
    vg, coco = [], []
    for i, entry in list_items(path, "file of Visual Genome's images"):
        ids = (entry.get("image_id"), entry.get("coco_id")) if isinstance(entry, dict) else (None,)
        if not isinstance(ids[0], int) or not isinstance(ids[-1], int | None):
            raise DataError(
                f"{path}: entry {i} has no image_id and coco_id: give Visual Genome's "
                "image_data.json"
            )
        if ids[1] is not None:
            vg.append(ids[0])
            coco.append(ids[1])
    order = np.argsort(np.asarray(vg, dtype=np.int64), kind="stable")
    return VgImages(np.asarray(vg, dtype=np.int64)[order], np.asarray(coco, dtype=np.int64)[order])
