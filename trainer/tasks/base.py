"""What a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.objectives import FINE_TUNING
from model.objectives.base import Objective


@dataclass(frozen=True)
class Judge:
    """The official evaluation of a task."""

    score: Callable[[Mapping[Any, str], Sequence[Path], Sequence[Path]], dict[str, float]]
    """Predicted answers by question id, the set's own files of questions or annotations, and files
    of choices where one of the metrics needs them -> metrics by name, over what was predicted."""
    write: Callable[[Path, Iterable[tuple[Any, Any]]], None]
    """Path, and rows of question id and answer in the order of the ids -> the submission file."""
    ids: tuple[type, ...] = (str,)
    """Types of question ids."""
    together: Callable[[Mapping[Any, str], Mapping[Any, str]], dict[str, float]] | None = None
    """Metrics of all answers together: predicted and right ones by question id -> metrics by
    name."""
    takes_choices: bool = False
    """Whether files of choices serve one of the metrics."""


@dataclass(frozen=True)
class Task:
    """What a run is trained for."""

    name: str
    objectives: Mapping[str, Objective]
    """Those of its model, whose heads follow from them."""
    images: int = 1
    """That a record of its data sets is of."""
    answers: frozenset[str] | None = None
    """The only answer table that its data sets may have; None: any."""
    judge: Judge | None = None
    """None for pre-training, whose metrics are its objectives' losses and accuracies."""

    @property
    def fine_tunes(self) -> bool:
        """Whether every question comes with its own image, unmasked, and all its answers."""
        return self.judge is not None


def one_objective(name: str) -> dict[str, Objective]:
    return {name: FINE_TUNING[name]}
