"""NLVR2: whether a statement about two images is true."""

from __future__ import annotations

from trainer.scores.nlvr2 import read_labels, score_nlvr2
from trainer.scores.submission import write_nlvr2
from trainer.tasks.base import Judge, Task, one_objective

NLVR2 = Task(
    "nlvr2",
    one_objective("statement"),
    images=2,
    answers=frozenset({"true", "false"}),
    judge=Judge(
        lambda given, files, choices: score_nlvr2(given, read_labels(files), missing="skip"),
        write_nlvr2,
        together=score_nlvr2,
    ),
)
