"""What one forward takes: packed tokens, each distinct image once, and where losses are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """How much there is in a batch, for the host."""

    longest: int
    """Tokens of the longest sentence."""
    most: int
    """Objects of the image that has most, of each of two where they are; at least 1 where there is
    an image."""
    image_rows: int
    """Objects of all distinct images, an image without any counted as 1."""
    pair_rows: int
    """Objects of all pairs' images, counted likewise."""
    pair_objects: int
    """Objects of all pairs' images."""
    view_rows: int
    """Objects of all views, counted as `pair_rows`."""


@dataclass(frozen=True)
class Questions:
    """The questions of a batch with the scores of all their answers: Q questions, A scores."""

    pair: Tensor
    """i64[Q] their pairs."""
    answered: Tensor
    """i64[A] the question, by its place here, that an answer is to."""
    answer: Tensor
    """i64[A] the answer, as a row of the answer table."""
    score: Tensor
    """f32[A] its score, 0..1."""


@dataclass(frozen=True)
class Batch:
    """M pairs of U distinct images with at most O objects of D features; T tokens in all.

    Any of the index tensors, and the batch itself, may be empty.
    """

    tokens: Tensor
    """i64[T] ids after masking, [CLS] and [SEP] included, pair after pair, no padding."""
    token_start: Tensor
    """i64[M+1] where each pair's tokens begin; the last entry is T."""
    features: Tensor
    """[U, O, D] as the detector gave them, f16 or f32, zero-padded; or u8[U, O, 8 + D] as
    `model.stored.decoded` takes them."""
    boxes: Tensor
    """f32[U, O, 4] x1 y1 x2 y2 in 0..1, zero-padded."""
    num_objects: Tensor
    """i64[U] real objects of each image; the others are padding."""
    image_index: Tensor
    """i64[M] row of each pair's image in the tensors of images."""
    lm_position: Tensor
    """i64 masked words, as flat indices into `tokens`."""
    lm_target: Tensor
    """i64 the ids that stood there."""
    object_position: Tensor
    """i64 masked objects, as flat indices into (M * O)."""
    zero_position: Tensor
    """i64 those of them whose features are zeroed."""
    swap_position: Tensor
    """i64 those of them whose features are replaced by `swap_features`."""
    swap_features: Tensor
    """[., D] features of objects of other images, one for each of `swap_position`, likewise."""
    matched: Tensor
    """i64[M] 1 = the sentence belongs to the image, 0 = it is another image's."""
    answer_pair: Tensor
    """i64 pairs with an answer to predict."""
    answer_target: Tensor
    """i64 their answers, as rows of the answer table."""
    pair_id: Tensor
    """i64[M] the pair's number in the training data."""
    sentence_id: Tensor
    """i64[M] the sentence shown; differs from `pair_id` where the pair is mismatched."""
    source: Tensor
    """i64[M] source set that the pair is of."""
    offset: Tensor
    """i64[M] the pair's place in the step's global batch."""
    dataset: Tensor
    """i64[M] which of the mixed data sets the pair is of."""
    object_label: Tensor | None = None
    """i64[U, O] the object class that the detector found likeliest; None without labels."""
    object_conf: Tensor | None = None
    """f32[U, O] the detector's confidence in it."""
    attribute_label: Tensor | None = None
    """i64[U, O] the attribute that the detector found likeliest; None without labels."""
    attribute_conf: Tensor | None = None
    """f32[U, O] the detector's confidence in it."""
    view: Tensor | None = None
    """i64[M] the view of each pair: pairs of one view have the same image, and the same of its
    objects are masked in the same way. None: each has one of its own."""
    view_pair: Tensor | None = None
    """i64[W] a pair of each of the W views."""
    first_objects: Tensor | None = None
    """i64[U] objects of the first image where each of the U is of two: its objects come first."""
    question_pair: Tensor | None = None
    """See Questions, as are the next; None in pre-training."""
    question_answered: Tensor | None = None
    question_answer: Tensor | None = None
    question_score: Tensor | None = None

    @property
    def questions(self) -> Questions | None:
        """The questions, where the batch was made for them."""
        pair, answered = self.question_pair, self.question_answered
        answer, score = self.question_answer, self.question_score
        if pair is None or answered is None or answer is None or score is None:
            return None
        return Questions(pair, answered, answer, score)

    @property
    def view_image(self) -> Tensor:
        """i64[W] row of each view's image."""
        return self.image_index if self.view_pair is None else self.image_index[self.view_pair]

    @property
    def pairs(self) -> int:
        """M."""
        return len(self.image_index)

    @cached_property
    def extent(self) -> Extent:
        """Counted at first use, or when the batch leaves the CPU: later it waits for the device."""
        length, count = self.token_start.diff(), self.num_objects
        shown = count.clamp(min=1)
        each = shown
        if self.first_objects is not None:
            each = torch.cat([self.first_objects, count - self.first_objects])
        return Extent(
            int(length.max()) if len(length) else 0,
            int(each.max()) if len(each) else 0,
            int(shown.sum()),
            int(shown[self.image_index].sum()),
            int(count[self.image_index].sum()),
            int(shown[self.view_image].sum()),
        )

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Let go of it, its memory is not used anew before what the stream does with it is done."""
        for field in fields(self):
            if (tensor := getattr(self, field.name)) is not None:
                tensor.record_stream(stream)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: v if v is None else change(v) for k, v in found.items()}
        batch = Batch(**changed)
        vars(batch)["extent"] = self.extent
        return batch
