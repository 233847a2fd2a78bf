"""Bringing a run's newest whole generation back into an engine, at any world size and stage.

What must agree for that: compare.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.errors import DataError, NodeError, StoreError
from shards.store.cache import cache_folder
from trainer.checkpoint.compare import check_data_state, check_same_model
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.fast import Tier
from trainer.checkpoint.fast_format import FastManifest
from trainer.checkpoint.generations import Generation, newest_whole, read_entry, read_fragments
from trainer.checkpoint.tiers import Read, bring, generation_of, once_per_node
from trainer.checkpoint.zero_state import list_fragments, refresh_weights, write
from trainer.ranks import gather_objects

log = logging.getLogger("lxscale")


def restore(
    engine: Any,
    found: Sequence[Generation | str],
    run_url: str,
    shapes: dict[str, list[int]],
    cache: str | None,
    tier: Tier | None = None,
    snapshots: Sequence[FastManifest] = (),
) -> tuple[Generation | None, FastManifest | None]:
    """Load the newest whole generation into the engine, and say which; with its snapshot where it
    comes from the fast tier. None when the run has none yet.

    found: as `going_on_from` (line.py) orders them; snapshots: of `tier`, newer, newest first; both
    the same on every rank. A damaged one is passed over with a warning. cache: data.cache, for what
    ranks of a node share meanwhile. Raises CheckpointError when there are generations but none is
    whole, or when they belong to another model.
    """
    wanted = [f.span for f in list_fragments(engine)]
    problems: list[str] = []

    def loaded(problem: str, more: bool) -> bool:
        if not problem:
            refresh_weights(engine)
            return True
        if more and dist.get_rank() == 0:
            log.warning("%s; falling back to the generation before", problem)
        return False

    for fast in snapshots:
        assert tier
        generation = generation_of(tier, fast)
        problem = bring(tier, fast, wanted)
        if not problem and (problem := _load(engine, generation, read_entry)) and not found:
            # There is nothing that would replace what was loaded of it.
            raise NodeError(f"{problem}; the same command starts anew")
        if loaded(problem, True):
            if dist.get_rank() == 0:
                newest = newest_whole(found)
                steps = generation.step - (newest.step if newest else 0)
                log.info("%s in memory is %d steps newer than the store", fast, steps)
            return generation, fast
    for left, candidate in zip(range(len(found) - 1, -1, -1), found, strict=True):
        if isinstance(candidate, Generation):
            check_same_model(candidate, shapes)
            with once_per_node(candidate, wanted, cache_folder(cache)) as (fetch, read):
                problem = _on_every_rank(fetch) or _load(engine, candidate, read)
        else:
            problem = candidate
        if loaded(problem, left > 0):
            assert isinstance(candidate, Generation)
            return candidate, None
        problems.append(problem)
    if problems:
        raise _none_is_whole(run_url, problems[0])
    return None, None


def check_goes_on(
    found: Sequence[Generation | str],
    run_url: str,
    shapes: dict[str, list[int]],
    data_state: dict[str, Any],
    override: bool,
) -> None:
    """Raise what restoring the newest of these generations would, as far as its manifest says: a
    run that cannot go on so need not be claimed."""
    newest = newest_whole(found)
    if newest:
        check_same_model(newest, shapes)
        if not override:
            check_data_state(newest.manifest.data_state, data_state, override)
    elif found:
        raise _none_is_whole(run_url, str(found[0]))


def _none_is_whole(run_url: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"no generation of {run_url} to go on from is whole ({problem}): restore the objects, "
        "name another step in checkpoint.resume_from, or give the run another run.name to start "
        "from scratch"
    )


def _load(engine: Any, generation: Generation, read: Read) -> str:
    """Load one generation on every rank; what is wrong with it on any of them, or ""."""
    fragments = list_fragments(engine)
    updates = generation.step - generation.manifest.skipped_updates

    def load() -> None:
        # A fragment may come piece by piece, from objects of another world size.
        for i, start, values in read_fragments(generation, [f.span for f in fragments], read):
            for kind, part in values.items():
                write(engine, fragments[i], kind, torch.from_numpy(part), updates, start)

    return _on_every_rank(load)


def _on_every_rank(action: Callable[[], None]) -> str:
    """What is wrong with a generation on any rank, or "". StoreError on all of them when a rank
    cannot reach the store: that is no reason to go back further."""
    problem, fault = "", ""
    try:
        action()
    except CheckpointError as error:
        problem = str(error)
    except DataError as error:
        fault = str(error)
    told = gather_objects((problem, fault))
    if faults := [f for _, f in told if f]:
        raise StoreError(faults[0])
    return next((p for p, _ in told if p), "")


def set_masters(engine: Any, weights: dict[str, Tensor]) -> None:
    """Start from these fp32 weights: without it a bf16 engine's masters are rounded to bf16."""
    for fragment in list_fragments(engine):
        name, start, length = fragment.span
        write(engine, fragment, "master", weights[name].reshape(-1)[start : start + length], 0)
    refresh_weights(engine)


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters()}
