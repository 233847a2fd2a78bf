"""LXMERT: the trunk, the heads of what it is trained for, and the loss sums of the objectives.

Parameters have the names of Hugging Face's `LxmertForPreTraining`, whose released weights differ
from the original's by one prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ModelConfig
from model.heads import AnswerHead, ObjectHead, PairHead, PreTrainingHeads
from model.layers import CrossLayer, Layer, ObjectEmbedding, WordEmbedding
from model.objectives import OBJECTIVES, check_objectives
from model.objectives.base import Encoded, LossSettings, Objective, read_objects
from model.packing import Rows, row_of
from model.stored import decoded
from model.trunk import LxmertModel, Pairs


@dataclass(frozen=True)
class ModelOutput:
    """What one forward gives, by the name of each active objective."""

    loss_sum: dict[str, Tensor]
    """Scalars in fp32 with gradient: sums over the targets."""
    count: dict[str, int]
    """Targets."""
    correct: dict[str, Tensor]
    """Scalars: how many predictions are the target; of objectives that predict a class."""
    prediction: dict[str, Tensor]
    """i64 (targets,): the predictions; of the same objectives."""


HEADS = ("cls", "obj_predict_head", "answer_head", "pair_head")
"""Of all models, by their modules' names."""


class Lxmert(nn.Module):
    """The trunk and the heads of some objectives, by default of pre-training. One forward gives the
    loss sums of all active ones."""

    def __init__(
        self, config: ModelConfig, objectives: Mapping[str, Objective] = OBJECTIVES
    ) -> None:
        super().__init__()
        self.config = config
        self.objectives = objectives
        self.lxmert = LxmertModel(config)
        heads = {o.head.partition(".")[0] for o in objectives.values()}
        if "cls" in heads:
            self.cls = PreTrainingHeads(config, self.lxmert.embeddings.word_embeddings.weight)
        if "obj_predict_head" in heads:
            self.obj_predict_head = ObjectHead(config)
        if "answer_head" in heads:
            self.answer_head = AnswerHead(config)
        if "pair_head" in heads:
            self.pair_head = PairHead(config)

    def forward(
        self,
        batch: Batch,
        objectives: frozenset[str] | None = None,
        settings: LossSettings | None = None,
    ) -> ModelOutput:
        """Loss sums, counts and hits of `objectives` (by default of all) over the batch.

        Raises ModelError when `objectives` is empty or has a name that is none, and when the batch
        lacks the labels of one.
        """
        table = self.objectives
        active = frozenset(table) if objectives is None else objectives
        check_objectives(active, table)
        encoded = self.encode(batch, settings)
        logits = self.decode(encoded, active)
        results = {n: o.loss(logits[n], encoded) for n, o in table.items() if n in active}
        loss_sum = {name: result.loss_sum for name, result in results.items()}
        first = next(iter(loss_sum))
        loss_sum[first] = loss_sum[first] + _zero(encoded, logits.values())
        return ModelOutput(
            loss_sum,
            {name: table[name].count(batch, encoded.settings) for name in results},
            {name: r.correct for name, r in results.items() if r.correct is not None},
            {name: r.prediction for name, r in results.items() if r.prediction is not None},
        )

    def encode(self, batch: Batch, settings: LossSettings | None = None) -> Encoded:
        """Run the trunk on packed rows, with the masks applied to the features, and read what
        losses need of it."""
        settings = settings or LossSettings()
        pairs = pack(batch, self.lxmert.pooler.dense.weight.dtype)
        objects, masked = read_objects(batch, settings)
        first = pairs.tokens.start
        read = (
            torch.cat([first, batch.lm_position]),
            pairs.objects.row_of(objects, batch.features.shape[1]),
        )
        language, vision = self.lxmert.packed(pairs, read)
        first, words = language.split([len(first), len(batch.lm_position)])
        pooled, heads = self.lxmert.pooler(first), getattr(self, "obj_predict_head", None)
        transform = heads.transform if heads is not None else nn.Identity()
        return Encoded(batch, words, vision, pooled, masked, transform, settings)

    def decode(self, encoded: Encoded, active: frozenset[str]) -> dict[str, Tensor]:
        """Each objective's logits, computed at its targets and nowhere else.

        The head of an inactive objective runs on no rows, so that every parameter takes part in
        every backward on every rank, as ZeRO and DDP need.
        """
        logits: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            rows = objective.rows(encoded)
            head = self.get_submodule(objective.head)
            logits[name] = head(rows if name in active else rows[:0])
        return logits


def compile_layers(model: Lxmert, backend: str = "inductor") -> None:
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
    shown, image_index = batch.num_objects.clamp(min=1), batch.image_index
    begin = torch.arange(len(shown), device=shown.device) * width
    length = batch.token_start.diff()
    tokens, ids = Rows(length, len(batch.tokens), extent.longest), batch.tokens
    if batch.first_objects is not None:
        # A pair of two images is two pairs, one after the other, with the same sentence.
        begin = torch.stack([begin, begin + batch.first_objects], 1).flatten()
        shown = torch.stack([batch.first_objects, shown - batch.first_objects], 1).flatten()
        image_index = torch.stack([2 * image_index, 2 * image_index + 1], 1).flatten()
        tokens = Rows(length.repeat_interleave(2), 2 * len(ids), extent.longest)
        ids = ids[batch.token_start[:-1].repeat_interleave(2)[tokens.sequence] + tokens.place]
    images = Rows(shown, extent.image_rows, extent.most)
    objects = Rows(shown[image_index], extent.pair_rows, extent.most)
    views, view_image = objects, image_index
    if batch.view is not None:
        view_image = batch.view_image
        views = Rows(shown[view_image], extent.view_rows, extent.most)
    features, boxes = batch.features.flatten(0, 1), batch.boxes.flatten(0, 1)
    if extent.image_rows < len(features):
        real = begin[images.sequence] + images.place
        features, boxes = features[real], boxes[real]
    box = images.start[view_image][views.sequence] + views.place
    feature, zero = box.clone(), len(features)
    # Pairs of one view write the same: zero, or features that were drawn alike.
    first = views.start if batch.view is None else views.start[batch.view]
    feature[row_of(first, batch.zero_position, width)] = zero
    swapped = torch.arange(len(batch.swap_position), device=box.device)
    feature[row_of(first, batch.swap_position, width)] = swapped + (zero + 1)
    seen = None if batch.view is None else first[objects.sequence] + objects.place
    features = torch.cat([features, features.new_zeros(1, features.shape[1]), batch.swap_features])
    features, boxes = decoded(features, dtype), boxes.to(dtype)
    return Pairs(ids, tokens, features, boxes, feature, box, views, objects, seen)


def _zero(encoded: Encoded, logits: Iterable[Tensor]) -> Tensor:
    """A zero in fp32 with a gradient path to every head and to the trunk's three outputs: added to
    a loss, it makes all of them take part in its backward."""
    parts = (encoded.words, encoded.objects, encoded.pooled, *logits)
    return torch.stack([part[:0].sum().float() for part in parts]).sum()


@torch.no_grad()
def init_weights(model: Lxmert, seed: int) -> None:
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
