"""Saving in the background: training stalls for the copy to host memory and nothing else."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shards.order.sampler import SamplerState
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError, StaleAttemptError
from trainer.checkpoint.format import (
    KINDS,
    CheckpointManifest,
    ObjectEntry,
    RunDescription,
    Span,
    object_name,
    sha256_of,
)
from trainer.checkpoint.journal import Journal
from trainer.checkpoint.owner import Owner
from trainer.checkpoint.zero_state import Fragment, list_fragments, read

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class Snapshot:
    """A rank's fragments, copied to host memory."""

    spans: tuple[Span, ...]
    arrays: dict[str, NDArray[np.float32]]
    """For each of KINDS the values of all spans, end to end."""


def snapshot(engine: Any, fragments: list[Fragment]) -> Snapshot:
    """Copy fragments into host memory: the stall of a save."""
    arrays = {}
    for kind in KINDS:
        whole = torch.empty(sum(f.span.length for f in fragments), dtype=torch.float32)
        if fragments:
            parts = [read(engine, f, kind).to("cpu", torch.float32) for f in fragments]
            torch.cat(parts, out=whole)
        arrays[kind] = whole.numpy()
    return Snapshot(tuple(f.span for f in fragments), arrays)


def write_object(run_url: str, step: int, attempt: int, rank: int, snap: Snapshot) -> ObjectEntry:
    """Upload a rank's part under a name no other attempt can use; its entry in the manifest."""
    data = safetensors.numpy.save(snap.arrays)
    name = object_name(step, attempt, rank)
    entry = ObjectEntry(name, len(data), sha256_of(data), snap.spans)
    objects.write_bytes(entry.url(run_url), data)
    return entry


@dataclass(frozen=True)
class _Failure:
    message: str
    stale: bool = False
    """A later attempt has started: this one must end."""


class Saver:
    """Writes one generation at a time. Every rank calls `save` and `wait` at the same steps.

    Uploads and the commit run in a thread over a process group of their own, so that they never
    mix with the step's collectives.
    """

    def __init__(
        self,
        run_url: str,
        attempt: int,
        keep: int,
        description: RunDescription,
        owner: Owner | None,
        journal: Journal | None,
        saved_step: int | None,
    ) -> None:
        """owner, journal: rank 0's, which commits and writes a segment with every generation; None
        on the other ranks. saved_step: that of the generation that the run goes on from, if any."""
        self._run_url, self._attempt, self._keep = run_url, attempt, keep
        self._description, self._owner, self._journal = description, owner, journal
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: _Failure | None = None
        self._saved_step = saved_step

    def save(self, engine: Any, step: int, state: SamplerState) -> None:
        """Copy the engine's state now and write behind; nothing where this step is saved.

        Waits for the save before, and so raises what `wait` raises.
        """
        if self._saved_step == step:
            return
        self.wait()
        began = time.monotonic()
        # What every rank holds is written once, its fragments dealt out.
        own = [
            f
            for i, f in enumerate(list_fragments(engine))
            if not f.replicated or i % self._world == self._rank
        ]
        snap = snapshot(engine, own)
        stall = time.monotonic() - began
        self._saved_step = step
        self._thread = threading.Thread(
            target=self._write, args=(step, state, snap, stall), name="lxscale-save", daemon=True
        )
        self._thread.start()

    def wait(self, must_succeed: bool = False) -> None:
        """Wait for the save under way. A failure is reported and training goes on with the
        generation before; it is a StaleAttemptError when the attempt is stale, and a
        CheckpointError when it `must_succeed`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is None:
            return
        if self._failure.stale:
            raise StaleAttemptError(self._failure.message)
        if must_succeed:
            raise CheckpointError(
                f"checkpoint at step {self._saved_step} failed: {self._failure.message}"
            )
        if self._rank == 0:
            log.error(
                "checkpoint at step %d failed, training goes on: %s",
                self._saved_step,
                self._failure.message,
            )
        self._failure = None
        self._saved_step = None

    def _write(self, step: int, state: SamplerState, snap: Snapshot, stall: float) -> None:
        """In the thread: upload this rank's part; rank 0 commits and tells all how it went."""
        part: ObjectEntry | str
        try:
            part = write_object(self._run_url, step, self._attempt, self._rank, snap)
        except Exception as error:
            part = f"rank {self._rank}: {error}"
        try:
            parts: list[Any] | None = [None] * self._world if self._rank == 0 else None
            dist.gather_object(part, parts, dst=0, group=self._group)
            outcome: list[_Failure | None] = [None]
            if parts is not None:
                outcome = [self._commit(step, state, parts, stall)]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            self._failure = outcome[0]
        except RuntimeError as error:  # a peer died: its end is reported elsewhere
            self._failure = _Failure(str(error))

    def _commit(
        self, step: int, state: SamplerState, parts: list[ObjectEntry | str], stall: float
    ) -> _Failure | None:
        """Rank 0: write the journal, then the manifest; what went wrong, or None."""
        began = time.monotonic()
        if failed := [p for p in parts if isinstance(p, str)]:
            return _Failure("; ".join(failed))
        entries = tuple(p for p in parts if isinstance(p, ObjectEntry))
        try:
            assert self._owner and self._journal
            segments = self._journal.write(self._run_url, self._attempt, step)
            manifest = CheckpointManifest(
                **vars(self._description),
                sampler=state,
                step=step,
                attempt=self._attempt,
                objects=entries,
                journal=segments,
            )
            generation = self._owner.commit(manifest, self._keep)
            self._journal.committed(segments)
        except Exception as error:
            return _Failure(str(error), isinstance(error, StaleAttemptError))
        log.info(
            "checkpoint of step %d (%s) | %.1f MB, stall %.2f s, commit %.2f s",
            step,
            generation.name.removesuffix(".json"),
            sum(e.size for e in entries) / 1e6,
            stall,
            time.monotonic() - began,
        )
        return None
