"""What the model is trained to predict: one file an objective, and the table of them all.

base.py            what an objective is, and what it works on
masked_lm.py       masked words
masked_feature.py  masked objects: their features
masked_object.py, masked_attribute.py (with labels.py): objects' labels by the detector
matching.py        whether the sentence belongs to the image
qa.py              the answer to a question
and of fine-tuning:
answers.py         the scores of all answers to a question (VQA, GQA)
statement.py       whether a statement about two images is true (NLVR2)

Counts, losses, metrics and what a data set must have follow from a table; the configuration's keys
from that of pre-training. A new objective is a file here, a row of a table and, where none of the
heads serves it, a head (model/heads.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from model.batch import Batch
from model.errors import ModelError
from model.objectives.answers import ANSWERS
from model.objectives.base import LossSettings, Objective
from model.objectives.masked_attribute import MASKED_ATTRIBUTE
from model.objectives.masked_feature import MASKED_FEATURE
from model.objectives.masked_lm import MASKED_LM
from model.objectives.masked_object import MASKED_OBJECT
from model.objectives.matching import MATCHING
from model.objectives.qa import QA
from model.objectives.statement import STATEMENT

# The order is that of losses in a sum, of configuration keys and of metrics.
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        MASKED_LM,
        MASKED_FEATURE,
        MASKED_OBJECT,
        MASKED_ATTRIBUTE,
        MATCHING,
        QA,
    )
}


FINE_TUNING: dict[str, Objective] = {o.name: o for o in (ANSWERS, STATEMENT)}


def objectives_of(family: str, table: Mapping[str, Objective] = OBJECTIVES) -> list[str]:
    """Names of a table's objectives that steps of a family serve; `all` serves every one."""
    return [name for name, o in table.items() if family in ("all", o.family)]


def target_counts(
    batch: Batch, settings: LossSettings, names: Iterable[str] = OBJECTIVES
) -> dict[str, int]:
    """Targets of each objective in a batch, known before any forward."""
    every = OBJECTIVES | FINE_TUNING
    return {name: every[name].count(batch, settings) for name in names}


def check_objectives(names: frozenset[str], table: Iterable[str]) -> None:
    """ModelError unless these are some of a table's."""
    unknown = sorted(names - set(table))
    if unknown or not names:
        what = f"{unknown[0]} is not an objective" if unknown else "no objective is active"
        raise ModelError(f"{what}: choose from {', '.join(sorted(table))}")
