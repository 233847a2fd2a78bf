"""What one forward takes: packed tokens, each distinct image once, and where losses are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """M pairs of U distinct images with at most O objects of D features; T tokens in all.

    tokens          i64[T]       ids after masking, [CLS] and [SEP] included, no padding
    token_start     i64[M+1]     where each pair's tokens begin; the last entry is T
    features        f16[U, O, D] as the detector gave them, zero-padded
    boxes           f32[U, O, 4] x1 y1 x2 y2 in 0..1, zero-padded
    num_objects     i64[U]       real objects of an image
    image_index     i64[M]       row of the pair's image
    lm_position     i64          masked words: flat index into the tokens; lm_target their ids
    object_position i64          masked objects: flat index into (M * O)
    zero_position   i64          those of them whose features are zeroed
    swap_position   i64          those whose features are replaced by swap_features f16[., D]
    matched         i64[M]       1 = the sentence belongs to the image
    answer_pair     i64          pairs with an answer to predict; answer_target their answers
    pair_id, sentence_id, source, offset, dataset  i64[M]  the pair, the sentence shown, the pair's source set
                                 and its place in the step's global batch
    object_label, attribute_label i64[U, O], object_conf, attribute_conf f32[U, O]
                                 the detector's argmax and its confidence; None without labels
    Any of the index tensors, and the batch itself, may be empty.
    """

    tokens: Tensor
    token_start: Tensor
    features: Tensor
    boxes: Tensor
    num_objects: Tensor
    image_index: Tensor
    lm_position: Tensor
    lm_target: Tensor
    object_position: Tensor
    zero_position: Tensor
    swap_position: Tensor
    swap_features: Tensor
    matched: Tensor
    answer_pair: Tensor
    answer_target: Tensor
    pair_id: Tensor
    sentence_id: Tensor
    source: Tensor
    offset: Tensor
    dataset: Tensor
    object_label: Tensor | None = None
    object_conf: Tensor | None = None
    attribute_label: Tensor | None = None
    attribute_conf: Tensor | None = None

    @property
    def pairs(self) -> int:
        """M."""
        return len(self.image_index)

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: v if v is None else change(v) for k, v in found.items()}
        return Batch(**changed)
