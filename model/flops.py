"""How many floating-point operations a batch takes in training, padding not counted."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model.batch import Batch
from model.config import ModelConfig
from model.objectives import OBJECTIVES, target_counts
from model.objectives.base import LossSettings, read_objects


def training_flops(
    config: ModelConfig,
    batch: Batch,
    objectives: Iterable[str] = OBJECTIVES,
    settings: LossSettings | None = None,
) -> int:
    """Of one forward and backward over a batch on the CPU: those of products of matrices, 2 for
    each multiplication and addition.

    With hidden size H, FFN size I, T tokens, V objects of all pairs, W of all views and R of the
    distinct images, a forward multiplies, in each (a pair of two images counts as two pairs)

    language layer        T (4 H^2 + 2 H I) + H S(t, t) 2
    object layer          W (4 H^2 + 2 H I) + H S'(o, o) 2
    cross layer           (T + V) (8 H^2 + 2 H I) + H (2 S(t, o) + S(t, t) + S(o, o)) 2

    where S(a, b) is the sum over pairs, S' over views, of the product of lengths; in the last cross
    layer the second output projection and the FFN, H^2 + 2 H I, count for the rows alone that a
    loss reads.
    Bottom-up top-down attention has V H^2 + 3 M H^2 for M pairs in the place of cross layers.
    The embedding of objects multiplies R (D H + 4 H), heads their own sizes for each target. A
    backward takes twice as many, and once as many for the embedding, whose inputs have no gradient.
    """
    settings = settings or LossSettings()
    h, wide = config.hidden_size, config.intermediate_size
    length = batch.token_start.diff()
    shown = batch.num_objects.clamp(min=1)
    count, seen = shown[batch.image_index], shown[batch.view_image]
    if batch.first_objects is not None:
        first = batch.first_objects[batch.image_index]
        length, count = torch.cat([length, length]), torch.cat([first, count - first])
        seen = count
    tokens, objects = int(length.sum()), int(count.sum())
    tt, oo, to = (
        int((a * b).sum()) for a, b in ((length, length), (count, count), (length, count))
    )
    block = 4 * h * h + 2 * h * wide
    trunk = config.language_layers * (tokens * block + 2 * h * tt)
    trunk += config.object_layers * (int(seen.sum()) * block + 2 * h * int((seen * seen).sum()))
    cross = (tokens + objects) * (block + 4 * h * h) + 2 * h * (2 * to + tt + oo)
    trunk += config.cross_layers * cross
    read = len(read_objects(batch, settings)[0])
    rows = len(length) + len(batch.lm_position) + read
    if config.top_down:
        trunk += (objects + 3 * len(length)) * h * h
    else:
        trunk -= (tokens + objects - rows) * (h * h + 2 * h * wide)

    targets = target_counts(batch, settings, objectives)
    head = {
        "masked_lm": h * h + h * config.vocab_size,
        "masked_feature": h * config.feature_dim,
        "masked_object": h * config.num_object_classes,
        "masked_attribute": h * config.num_attribute_classes,
        "matching": 2 * h,
        "qa": 2 * h * h + 2 * h * config.num_answers,
        "answers": 2 * h * h + 2 * h * config.num_answers,
        "statement": 4 * h * h + 2 * h * config.num_answers,
    }
    heads = sum(head.get(name, 0) * rows for name, rows in targets.items())
    heads += len(length) * h * h  # the pooler
    heads += read * h * h  # what visual heads share
    rows = batch.extent.image_rows + 1 + len(batch.swap_position)  # one of zeros
    embedding = rows * config.feature_dim * h
    embedding += batch.extent.image_rows * config.box_dim * h
    return 2 * (3 * (trunk + heads) + 2 * embedding)
