"""Masked objects, features: the error to each one's original feature, a mean over its
dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.objectives.base import Encoded, LossSettings, Objective, Result, of_image
from model.stored import decoded


def _rows(encoded: Encoded) -> Tensor:
    return encoded.masked_objects


def _count(batch: Batch, settings: LossSettings) -> int:
    return len(batch.object_position)


def _loss(logits: Tensor, encoded: Encoded) -> Result:
    batch = encoded.batch
    original = decoded(of_image(batch, batch.features, batch.object_position), torch.float32)
    error = F.mse_loss if encoded.settings.feature_loss == "l2" else F.smooth_l1_loss
    return Result(error(logits.float(), original, reduction="none").mean(-1).sum())


MASKED_FEATURE = Objective(
    "masked_feature", "masked", "obj_predict_head.decoder_dict.feat", _rows, _count, _loss
)
