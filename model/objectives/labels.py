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
from model.objectives.base import Encoded, LossSettings, Objective, Result, classify


def label_objective(
    name: str, head: str, labels: Callable[[Batch], tuple[Tensor | None, Tensor | None]]
) -> Objective:
    """An objective over labels i64[U, O] and their confidences f32[U, O], which `labels` finds in
    a batch. Its head is called `head` in the object head's decoder."""

    def loss(logits: Tensor, encoded: Encoded) -> Result:
        label, conf = labels(encoded.batch)
        if label is None or conf is None:
            raise ModelError(f"the batch has no labels for {name}: leave the objective out")
        image, position = encoded.batch.image_index, encoded.label_position
        return classify(logits, label[image].flatten()[position], conf[image].flatten()[position])

    path = f"obj_predict_head.decoder_dict.{head}"
    return Objective(name, "masked", path, _rows, _count, loss, needs="labels")


def _rows(encoded: Encoded) -> Tensor:
    return encoded.labelled_objects


def _count(batch: Batch, settings: LossSettings) -> int:
    if settings.label_scope == "masked":
        return len(batch.object_position)
    return int(batch.num_objects[batch.image_index].sum())
