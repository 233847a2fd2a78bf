"""The leases of a run's owner: files that are rewritten every two seconds, for rivals to watch.

One is rank 0's, for its attempt. Another one is the job's: the driver rewrites it, so that the run
has an owner while its workers are being replaced, too. Nothing is decided by clocks of two
machines: a rival compares what it read before with what it reads now.

An attempt's lease lies where lxscale 0.1.0 has its claims, under a name of the same kind, so that
jobs of that version stop, too.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from shards.errors import DataError, NotFoundError
from shards.store import objects
from shards.store.retry import Retry
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import (
    checked_document,
    document_bytes,
    job_lease_url,
    what_is_wrong,
)
from trainer.checkpoint.process import Process

log = logging.getLogger("lxscale")

LEASE_FORMAT = "lxscale-lease-1"
JOB_FORMAT = "lxscale-job-1"
OLD_CLAIM = b"{}"
"""What lxscale 0.1.0 writes as its claim, once, where leases are."""

BEAT_S = 2.0
"""Seconds between two writes of a lease."""
DEAD_S = 7.0
"""A lease that has not changed for so long is of a dead owner."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Made:
    """What an attempt has done so far."""

    attempt: int = 0
    """0 while it has not claimed the run yet."""
    since: int = 0
    """The step that it went on from."""
    step: int = 0
    """Steps of the run that are done."""
    begun: float = 0.0
    """When its loop began, in seconds since 1970."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds, by what the loop was at (trainer/loop.py: Control.enter)."""


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
    made: Made | None = None
    """None in older leases, as is the next."""
    at: float | None = None
    """When this was written, in seconds since 1970: a killed attempt's is its last sign of life."""

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


def read_lease(url: str, retry: Retry | None = None) -> bytes:
    """As it is stored; empty if it is not there."""
    try:
        return objects.read_bytes(url, retry)
    except NotFoundError:
        return b""


def watch(urls: Sequence[str], before: Sequence[bytes]) -> list[bytes]:
    """What leases say once one of them is no more what it was `before`, or after DEAD_S seconds
    without a change."""
    end = time.monotonic() + DEAD_S
    while True:
        time.sleep(_POLL_S)
        now = [read_lease(url) for url in urls]
        if now != list(before) or time.monotonic() >= end:
            return now


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


# --- the job's ----------------------------------------------------------------------------------


def begin_job_lease(run_url: str, job: str) -> None:
    """Make the lease that the job's driver rewrites. Where that cannot be now, its workers' own has
    to do until the job's next claim."""
    with contextlib.suppress(DataError):
        _write_job_lease(job_lease_url(run_url, job), 0)


@contextlib.contextmanager
def keep_job_lease(run_url: str, job: str) -> Iterator[None]:
    """Rewrite the job's lease, once the job has claimed the run, and remove it at the end."""
    url, beats = job_lease_url(run_url, job), 0

    def beat(ended: bool) -> None:
        nonlocal beats
        if not beats and not read_lease(url, ONE_TRY):
            return  # not claimed yet
        beats += 1
        if ended:
            objects.delete(url, ONE_TRY)
        else:
            _write_job_lease(url, beats)

    heart = Heart(beat)
    try:
        yield
    finally:
        heart.stop()


def _write_job_lease(url: str, beat: int) -> None:
    objects.write_bytes(url, document_bytes(JOB_FORMAT, {"beat": beat}), ONE_TRY, durable=False)
