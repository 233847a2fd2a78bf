"""The account of a run's groups of workers in its storage: what each began, did and cost.

    storage/name/timeline/group-20261127T054325.123-1f3a-begin.json    a group that was placed
    storage/name/timeline/group-20261127T054325.123-1f3a-end.json      all of it, once it has ended

The driver writes two small files a group, behind its work and with one try each: a store that is
away costs no run anything, and what it missed is written with the next one. A driver that is killed
writes no end; then the lease of the attempt has its last sign of life (trainer/goodput.py).
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from shards.errors import DataError, NotFoundError
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import checked_document, document_bytes
from trainer.checkpoint.lease import ONE_TRY, Made

FORMAT = "lxscale-timeline-1"
_NAME = re.compile(r"(?P<group>group-[\dT.]+-[0-9a-f]+)-(?P<what>begin|end)\.json")

# Documents that wait for a store that is away, at most; seconds that a command's end waits for it.
_WAITING, _LAST_S = 100, 5.0
# Requests at a time, when many documents are read.
AT_ONCE = 16

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Group:
    """A group of workers as its driver saw it. Times are seconds since 1970."""

    job: str
    began: float
    """The job began or, of a later group of a job, the one before was gone."""
    placed: float | None = None
    """Its workers were there."""
    workers: int = 0
    quiet: float | None = None
    """The last sign of progress before its end."""
    found: float | None = None
    """Its end was found."""
    gone: float | None = None
    """Its workers were ended. None in a group that has not ended, or whose driver was killed."""
    kind: str = ""
    """How it ended (cluster/group.py: End): done, stopped, lost, …; or aborted."""
    text: str = ""
    made: Made = field(default_factory=Made)
    """What its rank 0 had done, as the driver had last heard."""


_GROUP: TypeAdapter[Group] = TypeAdapter(Group)


def timeline_url(run_url: str, *name: str) -> str:
    return objects.join(run_url, "timeline", *name)


# --- writing ------------------------------------------------------------------------------------


class Timeline:
    """The driver's account of one group after the other. Use it as a context."""

    def __init__(self, run_url: str, job: str, began: float) -> None:
        """began: when the job did."""
        self._run_url, self._job = run_url, job
        self._group, self._name = Group(job, began), ""
        self._waiting: deque[tuple[str, bytes]] = deque(maxlen=_WAITING)
        self._more, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._write, name="lxscale-timeline", daemon=True)
        self._thread.start()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._more.set()
        self._thread.join(_LAST_S)

    def began(self) -> None:
        """A group is to be placed."""
        stamp = datetime.fromtimestamp(self._group.began, UTC).strftime("%Y%m%dT%H%M%S.%f")[:-3]
        self._name = f"group-{stamp}-{secrets.token_hex(4)}"

    def placed(self, workers: int) -> None:
        self._group = replace(self._group, placed=time.time(), workers=workers)
        self._put("begin")

    def ended(self, kind: str, text: str, made: Made, quiet: float) -> None:
        """How the group ended, that has to be torn down still. quiet: seconds since its last sign
        of progress."""
        now = time.time()
        self._group = replace(
            self._group, quiet=now - quiet, found=now, kind=kind, text=text, made=made
        )

    def gone(self) -> None:
        """The group is no more."""
        now, group = time.time(), self._group
        if group.found is None:
            group = replace(group, quiet=now, found=now, kind="aborted")
        self._group = replace(group, gone=now)
        self._put("end")
        self._group = Group(self._job, now)

    def _put(self, what: str) -> None:
        document = document_bytes(FORMAT, asdict(self._group))
        self._waiting.append((f"{self._name}-{what}.json", document))
        self._more.set()

    def _write(self) -> None:
        while not self._over or self._more.is_set():
            self._more.wait()
            self._more.clear()
            while self._waiting:
                name, data = self._waiting[0]
                try:
                    objects.write_bytes(
                        timeline_url(self._run_url, name), data, ONE_TRY, durable=False
                    )
                except DataError:
                    break  # tried again with the next one
                self._waiting.popleft()


# --- reading ------------------------------------------------------------------------------------


def read_timeline(run_url: str) -> list[Group]:
    """The run's groups, by their begin. Costs one listing and one request a group, some at a time.
    Documents that are damaged are left out."""
    newest: dict[str, str] = {}
    for name in objects.list_names(timeline_url(run_url)):  # "begin" is before "end"
        if m := _NAME.fullmatch(name):
            newest[m["group"]] = name
    found = at_once(lambda name: _read(timeline_url(run_url, name)), newest.values())
    return sorted(filter(None, found), key=lambda group: group.began)


def at_once(read: Callable[[T], U], what: Iterable[T]) -> list[U]:
    """`read` of each, in order, several at a time."""
    with ThreadPoolExecutor(AT_ONCE, "lxscale-read") as pool:
        return list(pool.map(read, what))


def _read(url: str) -> Group | None:
    try:
        data = objects.read_bytes(url)
        checked_document(data, url, FORMAT)
        return _GROUP.validate_json(data)
    except (NotFoundError, CheckpointError, ValidationError):
        return None
