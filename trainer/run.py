"""A run and its verbs: start (with restore), load, wants, step, save, validate, skip, finish and
leave.

trainer/loop.py says in which order. Every rank calls each verb at the same steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from model.objectives import objectives_of
from shards.dataset import Dataset
from shards.errors import DataError
from shards.order.sampler import Sampler, SamplerState, Step
from shards.store.create import check_create_only
from trainer import setup
from trainer.checkpoint.errors import StaleAttemptError
from trainer.checkpoint.evidence import check_never_committed
from trainer.checkpoint.generations import Generation, generations
from trainer.checkpoint.journal import Journal, StepLine, verify_behind
from trainer.checkpoint.line import going_on_from, say_where
from trainer.checkpoint.owner import Claimant, Owner, check_free, claim
from trainer.checkpoint.restore import (
    check_data_state,
    check_goes_on,
    check_settings,
    parameter_shapes,
    restore,
    set_masters,
    whole_data_state,
)
from trainer.checkpoint.saver import Saver
from trainer.config import RunConfig
from trainer.data.batch import BatchSettings
from trainer.data.loader import Loaded, MissingShard, RankSlice, load_steps
from trainer.evaluate import Evaluation, evaluate, evaluation_bytes, without_gradient
from trainer.model import build_model
from trainer.progress import Progress
from trainer.ranks import from_rank_0, ranks_of_node
from trainer.step.engine import build_engine, set_learning_rate
from trainer.step.guard import diverged, skip_report
from trainer.step.mixture import Mixture, plan_mixture
from trainer.step.optimizer import learning_rate
from trainer.step.strict import strict_step
from trainer.step.sync import StepSync, Wants
from trainer.step.train_step import dropout_seed, train_step

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. What is below `skipped_updates` is of this attempt alone."""

    sampler: SamplerState
    step: int
    """Finished optimizer steps."""
    skipped_updates: int = 0
    """Of them, those without an update, as a loss or the gradients were not finite."""
    not_finite: tuple[Step, ...] = ()
    """Those of them since the last update."""
    pairs: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last validation."""
    validated: int = -1
    """The step at which that was."""

    @property
    def consumed(self) -> int:
        return self.sampler.consumed


@dataclass(frozen=True)
class Run:
    """What a run is made of, and does not change while it trains."""

    config: RunConfig
    """With the model's sizes that follow from the data set."""
    url: str
    attempt: int
    part: RankSlice
    data: Dataset
    sampler: Sampler
    mixture: Mixture
    batch: BatchSettings
    objectives: dict[str, float]
    """Weights of those that are trained."""
    validation: Dataset | None
    engine: Any
    length: setup.Length
    saver: Saver
    owner: Owner | None
    """Rank 0's, as are the next."""
    journal: Journal | None
    progress: Progress | None


# --- start --------------------------------------------------------------------------------------


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
        generation = restore(engine, found, url, shapes)
        enter("start")
        state = _position(generation, config, now, sampler)
        length = setup.run_length(config, data.manifest.pairs, state.step, state.consumed)
        if rank == 0:
            setup.announce(config, url, attempt, world, state.step, length, data)
            if generation:
                say_where(all_found, generation, resume_from)
            setup.write_run_files(config, url, data)
            urls = tuple(s.url for s in data.specs)
            segments = generation.manifest.journal if generation else ()
            verify_behind(url, segments)
            journal = Journal(urls, now, segments, state.sampler)
            progress = Progress(config, attempt, state.step, length.steps)
        saver = Saver(url, attempt, config.checkpoint, description, owner, journal, generation)
        if progress:
            saver.before_commit = progress.publish
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


def leave(owner: Owner | None) -> None:
    """The end of an attempt, however it comes, as far as it can be said."""
    if owner:
        owner.close()


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
        log.warning("%s", _skip_report(state))
    return TrainState(state, generation.step, skipped)


# --- steps --------------------------------------------------------------------------------------


def load(run: Run, state: TrainState) -> Generator[Loaded, None, None]:
    """This rank's part of the steps to come; close it to end its workers and threads."""
    batch = run.config.train.validation_batch
    return load_steps(
        run.data,
        run.sampler,
        run.batch,
        run.part,
        state.sampler,
        run.config.train.global_batch,
        run.length.total,
        run.config.data,
        evaluation_bytes(run.validation, batch) if run.validation else 0,
    )


def wants(run: Run, state: TrainState, stop: bool) -> Wants:
    """What this rank brings to the sync of the next step beside its data."""
    error = run.saver.problem(state.step)
    if run.owner and (other := run.owner.lost()):
        error = StaleAttemptError(other)
    return Wants(stop, run.saver.due(state.step + 1), run.saver.full(), error)


def active_objectives(run: Run, step: Step) -> dict[str, float]:
    """Weights of the objectives that a step serves."""
    qa_from = run.config.objectives.qa_from_epoch * run.data.manifest.pairs
    served = objectives_of(step.family)
    return {
        name: weight
        for name, weight in run.objectives.items()
        if name in served and (name != "qa" or step.before.consumed >= qa_from)
    }


