"""LXMERT for pre-training: the trunk, every head, and the loss sums of the objectives.

Parameters have the names of Hugging Face's `LxmertForPreTraining`, whose released weights differ
from the original's by one prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ModelConfig
from model.heads import AnswerHead, ObjectHead, PreTrainingHeads
from model.layers import CrossLayer, Layer, ObjectEmbedding, WordEmbedding
from model.objectives import OBJECTIVES, check_objectives
from model.objectives.base import Encoded, LossSettings, read_objects
from model.packing import Rows, row_of
from model.stored import decoded
from model.trunk import LxmertModel, Pairs


@dataclass(frozen=True)
class PreTrainingOutput:
    """What one forward gives, by the name of each active objective."""

    loss_sum: dict[str, Tensor]
    """Scalars in fp32 with gradient: sums over the targets."""
    count: dict[str, int]
    """Targets."""
    correct: dict[str, Tensor]
    """Scalars: how many predictions are the target; of objectives that predict a class."""
    prediction: dict[str, Tensor]
    """i64 (targets,): the predictions; of the same objectives."""


class LxmertForPreTraining(nn.Module):
    """The trunk and every head. One forward gives the loss sums of all active objectives."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.lxmert = LxmertModel(config)
        self.cls = PreTrainingHeads(config, self.lxmert.embeddings.word_embeddings.weight)
        self.obj_predict_head = ObjectHead(config)
        self.answer_head = AnswerHead(config)

    def forward(
        self,
        batch: Batch,
        objectives: frozenset[str] | None = None,
        settings: LossSettings | None = None,
    ) -> PreTrainingOutput:
        """Loss sums, counts and hits of `objectives` (by default of all) over the batch.

        Raises ModelError when `objectives` is empty or has a name that is none, and when the batch
        lacks the labels of one.
        """
        active = frozenset(OBJECTIVES) if objectives is None else objectives
        check_objectives(active)
        encoded = self.encode(batch, settings)
        logits = self.decode(encoded, active)
        results = {n: o.loss(logits[n], encoded) for n, o in OBJECTIVES.items() if n in active}
        loss_sum = {name: result.loss_sum for name, result in results.items()}
        first = next(iter(loss_sum))
        loss_sum[first] = loss_sum[first] + _zero(encoded, logits.values())
        return PreTrainingOutput(
            loss_sum,
            {name: OBJECTIVES[name].count(batch, encoded.settings) for name in results},
            {name: r.correct for name, r in results.items() if r.correct is not None},
            {name: r.prediction for name, r in results.items() if r.prediction is not None},
        )

    def encode(self, batch: Batch, settings: LossSettings | None = None) -> Encoded:
        """Run the trunk on packed rows, with the masks applied to the features, and read what
        losses need of it."""
        settings = settings or LossSettings()
        pairs = pack(batch, self.cls.seq_relationship.weight.dtype)
        objects, masked = read_objects(batch, settings)
        first = batch.token_start[:-1]
        read = (
            torch.cat([first, batch.lm_position]),
            pairs.objects.row_of(objects, batch.features.shape[1]),
        )
        language, vision = self.lxmert.packed(pairs, read)
        first, words = language.split([batch.pairs, len(batch.lm_position)])
        pooled, transform = self.lxmert.pooler(first), self.obj_predict_head.transform
        return Encoded(batch, words, vision, pooled, masked, transform, settings)

    def decode(self, encoded: Encoded, active: frozenset[str]) -> dict[str, Tensor]:
        """Each objective's logits, computed at its targets and nowhere else.

        The head of an inactive objective runs on no rows, so that every parameter takes part in
        every backward on every rank, as ZeRO and DDP need.
        """
        logits: dict[str, Tensor] = {}
        for name, objective in OBJECTIVES.items():
            rows = objective.rows(encoded)
            head = self.get_submodule(objective.head)
            logits[name] = head(rows if name in active else rows[:0])
        return logits


def compile_layers(model: LxmertForPreTraining, backend: str = "inductor") -> None:
    """Have the layers and the embeddings compiled when they are first called, one piece of code for
    all layers of a kind and for every number of rows. backend: torch.compile's."""
    for module in model.modules():
        if isinstance(module, WordEmbedding | ObjectEmbedding | Layer | CrossLayer):
            module.compile(dynamic=True, fullgraph=True, backend=backend)


def pack(batch: Batch, dtype: torch.dtype) -> Pairs:
    """A batch as the trunk takes it: features of masked objects are zero, or another object's.
    dtype: the model's."""
    extent, width = batch.extent, batch.features.shape[1]
    # An image without objects shows its first, empty place: attention needs something to see.
    shown = batch.num_objects.clamp(min=1)
    images = Rows(shown, extent.image_rows, extent.most)
    objects = Rows(shown[batch.image_index], extent.pair_rows, extent.most)
    views = objects
    if batch.view is not None:
        views = Rows(shown[batch.view_image], extent.view_rows, extent.most)
    features, boxes = batch.features.flatten(0, 1), batch.boxes.flatten(0, 1)
    if extent.image_rows < len(features):
        real = images.sequence * width + images.place
        features, boxes = features[real], boxes[real]
    box = images.start[batch.view_image][views.sequence] + views.place
    feature, zero = box.clone(), len(features)
    # Pairs of one view write the same: zero, or features that were drawn alike.
    first = views.start if batch.view is None else views.start[batch.view]
    feature[row_of(first, batch.zero_position, width)] = zero
    swapped = torch.arange(len(batch.swap_position), device=box.device)
    feature[row_of(first, batch.swap_position, width)] = swapped + (zero + 1)
    seen = None if batch.view is None else first[objects.sequence] + objects.place
    features = torch.cat([features, features.new_zeros(1, features.shape[1]), batch.swap_features])
    length = batch.token_start.diff()
    tokens = Rows(length, len(batch.tokens), extent.longest)
    features, boxes = decoded(features, dtype), boxes.to(dtype)
    return Pairs(batch.tokens, tokens, features, boxes, feature, box, views, objects, seen)


def _zero(encoded: Encoded, logits: Iterable[Tensor]) -> Tensor:
    """A zero in fp32 with a gradient path to every head and to the trunk's three outputs: added to
    a loss, it makes all of them take part in its backward."""
    parts = (encoded.words, encoded.objects, encoded.pooled, *logits)
    return torch.stack([part[:0].sum().float() for part in parts]).sum()


@torch.no_grad()
def init_weights(model: LxmertForPreTraining, seed: int) -> None:
    """Weights N(0, initializer_range), biases 0, LayerNorm 1 and 0.

    Each parameter has its own generator, keyed by (seed, name): the values depend on nothing else.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
