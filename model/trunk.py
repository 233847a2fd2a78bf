"""LXMERT's trunk: three encoders, from token ids and regions to hidden vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import CrossLayer, Layer, ObjectEmbedding, WordEmbedding


@dataclass(frozen=True)
class TrunkOutput:
    """Hidden vectors of M pairs with at most L tokens and O objects; hidden size H."""

    language: Tensor
    """(M, L, H)."""
    vision: Tensor
    """(M, O, H)."""
    pooled: Tensor
    """(M, H): the cross-modality vector, from [CLS]."""
    attentions: tuple[Tensor, ...] | None = None
    """On request the weights (M, heads, queries, keys) of every attention in the order of
    computation: language layers, object layers, then of each cross layer language->vision,
    vision->language, language self, vision self."""


class Encoder(nn.Module):
    """The language, the object-relationship and the cross-modality encoder."""

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
        attention_out: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """language (M, L, H), features (M, O, D), boxes (M, O, 4), masks as in layers.py ->
        language (M, L, H) and vision (M, O, H)."""
        vision = self.visn_fc(features, boxes)
        for layer in self.layer:
            language = layer(language, language_mask, attention_out)
        for layer in self.r_layers:
            vision = layer(vision, vision_mask, attention_out)
        for layer in self.x_layers:
            language, vision = layer(language, language_mask, vision, vision_mask, attention_out)
        return language, vision


class Pooler(nn.Module):
    """dense + tanh, over the vector of [CLS]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """(M, H) -> (M, H)."""
        return torch.tanh(self.dense(first))


class LxmertModel(nn.Module):
    """The trunk, for whoever brings heads of their own."""

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
        attention_out: list[Tensor] | None = [] if return_attention else None
        language = self.embeddings(ids)
        language, vision = self.encoder(
            language, token_mask, features, boxes, object_mask, attention_out
        )
        pooled = self.pooler(language[:, 0])
        attentions = None if attention_out is None else tuple(attention_out)
        return TrunkOutput(language, vision, pooled, attentions)
