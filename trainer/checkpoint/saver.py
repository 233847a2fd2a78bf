"""Saving in the background: training stalls for the copy to host memory and nothing else."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.format import (
    CheckpointError,
    Snapshot,
    check_not_stale,
    commit,
    snapshot,
    write_object,
)
from trainer.checkpoint.journal import Journal
from trainer.checkpoint.zero_state import KINDS, list_fragments, read

log = logging.getLogger("lxscale")


class Saver:
    """Writes one generation at a time; every rank calls `save` at the same steps, and `close`.

    record: rank 0's, written with every generation; None on the other ranks. Uploads and the commit
    run in a thread over a process group of their own, so that they never
    mix with the step's collectives.
    """

    def __init__(self, run_url: str, attempt: int, keep: int, record: Journal | None) -> None:
        self._run_url, self._attempt, self._keep = run_url, attempt, keep
        self._record = record
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._stale = False
        self.saved_step = -1

    def save(self, engine: Any, step: int, manifest: dict[str, Any]) -> None:
        """Snapshot now, write behind. `manifest`: what the generation says beside its objects."""
        self.wait()
        began = time.monotonic()
        fragments = list_fragments(engine)
        # What every rank holds is written once, its fragments dealt out.
        own = [
            f for i, f in enumerate(fragments) if not f.replicated or i % self._world == self._rank
        ]
        snap = snapshot(own, {kind: [read(engine, f, kind) for f in own] for kind in KINDS})
        stall = time.monotonic() - began
        self.saved_step = step
        self._thread = threading.Thread(
            target=self._write, args=(step, snap, manifest, stall), name="lxscale-save", daemon=True
        )
        self._thread.start()

    def _write(self, step: int, snap: Snapshot, manifest: dict[str, Any], stall: float) -> None:
        entry: dict[str, Any] | str
        try:
            entry = write_object(self._run_url, step, self._attempt, self._rank, snap)
        except Exception as error:
            entry = f"rank {self._rank}: {error}"
        try:
            entries: list[Any] | None = [None] * self._world if self._rank == 0 else None
            dist.gather_object(entry, entries, dst=0, group=self._group)
            outcome: list[tuple[str | None, bool]] = [(None, False)]
            if entries is not None:
                outcome = [self._commit(step, entries, manifest, stall)]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            self._failure, self._stale = outcome[0]
        except RuntimeError as error:  # a peer died: its end is reported elsewhere
            self._failure = str(error)

    def _commit(
        self, step: int, entries: list[Any], manifest: dict[str, Any], stall: float
    ) -> tuple[str | None, bool]:
        began = time.monotonic()
        failed = [e for e in entries if isinstance(e, str)]
        if failed:
            return "; ".join(failed), False
        try:
            check_not_stale(self._run_url, self._attempt)
        except CheckpointError as error:
            return str(error), True
        except Exception as error:
            return str(error), False
        try:
            assert self._record
            segments, lines = self._record.write(self._run_url, self._attempt, step)
            body = {**manifest, "step": step, "attempt": self._attempt}
            body |= {"objects": entries, "record": segments}
            generation = commit(self._run_url, body, self._keep)
            self._record.committed(segments, lines)
        except Exception as error:
            return str(error), False
        log.info(
            "checkpoint %s | %.1f MB, stall %.2f s, commit %.2f s",
            generation.name,
            sum(e["size"] for e in entries) / 1e6,
            stall,
            time.monotonic() - began,
        )
        return None, False

    def wait(self, must_succeed: bool = False) -> None:
        """Wait for the save under way. A failure is reported and training goes on with the
        generation before; it is a CheckpointError when the attempt is stale or `must_succeed`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is None:
            return
        if must_succeed or self._stale:
            raise CheckpointError(f"checkpoint at step {self.saved_step} failed: {self._failure}")
        if self._rank == 0:
            log.error(
                "checkpoint at step %d failed, training goes on: %s", self.saved_step, self._failure
            )
        self._failure = None
        self.saved_step = -1
