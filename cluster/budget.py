"""How often a run may fail without getting any further."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import DataError
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, generations


@dataclass(frozen=True)
class Budget:
    """Failures since the run last got further. A generation committed in between makes them none:
    a run that fails every hour and saves every ten minutes goes on for ever."""

    most: int
    """-1: any number."""
    newest: str | None
    """Generation at the last failure."""
    failures: int = 0

    def after_failure(self, newest: str | None) -> Budget:
        """With one more failure, at this newest generation; None where that cannot be told."""
        further = newest is not None and newest != self.newest
        return Budget(self.most, newest or self.newest, 1 if further else self.failures + 1)

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
