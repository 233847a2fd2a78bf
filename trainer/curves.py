"""Curves of a run and the record of its steps, as files that live with the run in its storage.

    storage/name/tensorboard/events.out.tfevents.a000002-000001    of attempt 2, its first
    storage/name/tensorboard/steps-a000002-000001.jsonl            one line a step

Names sort by attempt, after those of SummaryWriter: TensorBoard reads the files of a folder in this
order, and an attempt's first event has it forget the steps that are done again, whatever the clocks
of two machines say. Files are closed at about 4 MB.

In a folder they are written in place. For object storage they are written in a folder of the
machine's and copied: what has grown, before each generation is committed, once a minute, and at the
end. So a generation that can be gone on from has its curves there, and an upload costs two such
files, however long the run, and what was closed since the last one.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from shards.store import objects
from shards.store.folders import owned_folder
from shards.store.retry import Retry
from trainer.config import RunConfig

log = logging.getLogger("lxscale")

# Bytes after which a file is closed and the next one begun.
_FULL = 4 << 20
# Seconds between two uploads that nothing asks for.
_UPLOAD_S = 60.0
# Seconds that a file of one may take: a commit or an end waits for it.
_PATIENCE_S = 20.0
_SCRATCH = "lxscale-curves-"


def curves_url(config: RunConfig) -> str:
    """Where the curves of a run are: a folder or a URL."""
    return config.run.tensorboard or objects.join(
        config.run.storage, config.run.name, "tensorboard"
    )


class Curves:
    """Writes curves and the record of steps. One thread writes; any may call `publish`."""

    def __init__(self, url: str, attempt: int, after: int) -> None:
        """after: the step that the attempt goes on from. Raises OSError."""
        self._url, self._attempt = url, attempt
        self._context = contextlib.ExitStack()
        self._uploads: _Uploads | None = None
        if local := objects.local_path(url):
            self._folder = local
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            scratch = owned_folder(Path(tempfile.gettempdir()), _SCRATCH)
            self._folder = self._context.enter_context(scratch)
            self._uploads = _Uploads(self._folder, url)
        self._count = {"events": 0, "steps": 0}
        self._steps = self._next("steps")
        self._events = self._next("events")
        # The events of later steps are of steps that are done again.
        self._write(Event(step=after + 1, session_log=SessionLog(status=SessionLog.START)))

    def step(self, line: str) -> None:
        """Add a line to the record of steps."""
        if self._steps.tell() > _FULL:
            self._steps.close()
            self._steps = self._next("steps")
        self._steps.write(line.encode() + b"\n")
        self._steps.flush()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each of some curves."""
        if self._events.tell() > _FULL:
            self._events.close()
            self._events = self._next("events")
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=entries)))

    def publish(self) -> None:
        """Have all that was written so far in the run's storage. Raises nothing."""
        if self._uploads:
            self._uploads.upload()

    def close(self) -> None:
        """Publish what is left, and write no more."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._context.close)
            if self._uploads:
                stack.callback(self._uploads.close)
            stack.callback(self._steps.close)
            stack.callback(self._events.close)

    def _next(self, kind: str) -> BinaryIO:
        self._count[kind] += 1
        number = f"a{self._attempt:06d}-{self._count[kind]:06d}"
        name = f"steps-{number}.jsonl" if kind == "steps" else f"events.out.tfevents.{number}"
        path = self._folder / name
        file = path.open("ab")
        if kind == "events":
            _record(file, Event(file_version="brain.Event:2"))
        return file

    def _write(self, event: Event) -> None:
        _record(self._events, event)
        self._events.flush()


def _record(file: BinaryIO, event: Event) -> None:
    event.wall_time = time.time()
    RecordWriter(file).write(event.SerializeToString())


@dataclass(frozen=True)
class _OneTry(Retry):
    deadline: float = 0.0

    def attempt_time(self, attempt: int, left: float) -> float:
        return _PATIENCE_S


class _Uploads:
    """Copies the files of a folder to object storage, each as far as it has grown."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._there: dict[str, int] = {}
        """Bytes that the store has of each file."""
        self._one_at_a_time, self._complained = threading.Lock(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lxscale-curves", daemon=True)
        self._thread.start()

    def upload(self) -> None:
        with self._one_at_a_time:
            try:
                for path, closed in self._files():
                    size = path.stat().st_size
                    if size > self._there.get(path.name, 0):
                        objects.upload(path, objects.join(self._url, path.name), _OneTry())
                        self._there[path.name] = size
                    if closed:
                        path.unlink()
            except Exception as error:  # a save, which waits for this, must not fail of it
                if not self._complained:
                    self._complained = True
                    log.warning("curves are not in %s now, tried again later: %s", self._url, error)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.upload()

    def _files(self) -> Iterator[tuple[Path, bool]]:
        """Those of the folder, and whether each is closed, as there is a later one of its kind."""
        for kind in ("steps-", "events."):
            files = sorted(self._folder.glob(f"{kind}*"))
            yield from ((path, path != files[-1]) for path in files)

    def _run(self) -> None:
        while not self._over.wait(_UPLOAD_S):
            self.upload()
