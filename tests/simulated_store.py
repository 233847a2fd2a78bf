"""A store in memory, and owners that run the real code on it, one store operation at a time.

Every owner is a thread; one of them runs at any time, and hands over only before and after an
operation on the store, as a schedule says. So a run of them is a function of its schedule: what
fails once, fails again. `Store` checks what must hold at every moment.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from shards.errors import DataError, NotFoundError
from shards.store import create, objects, retry
from trainer.checkpoint import lease, owner
from trainer.checkpoint.chain import Claim, parse_link
from trainer.checkpoint.format import LINK_PATTERN
from trainer.checkpoint.generations import Generation
from trainer.checkpoint.process import this_process

RUN = "sim://bucket/run"


class Crash(BaseException):
    """The process dies here. Not an Exception: no code of a dead process goes on."""


class Wrong(BaseException):
    """Something that must hold does not. Not an Exception: no code takes it for the store's."""


class _RefusedError(OSError):
    """An answer with an error status, as s3fs raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": ""}}


Event = str
"""What befalls an operation: "" nothing; crash-before, crash-after; lost (done, but answered with
an error that is tried again); away (not done, and given up); unknown (done, and given up); 409."""

Events = Callable[[str, int], Event]
"""(owner's name, number of its operation) -> event"""


class Scheduler:
    """Lets one thread run at a time; `choose(names)` says which, whenever one reaches the store."""

    def __init__(self, choose: Callable[[list[str]], str]) -> None:
        self._choose = choose
        self._ready: dict[str, threading.Lock] = {}
        self._done = threading.Lock()
        self.failures: list[BaseException] = []
        self.current = ""
        self.running = False

    def run(self, programs: dict[str, Callable[[], None]]) -> None:
        """Run all programs to their ends; the first unexpected exception is raised."""
        self._ready = {name: threading.Lock() for name in programs}
        for lock in (*self._ready.values(), self._done):
            lock.acquire()
        self.running = True
        for name, program in programs.items():
            _pool(name).put(lambda name=name, program=program: self._main(name, program))
        self._hand_over()
        self._done.acquire()
        self.running = False
        self._done.release()
        if self.failures:
            raise self.failures[0]

    def _main(self, name: str, program: Callable[[], None]) -> None:
        self._ready[name].acquire()
        try:
            program()
        except Crash:
            pass
        except BaseException as error:
            self.failures.append(error)
        del self._ready[name]
        if self._ready:
            self._hand_over()
        else:
            self._done.release()

    def _hand_over(self) -> None:
        self.current = self._choose(sorted(self._ready))
        self._ready[self.current].release()

    def switch(self) -> None:
        """The running thread is about to use the store: perhaps another one goes first."""
        if not self.running:
            return
        own = self._ready[me := self.current]
        self.current = self._choose(sorted(self._ready))
        if self.current != me:
            self._ready[self.current].release()
            own.acquire()


_queues: dict[str, SimpleQueue[Callable[[], None]]] = {}


def _pool(name: str) -> SimpleQueue[Callable[[], None]]:
    """A thread that runs what is put there; kept for the next schedule."""
    if name not in _queues:
        queue = _queues[name] = SimpleQueue()

        def work() -> None:
            while True:
                queue.get()()

        threading.Thread(target=work, daemon=True).start()
    return _queues[name]


class Store:
    """What is stored, by URL, and what must hold of it."""

    def __init__(self, scheduler: Scheduler, events: Events, shuffle: random.Random) -> None:
        self.data: dict[str, bytes] = {}
        self.scheduler, self.events, self.shuffle = scheduler, events, shuffle
        self.counts: dict[str, int] = {}
        self.log: list[str] = []
        self.committed: list[Generation] = []
        """All generations in the order in which they came to be."""
        self.claims: list[tuple[str, Claim]] = []
        """All claims that count, with the name of the generation that was the newest then."""
        self.claim_urls: set[str] = set()
        self.needs: dict[str, set[str]] = {}
        """What a generation names, by its name: URLs."""
        self.live: dict[int, set[str]] = {}
        """Objects of saves under way, by attempt."""
        self.damaged: set[str] = set()
        """Names of generations that lack an object, by no fault of an owner's."""
        self.last = 0, 0
        """The last link that there ever was."""
        self.dead: set[str] = set()
        self.late: set[str] = set()
        """Names of generations that were written once more, after they had been removed."""

    @property
    def newest(self) -> Generation | None:
        """Where an owner is to go on."""
        whole = (g for g in reversed(self.committed) if g.name not in self.damaged)
        return next(whole, None)

    def damage(self) -> None:
        """Lose an object of the newest generation, where there is another one to go back to."""
        stored = [g for g in self.committed if g.url in self.data]
        if len(stored) > 1:
            self.data.pop(stored[-1].manifest.objects[0].url(RUN))
            self.damaged.add(stored[-1].name)

    @property
    def attempt(self) -> int:
        """Of the owner."""
        return self.claims[-1][1].attempt if self.claims else 0

    # --- operations -------------------------------------------------------------------------------

    def at(self, what: str, url: str, action: Callable[[], Any]) -> Any:
        """An operation of the running owner: others may come before and after it."""
        me = self.scheduler.current
        if me in self.dead:
            raise Crash
        self.scheduler.switch()
        number = self.counts[me] = self.counts.get(me, -1) + 1
        event = self.events(me, number) if self.scheduler.running else ""
        self.log.append(f"{me}{number} {what} {url.removeprefix(RUN)} {event}")
        if event.startswith("crash"):
            self.dead.add(me)
        if event == "crash-before":
            raise Crash
        if event == "away":
            raise DataError("away")
        if event == "409" and what == "create":
            raise _RefusedError(409)
        try:
            result = action()
        except AssertionError as error:
            raise Wrong(str(error)) from error
        if event == "crash-after":
            raise Crash
        if event == "unknown":
            raise DataError("no answer")
        if event == "lost" and what == "create":
            self.scheduler.switch()
            raise OSError("no answer")
        return result

    def put_new(self, url: str, data: bytes, until: float) -> None:
        def action() -> None:
            if url in self.data:
                raise _RefusedError(412)
            self.data[url] = data
            self._created(url, data)

        self.at("create", url, action)

    def write_bytes(self, url: str, data: bytes, *_: Any, **__: Any) -> None:
        def action() -> None:
            name = url.rpartition("/")[2]
            assert not LINK_PATTERN.fullmatch(name), f"{name} is written without a condition"
            self.data[url] = data

        self.at("write", url, action)

    def read_bytes(self, url: str, *_: Any) -> bytes:
        def action() -> bytes:
            if url not in self.data:
                raise NotFoundError(f"{url} does not exist")
            return self.data[url]

        found: bytes = self.at("read", url, action)
        return found

    def list_names(self, url: str, *_: Any) -> list[str]:
        def action() -> list[str]:
            names = [u.rpartition("/")[2] for u in self.data if u.rpartition("/")[0] == url]
            self.shuffle.shuffle(names)
            return names

        found: list[str] = self.at("list", url, action)
        return found

    def delete(self, url: str, *_: Any) -> None:
        def action() -> None:
            name = url.rpartition("/")[2]
            assert name not in self.live.get(self.attempt, ()), f"{name} is of a save under way"
            assert url not in self.claim_urls, "a claim is removed"
            self.data.pop(url, None)
            self._check_one_is_whole()

        self.at("delete", url, action)

    # --- what must hold ---------------------------------------------------------------------------

    def _created(self, url: str, data: bytes) -> None:
        """Checks the order of the links, as far as one can be wrong when it is made."""
        name = url.rpartition("/")[2]
        m = LINK_PATTERN.fullmatch(name)
        if not m:
            return
        link, (attempt, index) = parse_link(data, url), (int(m["attempt"]), int(m["index"]))
        newest = self.attempt
        if isinstance(link, Claim):
            # One that comes late, to a name that retention had freed, does not count.
            if (attempt, index) < self.last:
                return
            self.claim_urls.add(url)
            self.last = attempt, index
            assert (link.attempt, attempt) == (newest + 1, newest), "attempts in a wrong order"
            self.claims.append((self.newest.name if self.newest else "", link))
            return
        if any(g.name == name for g in self.committed):
            # A second try after a lost answer, when retention had freed the name.
            assert attempt < newest, f"{name} is committed twice by its owner"
            self.late.add(name)
            return
        assert attempt == link.attempt == newest, f"{name} is committed by a stale owner"
        last = [g.name for g in self.committed if g.manifest.attempt == attempt]
        assert index == len(last) + 1, f"{name} leaves a gap"
        self.last = attempt, index
        self.committed.append(Generation(RUN, name, link))
        self.needs[name] = {e.url(RUN) for e in (*link.objects, *link.journal)}
        self._check_whole(self.committed[-1])

    def _check_whole(self, generation: Generation) -> None:
        assert self.data.keys() >= self.needs[generation.name], f"{generation.name} is torn"

    def _check_one_is_whole(self) -> None:
        """Of the generations, the newest is there and whole, whatever else happens."""
        if newest := self.newest:
            assert newest.url in self.data, f"{newest.name}, the newest generation, is gone"
            self._check_whole(newest)


class StillHeart:
    """In place of the thread that renews a lease: it beats once at the start, and at the end."""

    def __init__(self, beat: Callable[[bool], None]) -> None:
        self.beat = beat
        beat(False)

    def soon(self) -> None:
        self.beat(False)

    def stop(self) -> None:
        self.beat(True)


@contextmanager
def simulated(patch: pytest.MonkeyPatch, current: Callable[[], Store]) -> Iterator[None]:
    """The functions that checkpoints use the store by are those of the store of the moment."""
    for name in ("write_bytes", "read_bytes", "list_names", "delete"):

        def call(url: str, *a: Any, _real: Any, _name: str, **k: Any) -> Any:
            # Leases of earlier tests may still be renewed, elsewhere.
            simulated = url.startswith(RUN)
            return (getattr(current(), _name) if simulated else _real)(url, *a, **k)

        real = getattr(objects, name)
        patch.setattr(objects, name, functools.partial(call, _real=real, _name=name))
    patch.setattr(create, "_put_new", lambda *a: current().put_new(*a))
    patch.setattr(retry, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))
    patch.setattr(owner, "Heart", StillHeart)
    me = this_process()
    patch.setattr(owner, "this_process", lambda: me)
    # All owners live in this process; who watches a lease sees whether it changes meanwhile.
    patch.setattr(owner, "watch", _watch)
    yield


def _watch(urls: Sequence[str], before: Sequence[bytes]) -> list[bytes]:
    now = list(before)
    for _ in range(2):
        now = [lease.read_lease(url) for url in urls]
    return now
