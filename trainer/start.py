"""The start of an attempt: the run is built, claimed, and brought to where it stands."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from shards.order.sampler import Sampler
from shards.store.create import check_create_only
from trainer import setup
from trainer.checkpoint.compare import check_data_state, check_settings, whole_data_state
from trainer.checkpoint.evidence import check_never_committed
from trainer.checkpoint.fast import Snapshots, open_tier
from trainer.checkpoint.fast_format import continued
from trainer.checkpoint.generations import Generation, generations, newest_whole
from trainer.checkpoint.journal import Journal, verify_behind
from trainer.checkpoint.line import going_on_from, say_where
from trainer.checkpoint.owner import Claimant, check_free, claim
from trainer.checkpoint.restore import check_goes_on, parameter_shapes, restore, set_masters
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.tiers import snapshots
from trainer.config import RunConfig
from trainer.data.loader import RankSlice
from trainer.model import build_model
from trainer.progress import Progress
from trainer.ranks import from_rank_0, ranks_of_node
from trainer.run import Run, TrainState, leave, skipped_report
from trainer.step.engine import build_engine
from trainer.step.mixture import plan_mixture

log = logging.getLogger("lxscale")


def start(
    config: RunConfig, claimant: Claimant, enter: Callable[[str], None]
) -> tuple[Run, TrainState]:
    """Build the run, claim it, and go to its newest whole generation, that of
    checkpoint.resume_from, or the start.

    The claim ends the attempt before, so it comes when all that may be wrong with this one's
    configuration, data and model has been looked at.
    """
    setup.check_timeouts(config)
    url = setup.run_url(config)
    free = from_rank_0(lambda: check_free(url, claimant))
    data = setup.open_training_data(config)
    resume_from = config.checkpoint.resume_from
    before = going_on_from(from_rank_0(lambda: _generations(url)), resume_from)
    order = setup.order_version(before)
    sampler = data.sampler(config.sampler, config.run.seed, order)
    objectives = setup.resolve_objectives(config, data)
    validation = setup.open_validation_data(config, data)
    batch = setup.batch_settings(config, data, order)
    config = config.model_copy(update={"model": setup.resolve_model(config, data)})
    check_settings(before, config, objectives)
    engine, shapes = _engine(config, new=not before)
    description = setup.describe(config, data, objectives, shapes, order)
    now = description.data_state
    check_goes_on(before, url, shapes, now, config.checkpoint.override_data_state)

    rank, world = dist.get_rank(), dist.get_world_size()
    owner, journal, progress = None, None, None

    def own() -> tuple[int, list[Generation | str]]:
        nonlocal owner
        check_create_only(url)
        owner = claim(url, free)
        return owner.attempt, owner.found

    try:
        # Rank 0's list: all must try the same generations. They may be others than before.
        attempt, all_found = from_rank_0(own)
        found = going_on_from(all_found, resume_from)
        check_goes_on(found, url, shapes, now, config.checkpoint.override_data_state)
        enter("restore")
        tier = open_tier(config, url)
        latest = newest_whole(all_found)
        newer = snapshots(tier, found, latest, description, attempt, url) if tier else []
        generation, fast = restore(engine, found, url, shapes, config.data.cache, tier, newer)
        stored = newest_whole(found) if fast else generation
        enter("start")
        state = _position(generation, config, now, sampler)
        length = setup.run_length(config, data.manifest.pairs, state.step, state.consumed)
        if rank == 0:
            setup.announce(config, url, attempt, world, state.step, length, data)
            if stored:
                say_where(all_found, stored, resume_from)
            setup.write_run_files(config, url, data)
            segments = generation.manifest.journal if generation else ()
            verify_behind(url, segments)
            journal = Journal(tuple(s.url for s in data.specs), now, segments, state.sampler)
            if fast:
                journal.go_on(continued(fast, stored))
            progress = Progress(config, attempt, state.step, length.steps)
        saver = Saver(
            url,
            attempt,
            config.checkpoint,
            description,
            owner,
            journal,
            stored,
            goes_back=stored != latest,
        )
        if progress:
            saver.before_commit = progress.publish
        memory = Snapshots(tier, config.checkpoint, attempt, description, owner, journal)
    except BaseException:
        leave(owner)
        raise
    run = Run(
        config=config,
        url=url,
        attempt=attempt,
        part=_part(config),
        data=data,
        sampler=sampler,
        mixture=plan_mixture(sampler, data),
        batch=batch,
        objectives=objectives,
        validation=validation,
        engine=engine,
        length=length,
        saver=saver,
        memory=memory,
        owner=owner,
        journal=journal,
        progress=progress,
    )
    return run, state


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


def _engine(config: RunConfig, new: bool) -> tuple[Any, dict[str, list[int]]]:
    """The engine with the initial weights, and the parameters' shapes. new: the run has no
    checkpoint; one that has needs no initial weights, which may be gone by then."""
    train = config.train
    source = (train.init_from, train.init_fresh) if new else (None, ())
    model = build_model(config.model, config.run.seed, *source)
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
