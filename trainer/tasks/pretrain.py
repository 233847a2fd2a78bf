"""Pre-training: masked words, masked objects, matching, QA."""

from __future__ import annotations

from model.objectives import OBJECTIVES
from trainer.tasks.base import Task

PRETRAIN = Task("pretrain", OBJECTIVES)
