"""Saving in the background: training stalls for the copy to host memory and nothing else."""

from __future__ import annotations

import logging
import math
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
from trainer.checkpoint.generations import commit
from trainer.checkpoint.journal import Journal
from trainer.checkpoint.zero_state import Fragment, list_fragments, read
from trainer.errors import DivergedError
from trainer.progress import some_of

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


def not_finite(snap: Snapshot) -> list[str]:
    """Names of the parameters whose masters or moments hold NaN or an infinity."""
    with np.errstate(invalid="ignore"):
        # A sum of fp32 in float64 is finite where all of them are.
        sums = {kind: float(a.sum(dtype=np.float64)) for kind, a in snap.arrays.items()}
    if all(map(math.isfinite, sums.values())):
        return []
    names, offset = set(), 0
    for name, _, length in snap.spans:
        part = slice(offset, offset + length)
        if not all(np.isfinite(a[part]).all() for a in snap.arrays.values()):
            names.add(name)
        offset += length
    return sorted(names)


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
    diverged: bool = False
    """What was to be saved is not finite: the run must end."""


@dataclass(frozen=True)
class _NotFinite:
    """What a rank has in place of its part."""

    names: list[str]
    """Of parameters."""


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
        journal: Journal | None,
        saved_step: int | None,
    ) -> None:
        """journal: rank 0's, written with every generation; None on the other ranks. saved_step:
        that of the generation that the run goes on from, if any."""
        self._run_url, self._attempt, self._keep = run_url, attempt, keep
        self._description, self._journal = description, journal
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: _Failure | None = None
        self._saved_step = saved_step

    def save(self, engine: Any, step: int, state: SamplerState, skipped_updates: int = 0) -> None:
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
            target=self._write,
            args=(step, state, skipped_updates, snap, stall),
            name="lxscale-save",
            daemon=True,
        )
        self._thread.start()

    def wait(self, must_succeed: bool = False) -> None:
        """Wait for the save under way. A failure is reported and training goes on with the
        generation before; it is a CheckpointError when the attempt is stale or `must_succeed`, and
        a DivergedError when the state was not finite."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is None:
            return
        if self._failure.diverged:
            raise DivergedError(self._failure.message)
        if must_succeed or self._failure.stale:
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

    def _write(
        self, step: int, state: SamplerState, skipped_updates: int, snap: Snapshot, stall: float
    ) -> None:
        """In the thread: upload this rank's part; rank 0 commits and tells all how it went."""
        part: ObjectEntry | _NotFinite | str
        try:
            if names := not_finite(snap):
                part = _NotFinite(names)
            else:
                part = write_object(self._run_url, step, self._attempt, self._rank, snap)
        except Exception as error:
            part = f"rank {self._rank}: {error}"
        try:
            parts: list[Any] | None = [None] * self._world if self._rank == 0 else None
            dist.gather_object(part, parts, dst=0, group=self._group)
            outcome: list[_Failure | None] = [None]
            if parts is not None:
                outcome = [self._commit(step, state, skipped_updates, parts, stall)]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            self._failure = outcome[0]
        except RuntimeError as error:  # a peer died: its end is reported elsewhere
            self._failure = _Failure(str(error))

    def _commit(
        self,
        step: int,
        state: SamplerState,
        skipped_updates: int,
        parts: list[ObjectEntry | _NotFinite | str],
        stall: float,
    ) -> _Failure | None:
        """Rank 0: write the journal, then the manifest; what went wrong, or None."""
        began = time.monotonic()
        if names := sorted({n for p in parts if isinstance(p, _NotFinite) for n in p.names}):
            return _Failure(
                f"weights or moments are not finite after step {step}, of {some_of(names)}: no "
                "checkpoint is written of them. Look at the data, change train.precision, or lower "
                "optimizer.lr (with checkpoint.override_settings=true); the same command goes on "
                "from the last checkpoint",
                diverged=True,
            )
        if failed := [p for p in parts if isinstance(p, str)]:
            return _Failure("; ".join(failed))
        entries = tuple(p for p in parts if isinstance(p, ObjectEntry))
        try:
            assert self._journal
            segments = self._journal.write(self._run_url, self._attempt, step)
            manifest = CheckpointManifest(
                **vars(self._description),
                sampler=state,
                step=step,
                attempt=self._attempt,
                objects=entries,
                journal=segments,
                skipped_updates=skipped_updates,
            )
            generation = commit(self._run_url, manifest, self._keep)
            self._journal.committed(segments)
        except Exception as error:
            return _Failure(str(error), isinstance(error, StaleAttemptError))
        log.info(
            "checkpoint %s | %.1f MB, stall %.2f s, commit %.2f s",
            generation.name,
            sum(e.size for e in entries) / 1e6,
            stall,
            time.monotonic() - began,
        )
        return None
