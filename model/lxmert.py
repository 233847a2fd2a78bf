"""LXMERT: the trunk, and the trunk with the heads of pre-training.

Parameters have the names of Hugging Face's `LxmertForPreTraining`, whose released weights differ
from the original's by one prefix.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ModelConfig
from model.layers import (
    CrossLayer,
    Layer,
    ObjectEmbedding,
    Transform,
    WordEmbedding,
    layer_norm,
)
from model.losses import (
    ALL_OBJECTIVES,
    FeatureLoss,
    LabelScope,
    Logits,
    PreTrainingOutput,
    check_objectives,
    objective_sums,
    real_objects,
)


@dataclass(frozen=True)
class TrunkOutput:
    """language (M, L, H), vision (M, O, H), pooled (M, H): the cross-modality vector.

    attentions: on request the weights (M, heads, queries, keys) of every attention in the order
    of computation: language layers, object layers, then of each cross layer language->vision,
    vision->language, language self, vision self.
    """

    language: Tensor
    vision: Tensor
    pooled: Tensor
    attentions: tuple[Tensor, ...] | None = None


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visn_fc = ObjectEmbedding(config)
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.language_layers))
        self.x_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.cross_layers))
        self.r_layers = nn.ModuleList(Layer(config) for _ in range(config.object_layers))

    def forward(
        self,
        language: Tensor,
        language_mask: Tensor | None,
        features: Tensor,
        boxes: Tensor,
        vision_mask: Tensor | None,
        keep: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        vision = self.visn_fc(features, boxes)
        for layer in self.layer:
            language = layer(language, language_mask, keep)
        for layer in self.r_layers:
            vision = layer(vision, vision_mask, keep)
        for layer in self.x_layers:
            language, vision = layer(language, language_mask, vision, vision_mask, keep)
        return language, vision


class Pooler(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class LxmertModel(nn.Module):
    """The trunk without heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = WordEmbedding(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)

    def forward(
        self,
        ids: Tensor,
        token_mask: Tensor | None,
        features: Tensor,
        boxes: Tensor,
        object_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> TrunkOutput:
        """ids i64 (M, L); features (M, O, D); boxes (M, O, 4); masks bool (M, L) and (M, O), True
        where real, or None where nothing is padded."""
        keep: list[Tensor] | None = [] if return_attention else None
        language = self.embeddings(ids)
        language, vision = self.encoder(language, token_mask, features, boxes, object_mask, keep)
        pooled = self.pooler(language[:, 0])
        return TrunkOutput(language, vision, pooled, None if keep is None else tuple(keep))


class LanguageHead(nn.Module):
    """Transform and a decoder tied to the word embeddings, with its own bias."""

    def __init__(self, config: ModelConfig, tied: Tensor) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        assert isinstance(tied, nn.Parameter)
        self.decoder.weight = tied
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.transform(x)) + self.bias
        return out


class PreTrainingHeads(nn.Module):
    def __init__(self, config: ModelConfig, tied: Tensor) -> None:
        super().__init__()
        self.predictions = LanguageHead(config, tied)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class ObjectHead(nn.Module):
    """One shared transform, then object ids, attribute ids and features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        sizes = {
            "obj": config.num_object_classes,
            "attr": config.num_attribute_classes,
            "feat": config.feature_dim,
        }
        self.decoder_dict = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, size) for name, size in sizes.items()}
        )


class AnswerHead(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide = 2 * config.hidden_size
        self.logit_fc = nn.Sequential(
            nn.Linear(config.hidden_size, wide),
            nn.GELU(),
            layer_norm(wide),
            nn.Linear(wide, config.num_answers),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        out: Tensor = self.logit_fc(pooled)
        return out


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
        objectives: frozenset[str] = ALL_OBJECTIVES,
        label_scope: LabelScope = "masked",
        feature_loss: FeatureLoss = "l2",
    ) -> PreTrainingOutput:
        """Loss sums, counts and hits of `objectives` over the batch (see losses.py).

        Raises ModelError when `objectives` is empty or has a name that is none.
        """
        check_objectives(objectives)
        trunk, row, column = self.encode(batch)
        logits = self.decode(batch, trunk, row, column, objectives, label_scope)
        return objective_sums(batch, logits, objectives, label_scope, feature_loss)

    def encode(self, batch: Batch) -> tuple[TrunkOutput, Tensor, Tensor]:
        """Unpack, mask and run the trunk; also each packed token's pair and place in it."""
        device = batch.tokens.device
        length = batch.token_start.diff()
        pairs, longest = len(length), int(length.max()) if len(length) else 1
        row = torch.repeat_interleave(
            torch.arange(pairs, device=device), length, output_size=len(batch.tokens)
        )
        column = torch.arange(len(batch.tokens), device=device) - batch.token_start[row]
        ids = torch.zeros(pairs, longest, dtype=torch.int64, device=device)
        ids[row, column] = batch.tokens
        token_mask = torch.arange(longest, device=device) < length[:, None]

        features = batch.features[batch.image_index]
        flat = features.flatten(0, 1)
        flat[batch.zero_position] = 0
        flat[batch.swap_position] = batch.swap_features
        objects = features.shape[1]
        # An image without objects shows its first, empty place: attention needs something to see.
        seen = batch.num_objects[batch.image_index, None].clamp(min=1)
        real = torch.arange(objects, device=device) < seen
        dtype = self.cls.seq_relationship.weight.dtype
        trunk = self.lxmert(
            ids,
            token_mask,
            features.to(dtype),
            batch.boxes[batch.image_index].to(dtype),
            real,
        )
        return trunk, row, column

    def decode(
        self,
        batch: Batch,
        trunk: TrunkOutput,
        row: Tensor,
        column: Tensor,
        objectives: frozenset[str],
        label_scope: LabelScope,
    ) -> Logits:
        """Run each head where its losses are and nowhere else.

        An inactive head runs on no rows, so that every parameter takes part in every backward on
        every rank, as ZeRO and DDP need.
        """

        def at(name: str, rows: Tensor) -> Tensor:
            return rows if name in objectives else rows[:0]

        words = at("masked_lm", batch.lm_position)
        vision = trunk.vision.flatten(0, 1)
        head = self.obj_predict_head
        masked = head.transform(vision[batch.object_position])
        if label_scope == "masked":
            label_position, labelled = batch.object_position, masked
        else:
            label_position = real_objects(batch)
            labelled = head.transform(vision[label_position])
        return Logits(
            words=self.cls.predictions(trunk.language[row[words], column[words]]),
            features=head.decoder_dict["feat"](at("masked_feature", masked)),
            objects=head.decoder_dict["obj"](at("masked_object", labelled)),
            attributes=head.decoder_dict["attr"](at("masked_attribute", labelled)),
            label_position=label_position,
            matching=self.cls.seq_relationship(at("matching", trunk.pooled)),
            answers=self.answer_head(at("qa", trunk.pooled[batch.answer_pair])),
            anchor=_anchor(trunk),
        )


def _anchor(trunk: TrunkOutput) -> Tensor:
    """Zero, with a gradient path to the trunk's three outputs."""
    parts = (trunk.language, trunk.vision, trunk.pooled)
    return torch.stack([part[:0].sum() for part in parts]).sum()


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