def step(
    run: Run,
    state: TrainState,
    loaded: Loaded,
    active: dict[str, float],
    sync: StepSync,
    began: float,
) -> tuple[TrainState, dict[str, float]]:
    """Make one optimizer step of what was loaded; the state after it, and what to show of it.
    began: when it did (time.monotonic), with the wait for its data.

    Raises DivergedError on every rank after too many steps in a row that are not finite."""
    taken = loaded.step
    rate = learning_rate(run.config.optimizer, state.consumed, taken.count, run.length.total)
    set_learning_rate(run.engine, rate)
    sums, updated = _updated(run, state, loaded, active, sync)
    # The loader cannot know how many pairs earlier steps lacked.
    passed_over = state.sampler.skipped_pairs + taken.count - sync.pairs
    after = replace(taken.after, skipped_pairs=passed_over)
    state = replace(state, sampler=after, step=state.step + 1, pairs=state.pairs + taken.count)
    if run.journal:
        skipped = tuple(after.skipped_shards)
        seconds = round(time.monotonic() - began, 3)
        line = StepLine(state.step, taken.count, run.part.world, sync.digest, skipped, seconds)
        run.journal.add(line, after)
    values = {f"loss/{name}": sums[name] / max(sync.counts[name], 1.0) for name in active}
    values["loss"] = sum(active[name] * values[f"loss/{name}"] for name in active)
    values["lr"] = rate
    values["epoch"] = state.consumed / run.data.manifest.pairs
    state = replace(state, not_finite=() if updated else (*state.not_finite, taken))
    if not updated:
        state = _without_update(run, state, values)
    values["skipped_updates"] = state.skipped_updates
    return state, values


def _updated(
    run: Run, state: TrainState, loaded: Loaded, active: dict[str, float], sync: StepSync
) -> tuple[dict[str, float], bool]:
    """The losses' sums, and whether weights and moments have moved."""
    config, part = run.config, run.part
    losses, seed = config.objectives.losses(), config.run.seed
    if not part.strict:
        seed = dropout_seed(seed, state.step, part.rank)
        return train_step(run.engine, loaded.batches, active, sync.counts, losses, seed)
    return strict_step(
        run.engine,
        loaded.batches,
        part.rank * part.accumulation,
        config.train.strict,
        active,
        sync.counts,
        losses,
        dropout_seed(seed, state.step),
        config.optimizer.clip_norm,
    )


def _without_update(run: Run, state: TrainState, values: dict[str, float]) -> TrainState:
    """Count a step that moved no weight; end the run after too many in a row."""
    bad = state.not_finite
    state = replace(state, skipped_updates=state.skipped_updates + 1)
    if run.part.rank == 0:
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        log.warning("%s", skip_report(state.step, losses, state.skipped_updates, len(bad)))
    if len(bad) > run.config.train.max_skipped_updates:
        run.saver.wait()  # the last good generation may be under way
        raise diverged(state.step, bad, run.data, run.sampler)
    return state


def skip(run: Run, state: TrainState, missing: list[MissingShard]) -> TrainState:
    """Pass over shards that cannot be had, from this step on and on every rank; or, without
    data.on_error=skip, end the run on every rank with the same error."""
    if run.config.data.on_error == "fail":
        raise DataError(missing[0].message)
    before = state.sampler.skipped_shards
    fresh = {m.shard: m.message for m in missing if m.shard not in before}
    if not fresh:
        raise DataError(f"a shard that is passed over is asked for again: {missing[0].message}")
    skipped = (*state.sampler.skipped, *((shard, state.consumed) for shard in sorted(fresh)))
    shards = run.data.manifest.shards
    if len(skipped) >= len(shards):
        raise DataError(f"no shard of {run.data.url} can be had: {missing[0].message}")
    if run.part.rank == 0:
        for shard, message in sorted(fresh.items()):
            name, pairs = run.data.shards.files[shard].url, shards[shard].pairs
            log.error("skipping %s and its %d pairs from here on: %s", name, pairs, message)
    return replace(state, sampler=replace(state.sampler, skipped=skipped))


def _skip_report(state: SamplerState) -> str:
    return (
        f"data.on_error=skip: {len(state.skipped)} shards are passed over, "
        f"{state.skipped_pairs} pairs so far"
    )


# --- saving, validation, the end ----------------------------------------------------------------


def save(run: Run, state: TrainState) -> None:
    """Write a generation of this step behind the training. The ranks have agreed that there is
    room for it. None while updates are skipped: the newest one stays one before these steps."""
    if state.not_finite:
        run.saver.withhold()
    else:
        run.saver.save(run.engine, state.step, state.sampler, state.skipped_updates)


def validate(run: Run, state: TrainState) -> TrainState:
    """Measure the model on the validation set, where there is one."""
    if run.validation is None:
        return state
    run.engine.eval()
    task = Evaluation(
        run.validation,
        setup.batch_settings(run.config, run.validation, run.batch.order),
        frozenset(run.objectives),
        run.config.train.validation_batch,
    )
    forward = without_gradient(run.engine, run.engine.device, run.config.objectives.losses())
    metrics = evaluate(forward, task)
    if run.progress:
        run.progress.validation(state.step, metrics)
    return replace(state, metrics=metrics, validated=state.step)


def finish(run: Run, state: TrainState, stopped: bool) -> TrainState:
    """Save, wait until all is committed, and validate unless the run was stopped early."""
    if stopped and state.not_finite:  # a next start makes these steps again
        run.saver.wait()
    else:
        run.saver.finish(run.engine, state.step, state.sampler, state.skipped_updates, stopped)
    if run.part.rank == 0 and state.sampler.skipped:
        log.warning("%s", _skip_report(state.sampler))
    if not stopped and state.validated != state.step:
        state = validate(run, state)
    return state
