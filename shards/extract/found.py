"""What a detector says of a picture, and which of it is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.extract.boxes import Boxes, with_labels

_OVERLAP = 0.7  # of two boxes of a class (IoU), above which they show one object
_SAME = 0.99  # of two boxes of any classes: one box, which some detectors name twice


@dataclass(frozen=True)
class Found:
    """All that a detector says of a picture."""

    boxes: NDArray[np.float32]
    """(n, 4), fractions."""
    label: NDArray[np.int64]
    score: NDArray[np.float32]

    def best(self, least: int, most: int, threshold: float) -> Boxes:
        """The surest boxes: those above the threshold, but `least` to `most` of them, as far as
        there are so many. Of boxes that repeat a surer one, none. ValueError where there are none.
        """
        good = (self.boxes[:, 2] > self.boxes[:, 0]) & (self.boxes[:, 3] > self.boxes[:, 1])
        good &= np.isfinite(self.score)
        order = np.argsort(-np.where(good, self.score, -np.inf), kind="stable")[: good.sum()]
        kept: list[int] = []
        for i in order.tolist():
            if len(kept) == most or (len(kept) >= least and self.score[i] < threshold):
                break
            overlap = _overlaps(self.boxes[i], self.boxes[kept])
            same_class = self.label[kept] == self.label[i]
            if not (overlap > np.where(same_class, _OVERLAP, _SAME)).any():
                kept.append(i)
        if not kept:
            raise ValueError("the detector finds no box in it")
        return with_labels(self.boxes[kept], self.label[kept], self.score[kept])


def _overlaps(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of a box with each of others (n, 4)."""
    corner = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(np.maximum(corner, 0), axis=1)
    area = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    out: NDArray[np.float32] = shared / (area - shared)
    return out
