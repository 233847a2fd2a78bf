"""A trace of some steps of rank 0 (`train.profile`), for Perfetto or TensorBoard's profiler."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from shards.errors import DataError
from shards.store import objects

log = logging.getLogger("lxscale")

# Steps of an attempt before those of its trace: caches fill, kernels are chosen.
_SKIPPED = 5


class Trace:
    """Of `steps` steps, into a file `profile-….pt.trace.json.gz` in a folder or under a URL. One
    that cannot be written is said, and costs no more."""

    def __init__(self, steps: int, folder: str, attempt: int) -> None:
        self._url = objects.join(folder, f"profile-a{attempt:06d}.pt.trace.json.gz")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=_SKIPPED - 1, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profile.start()

    def step(self) -> None:
        """A step was made."""
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()

    def _write(self, found: profile) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="lxscale-profile-") as folder:
                path = Path(folder) / "trace.json.gz"
                found.export_chrome_trace(str(path))
                objects.write_bytes(self._url, path.read_bytes())
        except (OSError, RuntimeError, DataError) as error:
            log.error("the trace cannot be written, training goes on: %s", error)
            return
        log.info("trace in %s", self._url)
