"""Statements about two images, as NLVR2 is fine-tuned: cross-entropy over the cross-modality
vectors of both, one after the other."""

from __future__ import annotations

from torch import Tensor

from model.batch import Batch
from model.errors import ModelError
from model.objectives.base import (
    Encoded,
    LossSettings,
    Objective,
    Result,
    questions_of,
    soft_target,
)
from model.packing import take


def _rows(encoded: Encoded) -> Tensor:
    if encoded.batch.first_objects is None:
        raise ModelError("statements are about two images: the batch has one for each pair")
    both = encoded.pooled.unflatten(0, (-1, 2)).flatten(1)
    return take(both, questions_of(encoded.batch).pair)


def _count(batch: Batch, settings: LossSettings) -> int:
    return len(questions_of(batch).pair)


def _loss(logits: Tensor, encoded: Encoded) -> Result:
    target = soft_target(encoded.batch, logits)
    loss = -(target * logits.float().log_softmax(-1)).sum()
    prediction = logits.detach().argmax(-1)
    return Result(loss, prediction, target.gather(1, prediction[:, None]).sum())


STATEMENT = Objective("statement", "qa", "pair_head", _rows, _count, _loss, needs="answers")
