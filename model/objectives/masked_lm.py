"""Masked words: cross-entropy to the word that stood at each masked place."""

from __future__ import annotations

from torch import Tensor

from model.batch import Batch
from model.objectives.base import Encoded, LossSettings, Objective, Result, classify


def _rows(encoded: Encoded) -> Tensor:
    return encoded.words


def _count(batch: Batch, settings: LossSettings) -> int:
    return len(batch.lm_target)


def _loss(logits: Tensor, encoded: Encoded) -> Result:
    return classify(logits, encoded.batch.lm_target)


MASKED_LM = Objective("masked_lm", "masked", "cls.predictions", _rows, _count, _loss)
