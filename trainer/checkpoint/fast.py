"""The fast tier: every few steps a snapshot in the memory of nodes, outside the training processes.

Files in a folder in memory outlive the workers and the driver, and a copy on another node outlives
the node. Training stalls for the copy of the state only. The rest is done by a thread on each rank,
over a process group of its own; a snapshot that is due while a rank is still at the one before is
left out. What fails here costs a snapshot, and never the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from shards.errors import DataError, NodeError
from shards.order.sampler import SamplerState
from shards.store import objects
from trainer.checkpoint.fast_folder import (
    drop,
    drop_from,
    make_whole,
    objects_folder,
    open_folder,
    prune,
    remove_run,
    room,
    sweep,
    used,
)
from trainer.checkpoint.fast_format import FastManifest, fast_manifest_bytes
from trainer.checkpoint.format import (
    CheckpointManifest,
    ObjectEntry,
    RunDescription,
    checkpoint_url,
)
from trainer.checkpoint.journal import Journal, JournalPart
from trainer.checkpoint.owner import Owner
from trainer.checkpoint.saver import Snapshot, not_finite, write_object
from trainer.checkpoint.transfer import Move, exchange
from trainer.config import RunConfig
from trainer.ranks import gather_objects, ranks_by_node
from trainer.sections import CheckpointSection

log = logging.getLogger("lxscale")

# Newest snapshots that are kept; with the one that is being written there is one more.
_KEEP = 2

# Seconds for the one under way at the run's end, when a peer may be gone.
_END_S = 30.0

# Bytes of an element: KINDS in fp32.
_ELEMENT = 12


@dataclass(frozen=True)
class Tier:
    """Where the ranks keep snapshots, and how they tell each other of them."""

    folder: Path
    """This node's."""
    nodes: list[list[int]]
    """The ranks of each node."""
    group: dist.ProcessGroup
    """For the thread that makes them."""

    @property
    def here(self) -> list[int]:
        """The ranks of this node."""
        return next(ranks for ranks in self.nodes if dist.get_rank() in ranks)

    @property
    def first(self) -> bool:
        """Whether this rank does what one of its node is to do."""
        return self.here[0] == dist.get_rank()

    def partner(self, rank: int) -> int | None:
        """The rank on the next node that keeps a copy of a rank's objects; None for one node."""
        if len(self.nodes) == 1:
            return None
        n = next(i for i, ranks in enumerate(self.nodes) if rank in ranks)
        after = self.nodes[(n + 1) % len(self.nodes)]
        return after[self.nodes[n].index(rank) % len(after)]


def open_tier(config: RunConfig, run_url: str) -> Tier | None:
    """The run's fast tier, on every rank; None where it has none, or a node none to offer, which is
    warned of once."""
    settings = config.checkpoint
    nodes = ranks_by_node()
    folder, problem = None, ""
    if settings.fast_every:
        try:
            folder = open_folder(settings.fast_folder, run_url)
        except NodeError as error:
            problem = f"node of rank {dist.get_rank()}: {error}"
    if any(ranks[0] == dist.get_rank() for ranks in nodes):
        sweep(settings.fast_folder, folder)
    if not settings.fast_every:
        return None
    if _warned(gather_objects(problem)) or folder is None:
        return None
    patience = timedelta(seconds=config.cluster.process_group_timeout_s)
    return Tier(folder, nodes, dist.new_group(backend="gloo", timeout=patience))


def _warned(told: Sequence[str]) -> bool:
    """Whether there is a problem on a rank; rank 0 says that no snapshots are made for it."""
    problem = next(filter(None, told), "")
    if problem and dist.get_rank() == 0:
        log.warning("no snapshots in memory (checkpoint.fast_every) are made: %s", problem)
    return bool(problem)


@dataclass(frozen=True)
class _Part:
    """What all ranks have to know of one's object."""

    name: str
    size: int
    sha256: str


