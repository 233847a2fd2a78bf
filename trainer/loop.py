"""Training, told once: start, then load, sync, step, save and validate until the run's end. A step
is loaded, and its sync begun, before the step that precedes it is made.

Runs in every worker; torch.distributed must be up. Nothing here knows who placed the workers. What
each verb does: trainer/run.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from trainer.checkpoint.lease import Made
from trainer.checkpoint.owner import Claimant
from trainer.config import RunConfig
from trainer.data.loader import Loaded
from trainer.logs import setup_logging
from trainer.phases import Phases
from trainer.run import (
    Ahead,
    Run,
    TrainState,
    ahead,
    finish,
    flops,
    leave,
    load,
    save,
    skip,
    step,
    validate,
    wants,
)
from trainer.start import start
from trainer.step.laps import Laps


@dataclass(frozen=True)
class Control:
    """What the placement gives to the loop."""

    should_stop: Callable[[], bool] = lambda: False
    """Polled before each step on every rank, never blocks; all ranks then stop after it, save and
    return."""
    enter: Callable[[str], None] = lambda phase: None
    """Told what the rank is at: "start", "restore", "data", "agreement", "step", "save",
    "validation", "end". Who watches it knows by this how long that may take."""
    claimant: Claimant = field(default_factory=Claimant)
    """Who wants to own the run; rank 0's counts."""
    made: Callable[[Made], None] = lambda made: None
    """Told what the attempt has done, each time before `enter` and after each step."""


@dataclass(frozen=True)
class TrainResult:
    step: int
    consumed: int
    stopped: bool
    """Control ended it early."""
    metrics: dict[str, float]
    """Of the last validation; empty where there was none."""
    pairs: int
    """Trained on in this attempt."""
    seconds: float
    """That this attempt's steps took."""


def train(config: RunConfig, control: Control) -> TrainResult:
    """Train to the end of the run, going on from its newest whole checkpoint.

    Raises OwnedError when another job owns the run, StaleAttemptError when one takes it over.
    """
    setup_logging(dist.get_rank())
    phases = Phases(control.enter, control.made)
    run, state = start(config, control.claimant, phases.enter)
    phases.owned(run.attempt, state.step, run.owner)
    try:
        return _train(run, state, control, phases)
    finally:
        phases.done()
        if run.progress:
            run.progress.close()
        leave(run.owner)


def _train(run: Run, state: TrainState, control: Control, phases: Phases) -> TrainResult:
    steps, stopped = load(run, state), False
    following: Ahead | None = None
    validate_every = run.config.train.validate_every
    try:
        while state.consumed < run.length.total and not stopped:
            if run.progress:
                run.progress.begin()
            laps = Laps()
            # There is none at the start, and after a skip.
            now = following or _ahead(run, steps, phases, laps)
            assert now, "the loader has all steps up to the run's end"
            phases.enter("agreement")
            sync = now.sync()
            laps("agreement")
            if sync.missing:
                state = skip(run, state, sync.missing)
                steps.close()
                steps, following = load(run, state), None
                continue
            # The sync of the next runs behind this step.
            following = _ahead(run, steps, phases, laps)
            phases.enter("step")
            wanted = wants(run, state, control.should_stop())
            state, values, told = step(run, state, now, sync, wanted, laps)
            state = replace(state, seconds=state.seconds + laps.total)
            phases.done(state.step)
            if run.progress:
                count, own = now.loaded.step.count, flops(run, now)
                run.progress.mixture(run.mixture.planned, sync.mixture, count)
                run.progress.step(state.step, values, count, laps, own)
            del now  # a later one is made in its memory
            if told.save or told.snapshot:
                phases.enter("save")
                save(run, state, told)
            if validate_every and state.step % validate_every == 0:
                phases.enter("validation")
                state = validate(run, state)
            stopped = told.stop and state.consumed < run.length.total
        phases.enter("end")
    finally:
        steps.close()
    state = finish(run, state, stopped)
    return TrainResult(
        state.step, state.consumed, stopped, state.metrics, state.pairs, state.seconds
    )


def _ahead(run: Run, steps: Iterator[Loaded], phases: Phases, laps: Laps) -> Ahead | None:
    phases.enter("data")
    found = ahead(run, steps)
    laps("data")
    return found
