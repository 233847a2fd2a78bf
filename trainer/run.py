"""A run and its verbs: load, ahead, wants, step, save, validate, skip, finish and leave.

trainer/loop.py says in which order, trainer/start.py how it begins. Every rank calls each verb at
the same steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from model.batch import Batch
from model.flops import training_flops
from model.objectives import objectives_of
from shards.dataset import Dataset
from shards.errors import DataError
from shards.order.sampler import Sampler, SamplerState, Step
from trainer import setup
from trainer.checkpoint.errors import StaleAttemptError
from trainer.checkpoint.fast import Snapshots
from trainer.checkpoint.journal import Journal, StepLine
from trainer.checkpoint.owner import Owner
from trainer.checkpoint.saver import Saver, own_snapshot
from trainer.config import RunConfig
from trainer.data.batch import BatchSettings
from trainer.data.loader import Loaded, MissingShard, RankSlice, load_steps
from trainer.evaluate import Evaluation, evaluate, evaluation_bytes, without_gradient
from trainer.progress import Progress
from trainer.step.copying import copied
from trainer.step.engine import set_learning_rate
from trainer.step.guard import diverged, skip_report
from trainer.step.laps import Laps
from trainer.step.mixture import Mixture
from trainer.step.optimizer import learning_rate
from trainer.step.strict import strict_step
from trainer.step.sync import StepSync, Verdict, Wants, begin_sync, verdict
from trainer.step.train_step import Updated, dropout_seed, train_step
from trainer.tasks import TASKS

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
    memory: Snapshots
    owner: Owner | None
    """Rank 0's, as are the next."""
    journal: Journal | None
    progress: Progress | None


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


@dataclass(frozen=True)
class Ahead:
    """A step that is loaded, and not yet made."""

    loaded: Loaded
    batches: Iterator[Batch]
    """Its batches on the device."""
    active: dict[str, float]
    """Weights of its objectives."""
    sync: Callable[[], StepSync]
    """Waits for what all ranks bring to it."""


def ahead(run: Run, steps: Iterator[Loaded]) -> Ahead | None:
    """Load the next step, begin its sync and its way to the device; None at the end of the run."""
    loaded = next(steps, None)
    if loaded is None:
        return None
    active = active_objectives(run, loaded.step)
    sync = begin_sync(loaded, [*active], run.config.objectives.losses(), run.mixture)
    return Ahead(loaded, copied(loaded.batches, run.engine.device), active, sync)


def wants(run: Run, state: TrainState, stop: bool) -> Wants:
    """What this rank wants after the step that is about to be made."""
    error = run.saver.problem(state.step)
    if run.owner and (other := run.owner.lost()):
        error = StaleAttemptError(other)
    due, snapshot = run.saver.due(state.step + 1), run.memory.due(state.step + 1)
    return Wants(stop, due, run.saver.full(), error, snapshot, run.memory.busy())


def active_objectives(run: Run, step: Step) -> dict[str, float]:
    """Weights of the objectives that a step serves."""
    qa_from = run.config.objectives.qa_from_epoch * run.data.manifest.pairs
    served = objectives_of(step.family, TASKS[run.config.task].objectives)
    return {
        name: weight
        for name, weight in run.objectives.items()
        if name in served and (name != "qa" or step.before.consumed >= qa_from)
    }


def flops(run: Run, now: Ahead) -> int:
    """Operations that this rank's part of a step takes."""
    losses, names = run.config.objectives.losses(), frozenset(now.active)
    return sum(training_flops(run.config.model, b, names, losses) for b in now.loaded.batches)


def step(
    run: Run,
    state: TrainState,
    now: Ahead,
    sync: StepSync,
    wanted: Wants,
    laps: Laps,
) -> tuple[TrainState, dict[str, float], Verdict]:
    """Make one optimizer step of what was loaded; the state after it, what to show of it, and what
    all ranks do next. laps: since it began, with the wait for data.

    Raises DivergedError on every rank after too many steps in a row that are not finite."""
    taken, active = now.loaded.step, now.active
    rate = learning_rate(run.config.optimizer, state.consumed, taken.count, run.length.total)
    set_learning_rate(run.engine, rate)
    done = _updated(run, state, now, sync, wanted.flags(), laps)
    # The loader cannot know how many pairs earlier steps lacked.
    passed_over = state.sampler.skipped_pairs + taken.count - sync.pairs
    after = replace(taken.after, skipped_pairs=passed_over)
    state = replace(state, sampler=after, step=state.step + 1, pairs=state.pairs + taken.count)
    if run.journal:
        skipped = tuple(after.skipped_shards)
        seconds = round(laps.total, 3)
        line = StepLine(state.step, taken.count, run.part.world, sync.digest, skipped, seconds)
        run.journal.add(line, after)
    values = {f"loss/{name}": done.sums[name] / max(sync.counts[name], 1.0) for name in active}
    values["loss"] = sum(active[name] * values[f"loss/{name}"] for name in active)
    values["lr"] = rate
    values["gradient_norm"] = done.norm
    values["epoch"] = state.consumed / setup.epoch_pairs(run.config, [run.data.manifest])
    state = replace(state, not_finite=() if done.updated else (*state.not_finite, taken))
    if not done.updated:
        state = _without_update(run, state, values)
    values["skipped_updates"] = state.skipped_updates
    return state, values, verdict(wanted, done.riders)


def _updated(
    run: Run,
    state: TrainState,
    now: Ahead,
    sync: StepSync,
    riders: list[float],
    laps: Laps,
) -> Updated:
    config, part = run.config, run.part
    losses, seed = config.objectives.losses(), config.run.seed
    if not part.strict:
        seed = dropout_seed(seed, state.step, part.rank)
        return train_step(
            run.engine, now.batches, now.active, sync.counts, losses, seed, riders, laps
        )
    return strict_step(
        run.engine,
        now.batches,
        part.rank * part.accumulation,
        config.train.strict,
        now.active,
        sync.counts,
        losses,
        dropout_seed(seed, state.step),
        config.optimizer.clip_norm,
        riders,
        laps,
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


def skipped_report(state: SamplerState) -> str:
    return (
        f"data.on_error=skip: {len(state.skipped)} shards are passed over, "
        f"{state.skipped_pairs} pairs so far"
    )


# --- saving, validation, the end ----------------------------------------------------------------


def save(run: Run, state: TrainState, told: Verdict) -> None:
    """Write a generation of this step behind the training, to the store, to the nodes' memory, or
    to both: the ranks have agreed which are due and can be. None while updates are skipped: the
    newest one stays one before these steps."""
    if state.not_finite:
        if told.save:
            run.saver.withhold()
        return
    snap = own_snapshot(run.engine)
    if told.save:
        run.saver.save(snap, state.step, state.sampler, state.skipped_updates)
    if told.snapshot:
        run.memory.make(snap, state.step, state.sampler, state.skipped_updates)


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
    if committed := not (stopped and state.not_finite):
        run.saver.finish(run.engine, state.step, state.sampler, state.skipped_updates, stopped)
    else:  # a next start makes these steps again
        run.saver.wait()
    run.memory.close(committed)
    if run.part.rank == 0 and state.sampler.skipped:
        log.warning("%s", skipped_report(state.sampler))
    if not stopped and state.validated != state.step:
        state = validate(run, state)
    return state


def leave(owner: Owner | None) -> None:
    """The end of an attempt, however it comes, as far as it can be said."""
    if owner:
        owner.close()
