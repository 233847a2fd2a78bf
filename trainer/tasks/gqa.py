"""GQA: answers to questions about an image, of which each has one."""

from __future__ import annotations

from trainer.scores.gqa import score_gqa
from trainer.scores.submission import write_gqa
from trainer.tasks.base import Judge, Task, one_objective

GQA = Task(
    "gqa",
    one_objective("answers"),
    judge=Judge(
        lambda given, files, choices: score_gqa(given, files, choices, missing="skip"),
        write_gqa,
        takes_choices=True,
    ),
)
