"""Saving in the background: training stalls for the copy to host memory and nothing else.

Copies wait in a bounded spool, and one thread a rank uploads and commits them in order. Which saves
are made is rank 0's to say and agreed in each step (trainer/step/sync.py), so all ranks spool
the same ones, however fast each is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shards.order.sampler import SamplerState
from shards.store import objects
from shards.store.retry import Retry
from trainer.checkpoint.errors import StaleAttemptError, UnsavedError
from trainer.checkpoint.format import (
    KINDS,
    CheckpointManifest,
    ObjectEntry,
    RunDescription,
    Span,
    now_utc,
    object_name,
    sha256_of,
)
from trainer.checkpoint.generations import Generation
from trainer.checkpoint.journal import Journal
from trainer.checkpoint.owner import Owner
from trainer.checkpoint.schedule import Schedule, newest_is
from trainer.checkpoint.zero_state import Fragment, list_fragments, read
from trainer.errors import DivergedError
from trainer.progress import some_of
from trainer.ranks import gather_objects
from trainer.sections import CheckpointSection

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class Snapshot:
    """A rank's fragments, copied to host memory."""

    spans: tuple[Span, ...]
    arrays: dict[str, NDArray[np.float32]]
    """For each of KINDS the values of all spans, end to end."""
    seconds: float = 0.0
    """For which training stalled."""


def own_snapshot(engine: Any) -> Snapshot:
    """What this rank is to save, copied into host memory now: the stall of a save."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # What every rank holds is written once, its fragments dealt out.
    fragments = list_fragments(engine)
    own = [f for i, f in enumerate(fragments) if not f.replicated or i % world == rank]
    return snapshot(engine, own)


def snapshot(engine: Any, fragments: list[Fragment]) -> Snapshot:
    """Copy fragments into host memory."""
    began = time.monotonic()
    arrays = {}
    for kind in KINDS:
        whole = torch.empty(sum(f.span.length for f in fragments), dtype=torch.float32)
        if fragments:
            parts = [read(engine, f, kind).to("cpu", torch.float32) for f in fragments]
            torch.cat(parts, out=whole)
        arrays[kind] = whole.numpy()
    spans = tuple(f.span for f in fragments)
    return Snapshot(spans, arrays, time.monotonic() - began)


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


def _not_finite_error(step: int, names: list[str]) -> DivergedError:
    return DivergedError(
        f"weights or moments are not finite after step {step}, of {some_of(names)}: no checkpoint "
        "is written of them. Look at the data, change train.precision, or lower optimizer.lr (with "
        "checkpoint.override_settings=true); the same command goes on from the last checkpoint"
    )


def write_object(run_url: str, step: int, attempt: int, rank: int, snap: Snapshot) -> ObjectEntry:
    """Upload a rank's part under a name no other attempt can use; its entry in the manifest."""
    data = safetensors.numpy.save(snap.arrays)
    name = object_name(step, attempt, rank)
    entry = ObjectEntry(name, len(data), sha256_of(data), snap.spans)
    objects.write_bytes(entry.url(run_url), data)
    return entry


@dataclass(frozen=True)
class Failure:
    """Why a save was given up; training goes on."""

    message: str
    final: Exception | None = None
    """What all ranks must end with instead."""


@dataclass(frozen=True)
class _Save:
    """What a rank has in its spool."""

    step: int
    state: SamplerState
    skipped_updates: int
    snap: Snapshot


