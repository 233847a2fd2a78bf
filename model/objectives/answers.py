"""Answers with soft scores, as VQA and GQA are fine-tuned: binary cross-entropy of every answer's
logit to its score, summed over the answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
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
    return take(encoded.pooled, questions_of(encoded.batch).pair)


def _count(batch: Batch, settings: LossSettings) -> int:
    return len(questions_of(batch).pair)


def _loss(logits: Tensor, encoded: Encoded) -> Result:
    target = soft_target(encoded.batch, logits)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum")
    prediction = logits.detach().argmax(-1)
    return Result(loss, prediction, target.gather(1, prediction[:, None]).sum())


ANSWERS = Objective("answers", "qa", "answer_head", _rows, _count, _loss, needs="answers")
