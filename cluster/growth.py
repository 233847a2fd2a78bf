"""Room for more workers than a group has, asked for beside it while it trains.

It is asked for as placement groups that wait for room: an autoscaler sees the demand, and what is
there is held for this run until its workers have saved and start again in more of it.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from ray.util.placement_group import PlacementGroup, placement_group_table

from cluster.bounded import StillBusyError, bounded
from cluster.group import close
from cluster.placing import ask_for_room, number
from trainer.config import RunConfig

# Seconds between two looks, and for an answer of Ray's head to one.
_LOOK_S, _ANSWER_S = 2.0, 2.0
# Seconds to the next look, where a due growth is put off.
_PUT_OFF_S = 10.0
# Sizes above the group's that are asked for at a time.
_MOST = 64


class Growth:
    """What is asked for beside a group of `now` workers. `close` gives it back."""

    def __init__(
        self,
        config: RunConfig,
        now: int,
        avoid: Callable[[], frozenset[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """avoid: nodes that are not to be used. clock: seconds."""
        self._config, self._now, self._avoid, self._clock = config, now, avoid, clock
        self._asked: list[tuple[int, PlacementGroup]] = []
        self._since: float | None = None
        """Since when there has been room for `_size` workers."""
        self._size = now
        self._began = self._look_at = clock()
        with contextlib.suppress(StillBusyError):
            for more in steps_up(config.world_sizes, now):
                self._asked.append((more, ask_for_room(config.cluster, more, avoid())))

    def due(self) -> int:
        """How many workers the run is to have from now on, if more; 0 if not. Cheap: looks at the
        cluster every two seconds."""
        now, patience = self._clock(), self._config.cluster.grow_after_s
        if now >= self._look_at and self._asked:
            self._look_at = now + _LOOK_S
            size = self._looked()
            if size != self._size:
                self._size, self._since = size, now
        if self._since is None or self._size == self._now:
            return 0
        return self._size if now - max(self._since, self._began) >= patience else 0

    def put_off(self) -> None:
        """This is no time for it."""
        self._size, self._since, self._look_at = self._now, None, self._clock() + _PUT_OFF_S

    def _looked(self) -> int:
        """How many workers there is room for now."""
        try:
            tables = bounded(lambda: [placement_group_table(r) for _, r in self._asked], _ANSWER_S)
        except Exception:  # Ray's head does not answer, which is others' to find
            return self._now
        there = [
            (more, frozenset(table["bundles_to_node_id"].values()))
            for (more, _), table in zip(self._asked, tables, strict=True)
            if table["state"] == "CREATED"
        ]
        avoided = self._avoid() if there else frozenset()
        return number(
            self._config, self._now + sum(more for more, nodes in there if not nodes & avoided)
        )

    def close(self) -> None:
        for _, room in self._asked:
            close(room)
        self._asked = []


def steps_up(sizes: Sequence[int], now: int) -> list[int]:
    """How many workers each number of `sizes` above `now` has more than the one before."""
    above = sizes[bisect_right(sizes, now) :][:_MOST]
    return [b - a for a, b in pairwise([now, *above])]
