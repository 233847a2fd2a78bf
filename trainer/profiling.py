"""Traces of some steps of rank 0 (`train.profile`), for Perfetto or TensorBoard's profiler."""

from __future__ import annotations

import gzip
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from shards.errors import DataError
from shards.store import objects
from shards.store.retry import Retry

log = logging.getLogger("lxscale")

# Steps of an attempt before those that are traced: caches fill, kernels are chosen.
_SKIPPED = 5
# Seconds that the store may keep one waiting.
_PATIENCE_S = 20.0


class Traces:
    """Of `steps` steps, a file each in a folder or under a URL. One that cannot be written is said,
    and costs no more.

    torch's profiler lets nothing else of a process run while it puts a trace together, so a worker
    with a long one would look as if it hung: how many steps are traced makes none longer.
    """

    def __init__(self, steps: int, folder: str, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self._wait, self._left = _SKIPPED, steps
        self._none_yet = True
        self._running: profile | None = None
        self._writer = ThreadPoolExecutor(1, "lxscale-profile")
        self._failed = False

    def begin(self) -> None:
        """A step begins."""
        if self._wait or not self._left or self._running or self._failed:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(activities=activities)
        self._running.start()

    def end(self, step: int) -> None:
        """It ends, as the run's so manieth."""
        self._wait = max(0, self._wait - 1)
        found, self._running = self._running, None
        if found is None:
            return
        self._left, self._none_yet = self._left - 1, False
        found.stop()
        try:
            with tempfile.TemporaryDirectory(prefix="lxscale-profile-") as folder:
                path = Path(folder) / "trace.json"
                found.export_chrome_trace(str(path))
                data = path.read_bytes()
        except (OSError, RuntimeError) as error:
            self._fail(error)
            return
        name = f"profile-a{self._attempt:06d}-s{step:09d}.pt.trace.json.gz"
        self._writer.submit(self._write, objects.join(self._folder, name), data)

    def close(self) -> None:
        if self._running:
            self._running.stop()
        self._writer.shutdown()
        if self._none_yet:
            log.info("no trace: too few steps, the first %d of an attempt get none", _SKIPPED)

    def _write(self, url: str, data: bytes) -> None:
        if self._failed:
            return
        try:
            objects.write_bytes(url, gzip.compress(data, 6), Retry(deadline=_PATIENCE_S))
        except (OSError, DataError) as error:
            self._fail(error)
            return
        log.info("trace in %s", url)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        log.error("a trace cannot be written, training goes on without: %s", error)
