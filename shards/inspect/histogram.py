"""Histograms of what streams by: the memory that one takes does not grow with the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BINS = 12


@dataclass(frozen=True)
class Histogram:
    """How often values lie where: `counts[i]` of them from `edges[i]` up to `edges[i + 1]`."""

    edges: tuple[float, ...]
    """Rising. A value on an edge is in the bin that begins there, one on the last in the last."""
    counts: tuple[int, ...]
    whole: bool
    """Whether the values are whole numbers; the last edge is then one above the largest."""
    values: int
    """How many there are."""
    least: float
    most: float
    mean: float
    median: float | None = None
    """Of whole numbers: the least value that half of all do not exceed."""

    def span(self, i: int, scale: float = 1.0) -> str:
        """Bin i for people; scale: what values are multiplied by."""
        a, b = self.edges[i], self.edges[i + 1]
        if self.whole:
            return f"{a:,.0f}" if b - a <= 1 else f"{a:,.0f}–{b - 1:,.0f}"
        return f"{a * scale:g}–{b * scale:g}"


class WholeTally:
    """Counts whole numbers from 0. A number for each value up to the largest is in memory."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """[largest + 1]."""

    def add(self, values: NDArray[np.integer]) -> None:
        self.add_counts(np.bincount(values))

    def add_counts(self, counts: NDArray[np.int64]) -> None:
        """counts[v]: how many values are v."""
        if len(counts) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(counts) - len(self.counts)))
        self.counts[: len(counts)] += counts

    def histogram(self, bins: int = _BINS) -> Histogram:
        """At most so many bins, all of one width, from the least value on."""
        there = np.flatnonzero(self.counts)
        if not len(there):
            return Histogram((0.0, 1.0), (0,), True, 0, 0.0, 0.0, 0.0)
        least, most = int(there[0]), int(there[-1])
        width = -(-(most - least + 1) // bins)
        count = -(-(most - least + 1) // width)
        rows = np.zeros(count * width, dtype=np.int64)
        rows[: most - least + 1] = self.counts[least : most + 1]
        total = int(rows.sum())
        mean = float((there * self.counts[there]).sum() / total)
        return Histogram(
            edges=tuple(float(least + i * width) for i in range(count + 1)),
            counts=tuple(rows.reshape(count, width).sum(1).tolist()),
            whole=True,
            values=total,
            least=float(least),
            most=float(most),
            mean=mean,
            median=float(np.searchsorted(np.cumsum(self.counts), (total + 1) // 2)),
        )


class Tally:
    """Counts finite numbers between given edges; what lies beyond is in the first or last bin."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = np.asarray(edges, dtype=np.float64)
        self._counts = np.zeros(len(edges) - 1, dtype=np.int64)
        self._sum, self._least, self._most = 0.0, np.inf, -np.inf

    def add(self, values: ArrayLike) -> None:
        array = np.asarray(values, dtype=np.float64).reshape(-1)
        if not len(array):
            return
        place = np.searchsorted(self._edges, array, side="right") - 1
        place = np.clip(place, 0, len(self._counts) - 1)
        self._counts += np.bincount(place, minlength=len(self._counts))
        self._sum += float(array.sum())
        self._least = min(self._least, float(array.min()))
        self._most = max(self._most, float(array.max()))

    def histogram(self) -> Histogram:
        total = int(self._counts.sum())
        some = total > 0
        return Histogram(
            edges=tuple(self._edges.tolist()),
            counts=tuple(self._counts.tolist()),
            whole=False,
            values=total,
            least=self._least if some else 0.0,
            most=self._most if some else 0.0,
            mean=self._sum / total if some else 0.0,
        )
