"""What a restore reads from where: snapshots in nodes' memory and generations on the store, each
object once per node.

Which snapshots a run may go on from is rank 0's to say, for all. The objects that a node's ranks
need and that it does not have whole come from another node that has; those of a remote store that
several ranks of a node need are fetched by one of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from shards.store import objects
from shards.store.folders import owned_folder
from shards.store.stored import StoredFile, hash_file
from trainer.checkpoint.chain import token_of
from trainer.checkpoint.compare import unfit
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.fast import Tier
from trainer.checkpoint.fast_folder import manifests, objects_folder
from trainer.checkpoint.fast_format import FastManifest, parse_fast_manifest
from trainer.checkpoint.format import ObjectEntry, RunDescription, Span
from trainer.checkpoint.generations import Generation, newest_whole, objects_of, read_entry
from trainer.checkpoint.transfer import Move, exchange
from trainer.ranks import from_rank_0, gather_objects, ranks_by_node

log = logging.getLogger("lxscale")

Read = Callable[[str, ObjectEntry], bytes]


# --- snapshots in memory ------------------------------------------------------------------------


def snapshots(
    tier: Tier,
    found: Sequence[Generation | str],
    latest: Generation | None,
    run: RunDescription,
    attempt: int,
    run_url: str,
) -> list[FastManifest]:
    """The snapshots that are newer than the run's newest generation and of its line, newest first;
    the same on every rank.

    found: the generations that the run may go on from; latest: the newest of all that it has; run:
    as it is now; attempt: this one.
    """
    told: list[tuple[str, bytes]] = []
    if tier.first:
        for _, path in manifests(tier.folder):
            with contextlib.suppress(OSError):  # removed since
                told.append((path.name, path.read_bytes()))
    all_told = _gather_to_rank_0(told)

    def choose() -> list[FastManifest]:
        whole: dict[tuple[int, int], FastManifest] = {}
        damaged: dict[str, str] = {}
        for name, data in all_told:
            try:
                fast = parse_fast_manifest(data, f"the snapshot {name} in a node's memory")
            except CheckpointError as error:
                damaged[name] = str(error)
            else:
                whole[fast.place] = fast
        for name in damaged.keys() - {fast.name for fast in whole.values()}:
            log.warning("%s: passed over", damaged[name])
        newest = newest_whole(found)
        chosen = []
        for _, fast in sorted(whole.items(), reverse=True):
            oldest = latest.manifest.attempt if latest else 0
            if not _follows(fast, newest) or not oldest <= fast.manifest.attempt < attempt:
                continue
            # An attempt of an earlier life of the run, which was removed since, has another claim.
            if token_of(run_url, fast.manifest.attempt) != fast.claim:
                continue
            if reason := unfit(fast, run):
                log.warning("%s in memory is passed over: %s", fast, reason)
                continue
            chosen.append(fast)
        return chosen

    return from_rank_0(choose)


def _follows(fast: FastManifest, newest: Generation | None) -> bool:
    """Whether a snapshot is of the same line as the store's newest generation, and newer. One of an
    attempt that a later one has committed after is not: nobody went on from it."""
    if newest is None:
        return not fast.manifest.journal
    if fast.manifest.attempt < newest.manifest.attempt or fast.manifest.step <= newest.step:
        return False
    # Both name all segments from the run's first step on.
    pairs = zip(fast.manifest.journal, newest.manifest.journal, strict=False)
    return all(a == b for a, b in pairs)


def _gather_to_rank_0(told: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """What the first rank of each node tells, on rank 0."""
    all_told: list[list[tuple[str, bytes]] | None] | None = None
    if dist.get_rank() == 0:
        all_told = [None] * dist.get_world_size()
    dist.gather_object(told, all_told, dst=0)
    return [entry for one in all_told or [] for entry in one or []]


def bring(tier: Tier, fast: FastManifest, wanted: Sequence[Span]) -> str:
    """Have every node hold the objects of a snapshot that its ranks want, whole. What is wrong with
    them, the same on every rank, or "". wanted: by this rank."""
    entries, rank = fast.manifest.objects, dist.get_rank()
    folder, here = objects_folder(tier.folder), tier.here
    # Each is read whole once on its node to see whether it is, dealt out over the ranks.
    dealt = [i for i in range(len(entries)) if here[i % len(here)] == rank]
    whole = [i for i in dealt if _is_whole(folder / entries[i].name, entries[i])]
    told = gather_objects((whole, objects_of(generation_of(tier, fast), wanted)))
    have = [{i for r in ranks for i in told[r][0]} for ranks in tier.nodes]
    need = [{i for r in ranks for i in told[r][1]} for ranks in tier.nodes]
    moves = []
    for n, ranks in enumerate(tier.nodes):
        for i in sorted(need[n] - have[n]):
            having = [tier.nodes[m] for m in range(len(have)) if i in have[m]]
            if not having:
                return f"{entries[i].name} of {fast} is whole in no node's memory"
            sources = having[i % len(having)]
            source, target = sources[i % len(sources)], ranks[i % len(ranks)]
            e = entries[i]
            moves.append(Move(e.name, e.size, e.sha256, source, target))
    problem = exchange(moves, folder, None)
    return next(filter(None, gather_objects(problem)), "")


def generation_of(tier: Tier, fast: FastManifest) -> Generation:
    """A snapshot as a generation, whose objects lie in this node's folder."""
    return Generation(str(tier.folder), fast.name, fast.manifest)


def _is_whole(path: Path, entry: ObjectEntry) -> bool:
    try:
        size = path.stat().st_size
        sha256 = hash_file(path) if size == entry.size else ""
    except OSError:
        return False
    return StoredFile(str(path), entry.sha256, entry.size).problem(size, sha256) is None


# --- generations on the store -------------------------------------------------------------------


@contextlib.contextmanager
def once_per_node(
    generation: Generation, wanted: Sequence[Span], cache: Path
) -> Iterator[tuple[Callable[[], None], Read]]:
    """Yields a function that fetches this rank's part of what several ranks of its node want, and
    one that reads an object, once all ranks have done so. Leave it when all have read.

    cache: a folder of this node's disk, for as long as this lasts.
    """
    remote = objects.local_path(generation.run_url) is None
    here = next(ranks for ranks in ranks_by_node() if dist.get_rank() in ranks)
    rank, entries = dist.get_rank(), generation.manifest.objects
    told = gather_objects(objects_of(generation, wanted) if remote else [])
    wanting = {i: [r for r in here if i in told[r]] for i in range(len(entries))}
    shared = {i: ranks for i, ranks in wanting.items() if len(ranks) > 1}
    with contextlib.ExitStack() as stack:
        made = ""
        if shared and rank == here[0]:
            with contextlib.suppress(OSError):  # a full disk: each reads for itself
                made = str(stack.enter_context(owned_folder(cache, "restore-")))
        place = gather_objects(made)[here[0]]

        def fetch() -> None:
            for i, ranks in shared.items() if place else ():
                if ranks[i % len(ranks)] == rank:
                    data = read_entry(generation.run_url, entries[i])
                    with contextlib.suppress(OSError):
                        _put(Path(place) / entries[i].name, data)

        def read(run_url: str, entry: ObjectEntry) -> bytes:
            with contextlib.suppress(OSError):
                if place:
                    data = (Path(place) / entry.name).read_bytes()
                    if entry.is_whole(data):
                        return data
            return read_entry(run_url, entry)

        yield fetch, read


def _put(path: Path, data: bytes) -> None:
    """Write a file, or none."""
    try:
        path.write_bytes(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
