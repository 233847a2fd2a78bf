"""QA: the answer to each question that is shown with its own image and has one in the table."""

from __future__ import annotations

from torch import Tensor

from model.batch import Batch
from model.objectives.base import Encoded, LossSettings, Objective, Result, classify
from model.packing import take


def _rows(encoded: Encoded) -> Tensor:
    return take(encoded.pooled, encoded.batch.answer_pair)


def _count(batch: Batch, settings: LossSettings) -> int:
    return len(batch.answer_target)


def _loss(logits: Tensor, encoded: Encoded) -> Result:
    return classify(logits, encoded.batch.answer_target)


QA = Objective("qa", "qa", "answer_head", _rows, _count, _loss, needs="answers")