class Snapshots:
    """Makes snapshots, one at a time. Every rank calls `make` at the same steps."""

    def __init__(
        self,
        tier: Tier | None,
        settings: CheckpointSection,
        attempt: int,
        description: RunDescription,
        owner: Owner | None,
        journal: Journal | None,
    ) -> None:
        """tier: None makes none. owner, journal: rank 0's. Collective."""
        self._every, self._attempt = settings.fast_every, attempt
        self._description, self._owner, self._journal = description, owner, journal
        self._rank = dist.get_rank()
        self._thread: threading.Thread | None = None
        self._broken = False
        """The ranks are no longer in step: no more are made."""
        self._failed = False
        """The last one was."""
        self._folder = tier.folder if tier and tier.first else None
        self._off = tier is None
        if tier is None:
            return
        self._tier = tier
        if tier.first:
            drop_from(tier.folder, attempt)
        self._off = _warned(gather_objects(self._lacks_room()))

    # --- called by the training thread ----------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether one is due after `step`; the same on every rank."""
        return not self._off and step % self._every == 0

    def busy(self) -> bool:
        """Whether this rank cannot begin one."""
        return self._broken or (self._thread is not None and self._thread.is_alive())

    def make(self, snap: Snapshot, step: int, state: SamplerState, skipped_updates: int) -> None:
        """Keep a copy of the state, behind the training. No rank may be busy."""
        journal = self._journal.part() if self._journal else None
        self._thread = threading.Thread(
            target=self._work,
            args=(snap, step, state, skipped_updates, journal),
            name="lxscale-fast",
            daemon=True,
        )
        self._thread.start()

    def close(self, committed: bool) -> None:
        """Wait for the one under way. committed: the store has all that they have, so they go."""
        if self._thread:
            self._thread.join(_END_S)
        if committed and self._folder:
            remove_run(self._folder)

    def _lacks_room(self) -> str:
        """Whether this node has no room for what it is to keep."""
        folder, nodes = self._tier.folder, self._tier.nodes
        held = sum(self._tier.partner(r) in self._tier.here for ranks in nodes for r in ranks)
        share = (len(self._tier.here) + held) / dist.get_world_size()
        elements = sum(int(np.prod(shape)) for shape in self._description.parameters.values())
        needed = int((_KEEP + 1) * _ELEMENT * elements * share)
        there = room(folder) + used(folder)
        if there >= needed:
            return ""
        return (
            f"node of rank {self._rank}: {folder.parent.parent} has room for {there / 1e6:,.0f} of "
            f"the {needed / 1e6:,.0f} MB that {_KEEP + 1} of them take; give it more memory, or "
            "name another tmpfs in checkpoint.fast_folder"
        )

    # --- in the thread --------------------------------------------------------------------------

    def _work(
        self,
        snap: Snapshot,
        step: int,
        state: SamplerState,
        skipped_updates: int,
        journal: JournalPart | None,
    ) -> None:
        place = self._attempt, step
        try:
            problem = self._write(snap, step, state, skipped_updates, journal)
            if self._tier.first:
                with contextlib.suppress(OSError):  # of a folder that is gone
                    if problem:
                        drop(self._tier.folder, place)
                    else:
                        prune(self._tier.folder, place, _KEEP)
        except Exception as error:  # a peer is lost: the training learns of that by itself
            self._broken = True
            log.debug("snapshot of step %d: %s", step, error)
            return
        if problem and not self._failed and self._rank == 0:
            log.warning("no snapshot of step %d in memory: %s", step, problem)
        self._failed = bool(problem)

    def _write(
        self,
        snap: Snapshot,
        step: int,
        state: SamplerState,
        skipped_updates: int,
        journal: JournalPart | None,
    ) -> str:
        """Write this rank's part, and what is to be kept for others; the manifest last. What went
        wrong on any rank, the same on every rank, or ""."""
        tier = self._tier
        entry = self._write_object(snap, step)
        part = entry if isinstance(entry, str) else _Part(entry.name, entry.size, entry.sha256)
        parts = gather_objects(part, tier.group)
        if problem := next((p for p in parts if isinstance(p, str)), ""):
            return problem
        moves = [
            Move(p.name, p.size, p.sha256, rank, partner)
            for rank, p in enumerate(parts)
            if isinstance(p, _Part) and (partner := tier.partner(rank)) is not None
        ]
        told = exchange(moves, objects_folder(tier.folder), tier.group) or entry
        entries: list[Any] | None = [None] * len(parts) if self._rank == 0 else None
        dist.gather_object(told, entries, dst=0, group=tier.group)
        manifest: list[Any] = [None, ""]
        if entries is not None:
            manifest[1] = next((e for e in entries if isinstance(e, str)), "") or self._lost()
            if not manifest[1]:
                assert self._owner and journal
                whole = CheckpointManifest(
                    **vars(self._description),
                    sampler=state,
                    step=step,
                    attempt=self._attempt,
                    objects=tuple(entries),
                    journal=journal.segments,
                    skipped_updates=skipped_updates,
                )
                fast = FastManifest(whole, self._owner.token, journal.start, journal.lines)
                manifest[0] = fast.name, fast_manifest_bytes(fast)
        dist.broadcast_object_list(manifest, src=0, group=tier.group)
        written, problem = manifest
        if problem:
            return str(problem)
        if tier.first:
            problem = self._write_manifest(*written)
        return next(filter(None, gather_objects(problem, tier.group)), "")

    def _write_object(self, snap: Snapshot, step: int) -> ObjectEntry | str:
        """This rank's object into its node's folder; its entry, or why there is none."""
        try:
            if names := not_finite(snap):
                return f"{names[0]} is not finite"
            size = sum(array.nbytes for array in snap.arrays.values())
            make_whole(self._tier.folder)
            copies = 1 + sum(
                self._tier.partner(r) == self._rank for r in range(dist.get_world_size())
            )
            if (there := room(self._tier.folder)) < copies * size:
                return f"rank {self._rank}: {there / 1e6:,.0f} MB are left of its node's memory"
            entry = write_object(str(self._tier.folder), step, self._attempt, self._rank, snap)
            os.chmod(objects_folder(self._tier.folder) / entry.name, 0o600)
            return entry
        except (OSError, DataError) as error:
            return f"rank {self._rank}: {error}"

    def _write_manifest(self, name: str, data: bytes) -> str:
        """The node's copy of the manifest; what is wrong with that, or ""."""
        url = checkpoint_url(str(self._tier.folder), name)
        try:
            objects.write_bytes(url, data, durable=False)
            os.chmod(url, 0o600)
        except (OSError, DataError) as error:
            return f"rank {self._rank}: {error}"
        return ""

    def _lost(self) -> str:
        """Whether the run is another attempt's, to whom a snapshot would be of no use."""
        return (self._owner and self._owner.lost()) or ""
