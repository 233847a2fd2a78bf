"""What the model is trained to predict: one file an objective, and the table of them all.

base.py            what an objective is, and what it works on
masked_lm.py       masked words
masked_feature.py  masked objects: their features
masked_object.py, masked_attribute.py (with labels.py): objects' labels by the detector
matching.py        whether the sentence belongs to the image
qa.py              the answer to a question

Configuration keys, counts, losses, metrics and what a data set must have follow from the table. A
new objective is a file here, a row of the table and, where none of the heads serves it, a head
(model/heads.py, and one line in model/lxmert.py).
"""

from __future__ import annotations

from model.batch import Batch
from model.errors import ModelError
from model.objectives.base import LossSettings, Objective
from model.objectives.masked_attribute import MASKED_ATTRIBUTE
from model.objectives.masked_feature import MASKED_FEATURE
from model.objectives.masked_lm import MASKED_LM
from model.objectives.masked_object import MASKED_OBJECT
from model.objectives.matching import MATCHING
from model.objectives.qa import QA

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


def objectives_of(family: str) -> list[str]:
    """Names of the objectives that steps of a family serve; `all` serves every one."""
    return [name for name, o in OBJECTIVES.items() if family in ("all", o.family)]


def target_counts(batch: Batch, settings: LossSettings) -> dict[str, int]:
    """Targets of each objective in a batch, known before any forward."""
    return {name: o.count(batch, settings) for name, o in OBJECTIVES.items()}


def check_objectives(names: frozenset[str]) -> None:
    """ModelError unless these are some of the table's."""
    unknown = sorted(names - OBJECTIVES.keys())
    if unknown or not names:
        what = f"{unknown[0]} is not an objective" if unknown else "no objective is active"
        raise ModelError(f"{what}: choose from {', '.join(sorted(OBJECTIVES))}")
