"""The objectives as sums and counts.

A loss here is a sum over its targets, with their number beside it: whoever trains divides by the
number in the whole global batch (at least 1), which makes a loss independent of how pairs are
spread and finite where a micro-batch has no target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.errors import ModelError

ALL_OBJECTIVES = frozenset(
    {"masked_lm", "masked_feature", "masked_object", "masked_attribute", "matching", "qa"}
)
LabelScope = Literal["masked", "all"]
FeatureLoss = Literal["l2", "smooth_l1"]


@dataclass(frozen=True)
class Logits:
    """Outputs of the heads at the targets of the active objectives; no rows for the others.

    words (targets, vocabulary); features (masked objects, D); objects and attributes (labelled
    objects, classes) at label_position, a flat index into (M * O); matching (M, 2), index 1 means
    matched; answers (targets, answers). anchor: a zero that ties all outputs of the trunk to the
    loss.
    """

    words: Tensor
    features: Tensor
    objects: Tensor
    attributes: Tensor
    label_position: Tensor
    matching: Tensor
    answers: Tensor
    anchor: Tensor


@dataclass(frozen=True)
class PreTrainingOutput:
    """Per active objective: loss_sum (fp32 scalar with gradient), count and correct (scalars).

    masked_feature has no `correct`. answer_prediction i64: for each of the batch's answer_pair.
    """

    loss_sum: dict[str, Tensor]
    count: dict[str, int]
    correct: dict[str, Tensor]
    answer_prediction: Tensor


def check_objectives(objectives: frozenset[str]) -> None:
    """ModelError unless these are some of ALL_OBJECTIVES."""
    unknown = sorted(objectives - ALL_OBJECTIVES)
    if unknown or not objectives:
        what = f"{unknown[0]} is not an objective" if unknown else "no objective is active"
        raise ModelError(f"{what}: choose from {', '.join(sorted(ALL_OBJECTIVES))}")


def real_objects(batch: Batch) -> Tensor:
    """Flat positions in (M * O) of the objects that are not padding."""
    slot = torch.arange(batch.features.shape[1], device=batch.num_objects.device)
    real = slot < batch.num_objects[batch.image_index, None]
    return real.flatten().nonzero().squeeze(1)


def objective_counts(batch: Batch, label_scope: LabelScope) -> dict[str, int]:
    """Targets of each objective in a batch, known before any forward."""
    masked = len(batch.object_position)
    labelled = masked
    if label_scope == "all":
        labelled = int(batch.num_objects[batch.image_index].sum())
    return {
        "masked_lm": len(batch.lm_target),
        "masked_feature": masked,
        "masked_object": labelled,
        "masked_attribute": labelled,
        "matching": len(batch.matched),
        "qa": len(batch.answer_target),
    }


def objective_sums(
    batch: Batch,
    logits: Logits,
    objectives: frozenset[str],
    label_scope: LabelScope,
    feature_loss: FeatureLoss,
) -> PreTrainingOutput:
    """Sums over the targets, in fp32 whatever the model's type.

    masked_lm, matching, qa: cross-entropy. masked_object, masked_attribute: cross-entropy to the
    detector's argmax, each weighted by its confidence; the count is the number of objects in the
    scope, as in the released code, whose weighted mean runs over all of them. masked_feature:
    squared (or smooth L1) error to the original feature, mean over its dimensions.
    """
    loss: dict[str, Tensor] = {}
    correct: dict[str, Tensor] = {}

    def classify(name: str, scores: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        each = F.cross_entropy(scores.float(), target, reduction="none")
        loss[name] = (each if weight is None else each * weight).sum()
        correct[name] = (scores.detach().argmax(-1) == target).sum()

    def label(values: Tensor | None, name: str) -> Tensor:
        if values is None:
            raise ModelError(f"the batch has no labels for {name}: leave the objective out")
        return values[batch.image_index].flatten()[logits.label_position]

    if "masked_lm" in objectives:
        classify("masked_lm", logits.words, batch.lm_target)
    if "masked_feature" in objectives:
        original = batch.features[batch.image_index].flatten(0, 1)[batch.object_position].float()
        error = F.mse_loss if feature_loss == "l2" else F.smooth_l1_loss
        each = error(logits.features.float(), original, reduction="none").mean(-1)
        loss["masked_feature"] = each.sum()
    if "masked_object" in objectives:
        classify(
            "masked_object",
            logits.objects,
            label(batch.object_label, "masked_object"),
            label(batch.object_conf, "masked_object"),
        )
    if "masked_attribute" in objectives:
        classify(
            "masked_attribute",
            logits.attributes,
            label(batch.attribute_label, "masked_attribute"),
            label(batch.attribute_conf, "masked_attribute"),
        )
    if "matching" in objectives:
        classify("matching", logits.matching, batch.matched)
    if "qa" in objectives:
        classify("qa", logits.answers, batch.answer_target)

    # Every head and the whole trunk take part in every backward, if only with a zero.
    inactive = (logits.words, logits.features, logits.objects, logits.attributes)
    zero = (
        logits.anchor.float()
        + torch.stack(
            [part[:0].sum().float() for part in (*inactive, logits.matching, logits.answers)]
        ).sum()
    )
    first = next(iter(loss))
    loss[first] = loss[first] + zero
    counts = objective_counts(batch, label_scope)
    return PreTrainingOutput(
        loss, {name: counts[name] for name in loss}, correct, logits.answers.detach().argmax(-1)
    )
