"""What a run is trained for: one file a task, and the table of them all.

base.py      what a task is
pretrain.py  the objectives of pre-training
vqa.py, gqa.py, nlvr2.py  fine-tuning

The configuration's key `task`, a model's heads, what a data set must have, metrics and submission
files follow from the table. A new task is a file here and a row of the table; the recipe's settings
are in configs/tasks/.
"""

from __future__ import annotations

from trainer.tasks.base import Task
from trainer.tasks.gqa import GQA
from trainer.tasks.nlvr2 import NLVR2
from trainer.tasks.pretrain import PRETRAIN
from trainer.tasks.vqa import VQA

TASKS: dict[str, Task] = {task.name: task for task in (PRETRAIN, VQA, GQA, NLVR2)}
