"""VQA v2: answers to questions about an image, by the soft scores of ten people's answers."""

from __future__ import annotations

from trainer.scores.submission import write_vqa
from trainer.scores.vqa import score_vqa
from trainer.tasks.base import Judge, Task, one_objective

VQA = Task(
    "vqa",
    one_objective("answers"),
    # Numbers in VQA itself; texts of data sets of other makers.
    judge=Judge(
        lambda given, files, choices: score_vqa(given, files, missing="skip"),
        write_vqa,
        (int, str),
    ),
)
