"""What the objectives over the detector's labels share.

The loss is a cross-entropy to the detector's likeliest class, weighted by its confidence. The count
is the number of objects in the scope, not the sum of the weights: as in the released code, whose
weighted mean runs over all objects.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from model.batch import Batch
from model.errors import ModelError
from model.objectives.base import (
    Encoded,
    LossSettings,
    Objective,
    Result,
    classify,
    of_image,
    read_objects,
)


def label_objective(
    name: str, head: str, labels: Callable[[Batch], tuple[Tensor | None, Tensor | None]]
) -> Objective:
    """An objective over labels i64[U, O] and their confidences f32[U, O], which `labels` finds in
    a batch. Its head is called `head` in the object head's decoder."""

    def loss(logits: Tensor, encoded: Encoded) -> Result:
        batch = encoded.batch
        label, conf = labels(batch)
        if label is None or conf is None:
            raise ModelError(f"the batch has no labels for {name}: leave the objective out")
        position, _ = read_objects(batch, encoded.settings)
        target, weight = (of_image(batch, values, position) for values in (label, conf))
        return classify(logits, target, weight)

    path = f"obj_predict_head.decoder_dict.{head}"
    return Objective(name, "masked", path, _rows, _count, loss, needs="labels")


def _rows(encoded: Encoded) -> Tensor:
    return encoded.labelled_objects


def _count(batch: Batch, settings: LossSettings) -> int:
    if settings.label_scope == "masked":
        return len(batch.object_position)
    return batch.extent.pair_objects
