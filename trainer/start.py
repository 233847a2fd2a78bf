"""The start of an attempt: the run is built, claimed, and brought to where it stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from shards.dataset import Dataset
from shards.order.sampler import Sampler
from shards.store.create import check_create_only
from trainer import setup
from trainer.checkpoint.compare import check_data_state, check_settings, whole_data_state
from trainer.checkpoint.evidence import check_never_committed
from trainer.checkpoint.fast import Snapshots, Tier, open_tier
from trainer.checkpoint.fast_format import FastManifest, continued
from trainer.checkpoint.format import RunDescription
from trainer.checkpoint.generations import Generation, generations, newest_whole
from trainer.checkpoint.journal import Journal, verify_behind
from trainer.checkpoint.line import going_on_from, say_where
from trainer.checkpoint.owner import Claimant, Owner, check_free, claim
from trainer.checkpoint.restore import check_goes_on, parameter_shapes, restore, set_masters
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.tiers import snapshots
from trainer.config import RunConfig
from trainer.data.batch import BatchSettings
from trainer.data.loader import RankSlice
from trainer.initial import begin_from
from trainer.model import build_model
from trainer.progress import Progress
from trainer.ranks import from_rank_0, ranks_of_node
from trainer.run import Run, TrainState, leave, skipped_report
from trainer.step.engine import build_engine
from trainer.step.mixture import plan_mixture
from trainer.tasks import TASKS

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class _Prepared:
    """What a run is made of before it is claimed; as in Run."""

    config: RunConfig
    url: str
    free: Claimant
    """To whom the run is free."""
    data: Dataset
    sampler: Sampler
    objectives: dict[str, float]
    validation: Dataset | None
    batch: BatchSettings
    engine: Any
    description: RunDescription

    def check_goes_on(self, found: Sequence[Generation | str]) -> None:
        """Raise what going on from these generations would."""
        shapes, state = self.description.parameters, self.description.data_state
        override = self.config.checkpoint.override_data_state
        check_goes_on(found, self.url, shapes, state, override)


@dataclass(frozen=True)
class _Restored:
    """Where a run stands."""

    state: TrainState
    source: Generation | None
    """What was loaded."""
    fast: FastManifest | None
    """That is a snapshot."""
    stored: Generation | None
    """What the store has of this line."""
    goes_back: bool
    """The store has something newer, of another line."""
    tier: Tier | None


def start(
    config: RunConfig, claimant: Claimant, enter: Callable[[str], None]
) -> tuple[Run, TrainState]:
    """Build the run, claim it, and go to its newest whole generation, that of
    checkpoint.resume_from, or the start.

    The claim ends the attempt before, so it comes when all that may be wrong with this one's
    configuration, data and model has been looked at.
    """
    made = _prepare(config, claimant)
    owner: Owner | None = None

    def own() -> tuple[int, list[Generation | str]]:
        nonlocal owner
        check_create_only(made.url)
        owner = claim(made.url, made.free)
        return owner.attempt, owner.found

    try:
        # Rank 0's list: all must try the same generations. They may be others than before.
        attempt, found = from_rank_0(own)
        enter("restore")
        at = _restore(made, found, attempt)
        enter("start")
        run = _assemble(made, at, attempt, owner)
    except BaseException:
        leave(owner)
        raise
    return run, at.state


def _prepare(config: RunConfig, claimant: Claimant) -> _Prepared:
    """Open and build all of it, and look whether it fits what the run has saved."""
    setup.check_timeouts(config)
    url = setup.run_url(config)
    free = from_rank_0(lambda: check_free(url, claimant))
    data = setup.open_training_data(config)
    found = from_rank_0(lambda: _generations(url))
    before = going_on_from(found, config.checkpoint.resume_from)
    order = setup.order_version(before)
    setup.check_task(config, data)
    config = config.model_copy(update={"sampler": setup.sampler_settings(config, data)})
    sampler = data.sampler(config.sampler, config.run.seed, order)
    objectives = setup.resolve_objectives(config, data)
    validation = setup.open_validation_data(config, data)
    batch = setup.batch_settings(config, data, order)
    config = config.model_copy(update={"model": setup.resolve_model(config, data)})
    check_settings(before, config, objectives)
    engine, shapes = _engine(config, data, new=not before)
    made = _Prepared(
        config=config,
        url=url,
        free=free,
        data=data,
        sampler=sampler,
        objectives=objectives,
        validation=validation,
        batch=batch,
        engine=engine,
        description=setup.describe(config, data, objectives, shapes, order),
    )
    made.check_goes_on(before)
    return made


def _restore(made: _Prepared, all_found: list[Generation | str], attempt: int) -> _Restored:
    """Load what the run goes on from. all_found: its generations, as the claim found them."""
    config, url, run = made.config, made.url, made.description
    found = going_on_from(all_found, config.checkpoint.resume_from)
    made.check_goes_on(found)
    latest = newest_whole(all_found)
    tier = open_tier(config, url)
    newer = snapshots(tier, found, latest, run, attempt, url) if tier else []
    source, fast = restore(made.engine, found, url, run.parameters, config.data.cache, tier, newer)
    stored = newest_whole(found) if fast else source
    if stored and dist.get_rank() == 0:
        say_where(all_found, stored, config.checkpoint.resume_from)
    state = _position(source, config, run.data_state, made.sampler)
    return _Restored(state, source, fast, stored, stored != latest, tier)


def _assemble(made: _Prepared, at: _Restored, attempt: int, owner: Owner | None) -> Run:
    """The run, with what writes of it. owner: rank 0's."""
    config, url, data, description = made.config, made.url, made.data, made.description
    pairs = setup.epoch_pairs(config, [data.manifest])
    length = setup.run_length(config, pairs, at.state.step, at.state.consumed)
    journal, progress = None, None
    if owner:
        world, step = dist.get_world_size(), at.state.step
        setup.announce(config, url, attempt, world, step, length, data)
        setup.write_run_files(config, url, data)
        segments = at.source.manifest.journal if at.source else ()
        verify_behind(url, segments)
        urls = tuple(s.url for s in data.specs)
        journal = Journal(urls, description.data_state, segments, at.state.sampler)
        if at.fast:
            journal.go_on(continued(at.fast, at.stored))
        progress = Progress(config, attempt, step, length.steps)
    settings = config.checkpoint
    saver = Saver(url, attempt, settings, description, owner, journal, at.stored, at.goes_back)
    if progress:
        saver.before_commit = progress.publish
    return Run(
        config=config,
        url=url,
        attempt=attempt,
        part=_part(config),
        data=data,
        sampler=made.sampler,
        mixture=plan_mixture(made.sampler, data),
        batch=made.batch,
        objectives=made.objectives,
        validation=made.validation,
        engine=made.engine,
        length=length,
        saver=saver,
        memory=Snapshots(at.tier, settings, attempt, description, owner, journal),
        owner=owner,
        journal=journal,
        progress=progress,
    )


