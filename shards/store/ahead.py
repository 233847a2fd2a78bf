"""Threads that bring shards before they are needed, first things first.

Of a future without end they hold two places only: one among what is needed soon, which starts anew
at each change of windows, and one in all that comes after, which goes on from where it is.
"""

from __future__ import annotations

import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.util import Finalize

from shards.store.cache import FullError
from shards.store.locks import BusyError

log = logging.getLogger("lxscale")

_PAUSE = 0.5  # seconds before a shard that could not be had is tried again
_LONGEST_PAUSE = 60.0  # it doubles at every fault of the same shard
_END_S = 3.0  # that threads which are told to stop are waited for
_PASSED = 1000  # shards in a row that ask for nothing, before the next change is waited for

Wish = tuple[int, float, bool]
"""Shard, when it is needed, and whether that is soon."""


class Ahead:
    """Threads that fetch until they are told to stop.

    fetch(shard, after, placed, over): brings one, displacing what is due later than `after`, and
    calls `placed` when it has its room; stops once `over` is set. shards: how many there are.
    """

    def __init__(
        self,
        fetch: Callable[[int, float, Callable[[], None], threading.Event], None],
        threads: int,
        shards: int,
    ) -> None:
        self._fetch = fetch
        # Held by the thread that chooses a shard until that has its room: what is needed first
        # gets room first.
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._here = bytearray(shards)  # 1: brought, or being brought
        self._soon: Iterator[Wish] | None = None
        self._between: deque[Wish] = deque()  # what came between those that are needed soon
        self._later: Iterator[Wish] = iter(())
        self._later_at = -math.inf  # when the last one of these is needed
        self._patience = 0
        self._consumed = 0.0
        # Not before when, shard, displacing what is due after when.
        self._again: list[tuple[float, int, float]] = []
        self._refill: list[tuple[float, int]] = []  # the same, of what fills free room
        self._waiting: set[int] = set()  # needed soon, and not even placed
        self._not_before: dict[int, float] = {}
        self._faults: dict[int, int] = {}
        self._full_until = 0.0
        self._over = threading.Event()
        work = [
            threading.Thread(target=self._work, name="lxscale-fetch", daemon=True)
            for _ in range(threads)
        ]
        for thread in work:
            thread.start()
        # A process that ends stops them, too, be it a child of multiprocessing or not: what they
        # have half downloaded would stay behind.
        self._end = Finalize(None, _end, (self._over, self._changed, work), exitpriority=0)

    def want(self, upcoming: Iterator[Wish], consumed: float) -> None:
        """Take what comes from now on, in the order of need; consumed: the present."""
        with self._changed:
            self._soon, self._consumed, self._full_until = upcoming, consumed, 0.0
            self._between.clear()
            self._patience = _PASSED
            # These come once more if they are still needed soon.
            self._again.clear()
            self._waiting.clear()
            self._changed.notify_all()

    def lost(self, shards: list[int]) -> None:
        """Shards that are not here any more."""
        for shard in shards:
            self._here[shard] = 0

    def stop(self) -> None:
        """Break off what is under way, and wait a little for that."""
        self._end()

    def _work(self) -> None:
        """A thread's life: choose a shard, fetch it, remember how that went."""
        while True:
            self._turn.acquire()
            held = True

            def placed() -> None:
                nonlocal held
                if held:
                    held = False
                    self._turn.release()

            try:
                task = self._await()
                if task is None:
                    return
                problem: Exception | None = None
                try:
                    self._fetch(*task, placed, self._over)
                except Exception as error:
                    problem = error
                self._settle(*task, problem)
            finally:
                placed()

    def _await(self) -> tuple[int, float] | None:
        """The next shard to bring, and what may go for it; None when told to stop."""
        with self._changed:
            while not self._over.is_set():
                if task := self._take():
                    self._here[task[0]] = 1
                    self._waiting.discard(task[0])
                    return task
                self._changed.wait(_PAUSE if self._again or self._refill else None)
        return None

    def _take(self) -> tuple[int, float] | None:
        now = time.monotonic()
        if now < self._full_until:
            return None
        while self._again and self._again[0][0] <= now:
            _, shard, after = heapq.heappop(self._again)
            if self._is_wanted(shard, now):
                return shard, after
        if task := self._take_soon(now):
            return task
        # Free room is not filled before what is needed soon has its own.
        if self._waiting:
            return None
        while self._refill and self._refill[0][0] <= now:
            _, shard = heapq.heappop(self._refill)
            if self._is_wanted(shard, now):
                return shard, math.inf
        return self._take_later(now)

    def _is_wanted(self, shard: int, now: float) -> bool:
        return not self._here[shard] and self._not_before.get(shard, 0.0) <= now

    def _take_soon(self, now: float) -> tuple[int, float] | None:
        while self._soon is not None:
            wish = next(self._soon, None)
            if wish is None:
                self._soon = None
                break
            shard, when, soon = wish
            if not soon:
                self._between.append(wish)
                if len(self._between) >= _PASSED:
                    # From here on what is left is taken in order, unless that is done already.
                    if self._later_at <= when:
                        self._later = self._soon
                    self._soon = None
            elif not self._here[shard]:
                if (pause := self._not_before.get(shard, 0.0)) <= now:
                    return shard, when
                heapq.heappush(self._again, (pause, shard, when))
                self._waiting.add(shard)
        return None

    def _take_later(self, now: float) -> tuple[int, float] | None:
        while self._patience:
            wish = self._between.popleft() if self._between else next(self._later, None)
            if wish is None:
                self._patience = 0
                break
            shard, when, _ = wish
            self._later_at = max(self._later_at, when)
            if not self._is_wanted(shard, now) or when <= self._consumed:
                self._patience -= 1
                continue
            self._patience = _PASSED
            return shard, math.inf
        return None

    def _settle(self, shard: int, after: float, problem: Exception | None) -> None:
        with self._changed:
            if self._over.is_set():
                return
            if problem is None:
                self._faults.pop(shard, None)
                self._not_before.pop(shard, None)
                return
            self._here[shard] = 0
            pause = _PAUSE
            if isinstance(problem, FullError):
                # Room comes when files fall out of use; what is due later does not get it first.
                self._full_until = time.monotonic() + pause
            elif not isinstance(problem, BusyError):
                faults = self._faults[shard] = self._faults.get(shard, 0) + 1
                if faults == 1:
                    log.warning("not fetched ahead, tried again later: %s", problem)
                pause = min(_PAUSE * 2**faults, _LONGEST_PAUSE)
            at = self._not_before[shard] = time.monotonic() + pause
            if after == math.inf:
                heapq.heappush(self._refill, (at, shard))
            else:
                heapq.heappush(self._again, (at, shard, after))
                self._waiting.add(shard)
            self._changed.notify_all()


def _end(
    over: threading.Event, changed: threading.Condition, work: Sequence[threading.Thread]
) -> None:
    over.set()
    with changed:
        changed.notify_all()
    until = time.monotonic() + _END_S
    for thread in work:
        # Whoever drops the last reference to a loader may be any thread.
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))
