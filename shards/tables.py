"""The tables of a data set, merged to an index: of all shards at once, or of the shards in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shards.format.index import DatasetIndex, TableFile, merge, merge_into_file
from shards.format.manifest import Manifest
from shards.order.draws import I64

_AT_ONCE = 16  # tables that are fetched


class Tables:
    """Tables by shard number, and the index of those that were asked for last.

    manifest: of all shards; table_of: fetches and verifies a shard's table; in_use: the shards that
    the process uses now, by what is known of the order.
    """

    def __init__(
        self,
        manifest: Manifest,
        table_of: Callable[[int], TableFile],
        in_use: Callable[[], I64],
    ) -> None:
        self._manifest, self._table_of, self._in_use = manifest, table_of, in_use
        self._index: DatasetIndex | None = None

    def index(self, shards: I64) -> DatasetIndex:
        """An index that has these shards, distinct and rising, and perhaps others. It is made anew
        when others are needed: about twice in a window."""
        if self._index is None or not np.isin(shards, self._index.shard).all():
            self._index = None  # its memory goes before the new one's comes
            wanted = np.union1d(shards, self._in_use())
            self._index = merge(self._manifest, wanted, self._fetched(wanted))
        return self._index

    def merge_all(self, path: Path) -> None:
        """Write the index of all shards."""
        every = np.arange(len(self._manifest.shards))
        merge_into_file(path, self._manifest, every, self._fetched(every))

    def _fetched(self, shards: I64) -> Callable[[int], TableFile]:
        """Some tables, brought here side by side."""
        numbers = shards.tolist()
        with ThreadPoolExecutor(_AT_ONCE, "lxscale-tables") as pool:
            found = dict(zip(numbers, pool.map(self._table_of, numbers), strict=True))

        def table_of(number: int) -> TableFile:
            file = found[number]
            return file if file.verified.is_still() else self._table_of(number)

        return table_of
