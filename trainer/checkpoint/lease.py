"""The lease of a run's owner: a file that it rewrites every two seconds, for rivals to watch.

Nothing is decided by clocks of two machines: a rival compares what it read before with what it
reads now. The lease lies where lxscale 0.1.0 has its claims, under a name of the same kind, so that
jobs of that version stop, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from shards.errors import NotFoundError
from shards.store import objects
from shards.store.retry import Retry
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import checked_document, document_bytes, what_is_wrong
from trainer.checkpoint.process import Process

log = logging.getLogger("lxscale")

LEASE_FORMAT = "lxscale-lease-1"
OLD_CLAIM = b"{}"
"""What lxscale 0.1.0 writes as its claim, once, where leases are."""

BEAT_S = 2.0
"""Seconds between two writes of a lease."""
DEAD_S = 7.0
"""A lease that has not changed for so long is of a dead owner."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Lease:
    attempt: int
    job: str
    process: Process
    since: str
    """When the attempt began, in UTC."""
    beat: int
    """Counts the writes of the lease."""
    committed: int | None
    """Step of the attempt's last commit."""
    state: Literal["running", "ended"]

    @property
    def who(self) -> str:
        return f"{self.process}, since {self.since}"


_LEASE: TypeAdapter[Lease] = TypeAdapter(Lease)


def lease_bytes(lease: Lease) -> bytes:
    return document_bytes(LEASE_FORMAT, _LEASE.dump_python(lease))


def parse_lease(data: bytes, url: str) -> Lease | None:
    """The lease in `data`; None for a claim of lxscale 0.1.0, which says nothing. Raises
    CheckpointError, or NewerFormatError, naming `url`."""
    if data == OLD_CLAIM:
        return None
    checked_document(data, url, LEASE_FORMAT)
    try:
        return _LEASE.validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{url}: not a lease: {what_is_wrong(error)}") from None


def read_lease(url: str) -> bytes:
    """As it is stored; empty if it is not there."""
    try:
        return objects.read_bytes(url)
    except NotFoundError:
        return b""


def watch(url: str, before: bytes) -> bytes:
    """What a lease says once it is no more what it was `before`; `before` again if it does not
    change for DEAD_S seconds."""
    end = time.monotonic() + DEAD_S
    while time.monotonic() < end:
        time.sleep(_POLL_S)
        if (now := read_lease(url)) != before:
            return now
    return before


@dataclass(frozen=True)
class _OneTry(Retry):
    """A lease that cannot be written now is written at the next beat: nothing waits for it."""

    deadline: float = 0.0

    def attempt_time(self, attempt: int, left: float) -> float:
        return BEAT_S


ONE_TRY = _OneTry()


@dataclass
class Heart:
    """A thread that calls `beat(ended)` every BEAT_S seconds, at once when it is asked to, and with
    ended=True at the end. What `beat` raises is dropped: it is done again."""

    beat: Callable[[bool], None]
    _wake: threading.Event = field(default_factory=threading.Event, init=False)
    _ended: bool = field(default=False, init=False)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="lxscale-lease", daemon=True)
        self._thread.start()

    def soon(self) -> None:
        """Beat now."""
        self._wake.set()

    def stop(self) -> None:
        """Beat once more, and end; waits for that, but not for a store that is away."""
        self._ended = True
        self._wake.set()
        self._thread.join(2 * BEAT_S)

    def _run(self) -> None:
        ended = False
        while not ended:
            self._wake.clear()
            ended = self._ended
            try:
                self.beat(ended)
            except Exception as error:
                log.debug("lease: %s", error)
            if not ended:
                self._wake.wait(BEAT_S)