def _part(config: RunConfig) -> RankSlice:
    """This rank's part of every step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = setup.micro_batches(config, world)
    return RankSlice(rank, world, parts, ranks_of_node(), strict=config.train.strict > 0)


def _generations(url: str) -> list[Generation | str]:
    """Those of the run, newest first; none only where there never was one."""
    found = list(generations(url))
    if not found:
        check_never_committed(url)
    return found


def _engine(config: RunConfig, data: Dataset, new: bool) -> tuple[Any, dict[str, list[int]]]:
    """The engine with the initial weights, and the parameters' shapes. new: the run has no
    checkpoint; one that has needs no initial weights, which may be gone by then."""
    model = build_model(config.model, config.run.seed, TASKS[config.task].objectives)
    if new and config.train.init_from is not None:
        begin_from(model, config, data)
    bf16 = config.train.precision == "bf16"
    first = {n: p.detach().clone() for n, p in model.named_parameters()} if bf16 else {}
    shapes = parameter_shapes(model)
    engine = build_engine(model, config)
    if bf16:
        set_masters(engine, first)
    return engine, shapes


def _position(
    generation: Generation | None, config: RunConfig, now: dict[str, Any], sampler: Sampler
) -> TrainState:
    """Where in the data the run stands, and how many steps it has done. now: its data state."""
    fresh = sampler.start()
    if generation is None:
        return TrainState(fresh, 0)
    saved = whole_data_state(generation.manifest.data_state)
    check_data_state(saved, now, config.checkpoint.override_data_state)
    state, skipped = generation.manifest.sampler, generation.manifest.skipped_updates
    if any(saved.get(k) != v for k, v in now.items() if k.startswith(("sampler.", "data."))):
        # Overridden: as if the run had used this sampler from its start.
        for step in sampler.steps_ahead(fresh, config.train.global_batch, state.consumed):
            fresh = step.after
        return TrainState(fresh, generation.step, skipped)
    if state.skipped and dist.get_rank() == 0:
        log.warning("%s", skipped_report(state))
    return TrainState(state, generation.step, skipped)
