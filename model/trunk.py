"""LXMERT's trunk: three encoders, from tokens and regions to hidden vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.layers import CrossLayer, Layer, ObjectEmbedding, WordEmbedding
from model.packing import Rows, rows_of_mask, take
from model.top_down import TopDown


@dataclass(frozen=True)
class TrunkOutput:
    """Hidden vectors of M pairs with at most L tokens and O objects; hidden size H."""

    language: Tensor
    """(M, L, H), zero where padded."""
    vision: Tensor
    """(M, O, H), zero where padded."""
    pooled: Tensor
    """(M, H): the cross-modality vector, from [CLS]."""
    attentions: tuple[Tensor, ...] | None = None
    """On request the weights (M, heads, queries, keys) of every attention in the order of
    computation, zero where padded: language layers, object layers, then of each cross layer
    language->vision, vision->language, language self, vision self."""


@dataclass(frozen=True)
class Pairs:
    """M pairs of a sentence and an image as packed rows: T tokens, V objects."""

    ids: Tensor
    """i64[T]."""
    tokens: Rows
    """Of each sentence."""
    features: Tensor
    """(N, D), each once however many objects have it."""
    boxes: Tensor
    """(N', 4), as well."""
    feature: Tensor
    """i64[W] which of `features` an object of a view has."""
    box: Tensor
    """i64[W] which of `boxes`."""
    views: Rows
    """Of each view of an image, W rows in all: what the object-relationship encoder works on."""
    objects: Rows
    """Of each pair's image."""
    seen: Tensor | None = None
    """i64[V] the row of a view that each object of a pair is; None: the views are the pairs'."""


class Encoder(nn.Module):
    """The language, the object-relationship and the cross-modality encoder."""

    recompute = False
    """Layers keep their inputs alone, and the backward computes the rest again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visn_fc = ObjectEmbedding(config)
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.language_layers))
        self.x_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.cross_layers))
        self.r_layers = nn.ModuleList(Layer(config) for _ in range(config.object_layers))
        if config.top_down:
            self.top_down = TopDown(config)

    def forward(
        self,
        language: Tensor,
        pairs: Pairs,
        read: tuple[Tensor, Tensor] | None,
        attention_out: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """language (T, H) -> language (T, H) and vision (V, H), or only the rows `read` of both,
        for which alone the last layer is then computed to its end."""
        tokens, objects, views = pairs.tokens, pairs.objects, pairs.views
        vision = self.visn_fc(pairs.features, pairs.boxes, pairs.feature, pairs.box)
        for layer in self.layer:
            language = self._run(layer, language, tokens, attention_out)
        for layer in self.r_layers:
            vision = self._run(layer, vision, views, attention_out)
        if pairs.seen is not None:
            vision = take(vision, pairs.seen)
        last = len(self.x_layers) - 1
        for i, layer in enumerate(self.x_layers):
            rows = read if i == last else None
            language, vision = self._run(
                layer, language, vision, tokens, objects, rows, attention_out
            )
        if not self.x_layers:
            language = self.top_down(language, vision, tokens, objects)
            if read is not None:
                language, vision = take(language, read[0]), take(vision, read[1])
        return language, vision

    def _run(self, layer: nn.Module, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


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

    def packed(
        self,
        pairs: Pairs,
        read: tuple[Tensor, Tensor] | None = None,
        attention_out: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Language (T, H) and vision (V, H) of packed pairs; of both only the rows `read`, i64,
        where it is given."""
        language = self.embeddings(pairs.ids, pairs.tokens.place)
        found: tuple[Tensor, Tensor] = self.encoder(language, pairs, read, attention_out)
        return found

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
        where real, or None where nothing is padded. ModelError where padding is not last."""
        shown = torch.ones_like(ids, dtype=torch.bool) if token_mask is None else token_mask
        seen = features.new_ones(features.shape[:2], dtype=torch.bool)
        seen = seen if object_mask is None else object_mask
        tokens, objects = rows_of_mask(shown), rows_of_mask(seen)
        every = torch.arange(objects.total, device=ids.device)
        pairs = Pairs(
            ids[shown], tokens, features[seen], boxes[seen], every, every, objects, objects
        )
        attention_out: list[Tensor] | None = [] if return_attention else None
        language, vision = self.packed(pairs, None, attention_out)
        language, vision = tokens.pad(language, ids.shape[1]), objects.pad(vision, seen.shape[1])
        attentions = None if attention_out is None else tuple(attention_out)
        return TrunkOutput(language, vision, self.pooler(language[:, 0]), attentions)
