"""What an objective is, and what it works on: a batch after the trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, Questions
from model.errors import ModelError
from model.packing import Rows, take

Family = Literal["masked", "matching", "qa"]
LabelScope = Literal["masked", "all"]
FeatureLoss = Literal["l2", "smooth_l1"]


@dataclass(frozen=True)
class LossSettings:
    """Where the paper and the released code differ; the defaults are the paper's."""

    label_scope: LabelScope = "masked"
    """Objects that carry the label losses: the masked ones, or all that are not padding."""
    feature_loss: FeatureLoss = "l2"
    """Error of a regressed feature: squared, or smooth L1."""


@dataclass(frozen=True)
class Encoded:
    """A batch after the trunk: what heads read. M pairs, hidden size H.

    What several objectives share is computed once a forward, when the first asks for it.
    """

    batch: Batch
    words: Tensor
    """(masked words, H)."""
    objects: Tensor
    """(objects that are masked or carry label losses, H): see `read_objects`."""
    pooled: Tensor
    """(M, H): the cross-modality vectors; (2 M, H) where each pair has two images, one after the
    other."""
    masked: Tensor | None
    """i64 which of `objects` are masked; None: all."""
    transform: Callable[[Tensor], Tensor]
    """The part that all visual heads share, (objects, H) -> (objects, H), where there are some."""
    settings: LossSettings

    @cached_property
    def labelled_objects(self) -> Tensor:
        """(objects that carry label losses, H), after the shared part of the visual heads."""
        return self.transform(self.objects)

    @cached_property
    def masked_objects(self) -> Tensor:
        """(masked objects, H), likewise."""
        found = self.labelled_objects
        return found if self.masked is None else take(found, self.masked)


def read_objects(batch: Batch, settings: LossSettings) -> tuple[Tensor, Tensor | None]:
    """i64 flat indices into (M * O) of the objects that losses read, and which of them are masked;
    None: all."""
    if settings.label_scope == "masked":
        return batch.object_position, None
    count = batch.num_objects[batch.image_index]
    real = Rows(count, batch.extent.pair_objects, batch.extent.most)
    width = batch.features.shape[1]
    return real.sequence * width + real.place, real.row_of(batch.object_position, width)


def of_image(batch: Batch, values: Tensor, position: Tensor) -> Tensor:
    """values (U, O, …) of the objects at i64 flat indices into (M * O) -> (objects, …)."""
    width = values.shape[1]
    return values[batch.image_index[position // width], position % width]


def questions_of(batch: Batch) -> Questions:
    """ModelError where the batch was made for another objective."""
    if batch.questions is None:
        raise ModelError("the batch has no questions with all their answers")
    return batch.questions


def soft_target(batch: Batch, logits: Tensor) -> Tensor:
    """The score of each answer to each question, f32 of the shape of `logits`."""
    questions = questions_of(batch)
    target = torch.zeros_like(logits, dtype=torch.float32)
    target[questions.answered, questions.answer] = questions.score
    return target


@dataclass(frozen=True)
class Result:
    """What an objective makes of its head's output."""

    loss_sum: Tensor
    """Scalar in fp32, whatever the model's type: the sum over the targets."""
    prediction: Tensor | None = None
    """i64 (targets,) the likeliest class of each; None where a target is no class."""
    correct: Tensor | None = None
    """Scalar: how many of the predictions are the target, or the sum of their scores where targets
    have some; None where there are none."""


def classify(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Result:
    """Cross-entropy of logits (targets, classes) to target i64 (targets,); `weight` multiplies
    each target's loss."""
    each = F.cross_entropy(logits.float(), target, reduction="none")
    prediction = logits.detach().argmax(-1)
    loss_sum = (each if weight is None else each * weight).sum()
    return Result(loss_sum, prediction, (prediction == target).sum())


@dataclass(frozen=True)
class Objective:
    """One thing that the model is trained to predict.

    Its loss is a sum over its targets. Training divides it by their number in the whole global
    batch (at least 1), which makes a loss independent of how pairs are spread, and finite where a
    micro-batch has no target.
    """

    name: str
    """Its key in the table, the configuration and the metrics."""
    family: Family
    """The steps of the sampler's mode `alternating` that serve it."""
    head: str
    """Its head: the dotted name of a module of Lxmert."""
    rows: Callable[[Encoded], Tensor]
    """The head's input, (targets, H)."""
    count: Callable[[Batch, LossSettings], int]
    """Targets in a batch, known before any forward: as many as `rows` will have."""
    loss: Callable[[Tensor, Encoded], Result]
    """The head's output for `rows` -> loss and hits. ModelError where the batch lacks labels."""
    needs: Literal["labels", "answers"] | None = None
    """What a data set must have to give it targets, beside images and sentences."""
