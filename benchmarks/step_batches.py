"""Batches for the benchmark of the step and for the tests on GPUs, as the model takes them and as
Hugging Face's does. Needs torch and pydantic.

Sentences have the lengths of real captions (LENGTHS), padded to 20 for Hugging Face, as the
original does; every image has 36 objects.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig

LENGTHS = {
    10: 19, 11: 88, 12: 92, 13: 109, 14: 77, 15: 49, 16: 18, 17: 21, 18: 7, 19: 4, 20: 16,
}  # fmt: skip
"""Tokens, with [CLS] and [SEP], of the 500 captions of 100 images of COCO 2017 (the data of
ultralytics' and others' "tiny COCO"), by BERT's uncased vocabulary, cut at 20: mean 13.3."""
PADDED = 20
OBJECTS = 36


def make_batch(config: ModelConfig, pairs: int, seed: int, sentences: int = 2) -> Batch:
    """Random pairs, `sentences` of an image; masks, mismatches and answers with the probabilities
    of the recipe."""
    g = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g)

    def some(share: float, of: int) -> Tensor:
        return (torch.rand(of, generator=g) < share).nonzero().squeeze(1)

    weights = torch.tensor([*LENGTHS.values()], dtype=torch.float64)
    drawn = torch.multinomial(weights, pairs, replacement=True, generator=g)
    length = torch.tensor([*LENGTHS])[drawn].sort().values
    start = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    images = -(-pairs // sentences)
    position = some(0.15, pairs * OBJECTS)
    fate = torch.rand(len(position), generator=g)
    swap = position[(fate >= 0.8) & (fate < 0.9)]
    words = some(0.15, int(start[-1]))
    answered = some(0.5, pairs)
    return Batch(
        tokens=1 + integers(config.vocab_size - 1, int(start[-1])),
        token_start=start,
        features=torch.rand(images, OBJECTS, config.feature_dim, generator=g).half(),
        boxes=torch.rand(images, OBJECTS, 4, generator=g),
        num_objects=torch.full((images,), OBJECTS),
        image_index=torch.randperm(pairs, generator=g) // sentences,
        lm_position=words,
        lm_target=integers(config.vocab_size, len(words)),
        object_position=position,
        zero_position=position[fate < 0.8],
        swap_position=swap,
        swap_features=torch.rand(len(swap), config.feature_dim, generator=g).half(),
        matched=integers(2, pairs),
        answer_pair=answered,
        answer_target=integers(config.num_answers, len(answered)),
        pair_id=torch.arange(pairs),
        sentence_id=torch.arange(pairs),
        source=torch.zeros(pairs, dtype=torch.int64),
        offset=torch.arange(pairs),
        dataset=torch.zeros(pairs, dtype=torch.int64),
        object_label=integers(config.num_object_classes, images, OBJECTS),
        object_conf=torch.rand(images, OBJECTS, generator=g),
        attribute_label=integers(config.num_attribute_classes, images, OBJECTS),
        attribute_conf=torch.rand(images, OBJECTS, generator=g),
    )


def shared(batch: Batch) -> Batch:
    """The batch with the objects of an image masked as they are for its first pair."""
    _, view = batch.image_index.unique(return_inverse=True)
    pairs = torch.arange(batch.pairs)
    first = torch.full((int(view.max()) + 1,), batch.pairs).scatter_reduce(0, view, pairs, "amin")

    def of_all(position: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of first pairs, for all pairs, and which of those they are."""
        mine = (first[view][position // OBJECTS] == position // OBJECTS).nonzero().squeeze(1)
        of = position[mine] // OBJECTS
        pair, which = (view[:, None] == view[of][None, :]).nonzero(as_tuple=True)
        return pair * OBJECTS + position[mine][which] % OBJECTS, mine[which]

    swap, which = of_all(batch.swap_position)
    return replace(
        batch,
        object_position=of_all(batch.object_position)[0],
        zero_position=of_all(batch.zero_position)[0],
        swap_position=swap,
        swap_features=batch.swap_features[which],
        view=view,
        view_pair=first,
    )


def padded(batch: Batch) -> dict[str, Any]:
    """The batch with all its labels as Hugging Face's model takes it."""
    length, pairs = batch.token_start.diff(), batch.pairs
    row = torch.repeat_interleave(torch.arange(pairs), length)
    column = torch.arange(len(batch.tokens)) - batch.token_start[row]
    ids, mask = torch.zeros(pairs, PADDED, dtype=torch.int64), torch.zeros(pairs, PADDED)
    ids[row, column], mask[row, column] = batch.tokens, 1
    words = torch.full((pairs, PADDED), -100)
    words[row[batch.lm_position], column[batch.lm_position]] = batch.lm_target
    features = batch.features[batch.image_index]
    original = features.clone()
    features.flatten(0, 1)[batch.zero_position] = 0
    features.flatten(0, 1)[batch.swap_position] = batch.swap_features
    chosen = torch.zeros(pairs * OBJECTS)
    chosen[batch.object_position] = 1
    answers = torch.full((pairs,), -100)
    answers[batch.answer_pair] = batch.answer_target
    assert batch.object_label is not None and batch.object_conf is not None
    assert batch.attribute_label is not None and batch.attribute_conf is not None
    at = batch.image_index
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "visual_feats": features,
        "visual_pos": batch.boxes[at],
        "labels": words,
        "matched_label": batch.matched,
        "ans": answers,
        "obj_labels": {
            "feat": (original, chosen.view(pairs, OBJECTS)),
            "obj": (batch.object_label[at], batch.object_conf[at]),
            "attr": (batch.attribute_label[at], batch.attribute_conf[at]),
        },
    }


def moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, dict):
        return {k: moved(v, device, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(v, device, dtype) for v in value)
    value = value.to(device)
    return value.to(dtype) if value.is_floating_point() else value
