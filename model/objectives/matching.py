"""Matching: whether a pair's sentence belongs to its image. Index 1 of the logits means that it
does."""

from __future__ import annotations

from torch import Tensor

from model.batch import Batch
from model.objectives.base import Encoded, LossSettings, Objective, Result, classify


def _rows(encoded: Encoded) -> Tensor:
    return encoded.pooled


def _count(batch: Batch, settings: LossSettings) -> int:
    return len(batch.matched)


def _loss(logits: Tensor, encoded: Encoded) -> Result:
    return classify(logits, encoded.batch.matched)


MATCHING = Objective("matching", "matching", "cls.seq_relationship", _rows, _count, _loss)