class Saver:
    """Writes generations in order. Every rank calls `save` and `finish` at the same steps.

    At most `settings.spool` copies are in host memory, each of 12 bytes a parameter over the world
    size, and the one under way once more as the bytes of its object. Uploads and commits run in a
    thread over a process group of their own, so that they never mix with the step's collectives.
    """

    def __init__(
        self,
        run_url: str,
        attempt: int,
        settings: CheckpointSection,
        description: RunDescription,
        owner: Owner | None,
        journal: Journal | None,
        newest: Generation | None,
        goes_back: bool = False,
    ) -> None:
        """owner, journal: rank 0's, which commits and writes a segment with every generation; None
        on the other ranks. newest: the generation that the run goes on from, if any. goes_back: it
        is not the last that was committed; the end commits one, be it of the same step."""
        self._run_url, self._attempt, self._settings = run_url, attempt, settings
        self._description, self._owner, self._journal = description, owner, journal
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # Ranks wait here for the slowest upload and for rank 0's commit, each a few times the
        # store's deadline at the worst.
        patience = max(1800.0, 6 * Retry().deadline)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
        self._last_step = newest.step if newest and not goes_back else None
        """Of the newest save that was begun."""
        self._landed_step = self._last_step
        self._why = ""
        """Of the newest failure."""
        self._final: Exception | None = None
        self._newest = newest.url if newest else None
        self._schedule = Schedule(settings, self._newest) if self._rank == 0 else None
        self.before_commit: Callable[[], None] = lambda: None
        """Called in the thread, on rank 0, before it writes a manifest."""
        # What the thread shares, under the condition.
        self._changed = threading.Condition()
        self._spool: deque[_Save] = deque()
        """The first is under way."""
        self._running = False
        """A thread works."""
        self._held = False
        """It begins nothing."""
        self._begun_step = -1
        """Of the newest save that it began."""
        self._outcomes: list[tuple[int, str | Failure]] = []
        """Step of each save that ended, and its generation's URL or why there is none; the same on
        every rank, if not at the same time."""
        self._broken: Exception | None = None

    # --- called by the training thread ----------------------------------------------------------

    def full(self) -> bool:
        """Whether this rank has no room for another save."""
        with self._changed:
            return len(self._spool) >= self._settings.spool

    def due(self, step: int) -> bool:
        """On rank 0: whether a save is due after `step`, which is about to be made."""
        return self._schedule is not None and self._schedule.due(step)

    def problem(self, step: int) -> Exception | None:
        """On rank 0: what all must end with after `step` steps, if anything. Looks what became of
        saves; RuntimeError on any rank that has lost the others."""
        self._collect()
        return (self._final or self._schedule.unsaved(step)) if self._schedule else None

    def save(self, snap: Snapshot, step: int, state: SamplerState, skipped_updates: int) -> None:
        """Write a copy of the state behind. There must be room for it on every rank."""
        save = _Save(step, state, skipped_updates, snap)
        if self._schedule:
            self._schedule.begun()
        self._last_step = step
        with self._changed:
            self._spool.append(save)
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="lxscale-save", daemon=True).start()

    def withhold(self) -> None:
        """Make no save after this step, though it is due: it stays so."""
        if self._schedule:
            self._schedule.withheld()

    def finish(
        self, engine: Any, step: int, state: SamplerState, skipped_updates: int, stopped: bool
    ) -> None:
        """Return when everything is committed, the end's generation included. Where that fails:
        UnsavedError. A run that was stopped may have little time: saves that no rank has begun are
        dropped for its last one."""
        if stopped:
            self._drop_waiting(step)
        self.wait()
        if self._last_step != step:
            self.save(own_snapshot(engine), step, state, skipped_updates)
            self.wait()
        if self._landed_step == step:
            return
        raise UnsavedError(
            f"checkpoint at step {step} failed: {self._why}; {newest_is(self._newest)}"
        )

    def _drop_waiting(self, last: int) -> None:
        """Drop saves before the step `last` that no rank has begun, on all ranks."""
        with self._changed:
            self._held = True
        begun = max(gather_objects(self._begun_step))
        with self._changed:
            self._spool = deque(s for s in self._spool if s.step <= begun or s.step == last)
            self._held = False
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the spool is empty. Raises what is final, which is the same on every rank."""
        with self._changed:
            self._changed.wait_for(lambda: not self._spool)
        self._collect()
        if self._final:
            raise self._final

    def _collect(self) -> None:
        """Take note of the saves that ended since the last call."""
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
            if self._broken:
                raise RuntimeError(f"lost the other workers in a save: {self._broken}")
        for step, result in outcomes:
            if isinstance(result, str):
                self._landed_step, self._newest = step, result
                if self._schedule:
                    self._schedule.landed(step, result)
                continue
            self._why, self._final = result.message, self._final or result.final
            if self._schedule and not self._final:
                self._schedule.failed(result.message)
                log.error("checkpoint at step %d failed: %s", step, result.message)

    # --- in the thread of saves -----------------------------------------------------------------

    def _work(self) -> None:
        """Write what is in the spool, in order, until it is empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._held)
                if not self._spool:
                    self._running = False
                    return
                save = self._spool[0]
                self._begun_step = step = save.step
            try:
                result = self._write(save)
            except Exception as error:  # of a collective: no rank knows any more what others save
                with self._changed:
                    self._broken = error
                    self._spool.clear()
                    self._changed.notify_all()
                return
            del save  # no longer in memory when there is room for another
            with self._changed:
                self._spool.popleft()
                self._outcomes.append((step, result))
                self._changed.notify_all()

    def _write(self, save: _Save) -> str | Failure:
        """Upload this rank's part; rank 0 commits and tells all how it went."""
        part: ObjectEntry | Failure
        try:
            if names := not_finite(save.snap):
                raise _not_finite_error(save.step, names)
            part = write_object(self._run_url, save.step, self._attempt, self._rank, save.snap)
        except DivergedError as error:
            part = Failure(str(error), error)
        except Exception as error:
            part = Failure(f"rank {self._rank}: {error}")
        parts: list[Any] | None = [None] * self._world if self._rank == 0 else None
        dist.gather_object(part, parts, dst=0, group=self._group)
        told = [self._commit(save, parts) if parts is not None else None]
        dist.broadcast_object_list(told, src=0, group=self._group)
        assert told[0] is not None
        return told[0]

    def _commit(self, save: _Save, parts: list[ObjectEntry | Failure]) -> str | Failure:
        """Rank 0: write the journal, then the manifest; the generation's URL, or why there is
        none."""
        began = time.monotonic()
        if failed := [p for p in parts if isinstance(p, Failure)]:
            final = next((f.final for f in failed if f.final), None)
            return Failure("; ".join(f.message for f in failed), final)
        entries = tuple(p for p in parts if isinstance(p, ObjectEntry))
        try:
            assert self._owner and self._journal
            self.before_commit()
            segments = self._journal.write(self._run_url, self._attempt, save.step)
            manifest = CheckpointManifest(
                **vars(self._description),
                sampler=save.state,
                step=save.step,
                attempt=self._attempt,
                objects=entries,
                journal=segments,
                skipped_updates=save.skipped_updates,
                saved_at=now_utc(),
            )
            generation = self._owner.commit(manifest, self._settings.keep)
            self._journal.committed(segments)
        except Exception as error:
            return Failure(str(error), error if isinstance(error, StaleAttemptError) else None)
        log.info(
            "checkpoint of step %d (%s) | %.1f MB, stall %.2f s, commit %.2f s",
            save.step,
            generation.name.removesuffix(".json"),
            sum(e.size for e in entries) / 1e6,
            save.snap.seconds,
            time.monotonic() - began,
        )
        return generation.url
