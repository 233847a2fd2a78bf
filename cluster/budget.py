"""How often a run may fail without getting any further."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import DataError
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, generations


@dataclass(frozen=True)
class Budget:
    """Failures since the run last got further. A generation committed in between, or a snapshot in
    memory that was gone on from, makes them none: a run that fails every hour and saves every ten
    minutes goes on for ever."""

    most: int
    """-1: any number."""
    newest: str | None
    """Generation at the last failure."""
    failures: int = 0
    since: int = 0
    """The step that the last group to fail had gone on from: a generation's or a snapshot's."""

    def after_failure(self, newest: str | None, since: int = 0) -> Budget:
        """With one more failure, at this newest generation; None where that cannot be told. since:
        the step that the group had gone on from; 0 where it had not come so far."""
        further = (newest is not None and newest != self.newest) or since > self.since
        failures = 1 if further else self.failures + 1
        return Budget(self.most, newest or self.newest, failures, max(since, self.since))

    @property
    def spent(self) -> bool:
        return 0 <= self.most < self.failures


def newest_generation(run_url: str) -> str | None:
    """The name of the run's newest generation; "" where there is none, None where the store does
    not tell."""
    try:
        for found in generations(run_url):
            if isinstance(found, Generation):
                return found.name
    except (CheckpointError, DataError):
        return None
    return ""
