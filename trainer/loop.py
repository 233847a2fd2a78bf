"""Training, told once: start, then load, sync, step, save and validate until the run's end.

Runs in every worker; torch.distributed must be up. Nothing here knows who placed the workers. What
each verb does: trainer/run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from trainer.checkpoint.lease import Made
from trainer.checkpoint.owner import Claimant
from trainer.config import RunConfig
from trainer.logs import setup_logging
from trainer.phases import Phases
from trainer.run import (
    Run,
    TrainState,
    active_objectives,
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
from trainer.step.sync import sync_step


@dataclass(frozen=True)
class Control:
    """What the placement gives to the loop."""

    should_stop: Callable[[], bool] = lambda: False
    """Polled each step on every rank, never blocks; all ranks then stop at one step, save and
    return."""
    enter: Callable[[str], None] = lambda phase: None
    """Told what the rank is at: "start", "restore", "data", "step", "save", "validation", "end".
    Who watches it knows by this how long that may take."""
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
    config = run.config
    steps, stopped = load(run, state), False
    validate_every = config.train.validate_every
    try:
        while state.consumed < run.length.total:
            phases.enter("data")
            if run.progress:
                run.progress.begin()
            laps = Laps()
            loaded = next(steps)
            laps("data")
            phases.enter("step")
            active = active_objectives(run, loaded.step)
            wanted = wants(run, state, control.should_stop())
            sync = sync_step(loaded, [*active], config.objectives.losses(), run.mixture, wanted)
            laps("agreement")
            if sync.missing:
                state = skip(run, state, sync.missing)
                steps.close()
                steps = load(run, state)
                continue
            if sync.stop:
                stopped = True
                break
            count = loaded.step.count
            state, values = step(run, state, loaded, active, sync, laps)
            state = replace(state, seconds=state.seconds + laps.total)
            phases.done(state.step)
            if run.progress:
                own = flops(run, loaded, active)
                run.progress.mixture(run.mixture.planned, sync.mixture, count)
                run.progress.step(state.step, values, count, laps, own)
            del loaded  # the next is made in its memory
            if sync.save or sync.snapshot:
                phases.enter("save")
                save(run, state, sync)
            if validate_every and state.step % validate_every == 0:
                phases.enter("validation")
                state = validate(run, state)
        phases.enter("end")
    finally:
        steps.close()
    state = finish(run, state, stopped)
    return TrainResult(
        state.step, state.consumed, stopped, state.metrics, state.pairs, state.seconds
    )
