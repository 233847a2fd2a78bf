"""The layers of LXMERT. Names of modules are those of the released weights.

Shapes: M pairs, L or C places of a sequence, hidden size H. A mask is bool (M, C), True where a
place is real, None where none is padded. attention_out collects the attention weights
(M, heads, L, C) in the order of computation; None: they are not computed one by one, with the same
result.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

LAYER_NORM_EPS = 1e-12  # BERT's, also in every part of LXMERT


def layer_norm(size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=LAYER_NORM_EPS)


class Attention(nn.Module):
    """Multi-head attention of a sequence over a context, before its output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_dropout

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None, attention_out: list[Tensor] | None
    ) -> Tensor:
        """x (M, L, H), context (M, C, H), mask of the context -> (M, L, H)."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        bias = None if mask is None else mask[:, None, None, :]
        p = self.dropout if self.training else 0.0
        if attention_out is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        else:
            score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if bias is not None:
                # Finite, so that a query that may see nothing has weights and no NaN.
                score = score.masked_fill(~bias, torch.finfo(score.dtype).min)
            weights = score.softmax(-1)
            attention_out.append(weights.detach())
            out = F.dropout(weights, p, self.training) @ v
        return out.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """Projection, dropout, residual, LayerNorm: the end of every sub-layer."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (M, L, size), residual (M, L, H) -> (M, L, H)."""
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class SelfAttention(nn.Module):
    """Attention of a sequence over itself, with its projection and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = Attention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, x: Tensor, mask: Tensor | None, attention_out: list[Tensor] | None) -> Tensor:
        out: Tensor = self.output(self.self(x, x, mask, attention_out), x)
        return out


class CrossAttention(nn.Module):
    """Attention of one modality over the other, with its projection and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.att = Attention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None, attention_out: list[Tensor] | None
    ) -> Tensor:
        out: Tensor = self.output(self.att(x, context, mask, attention_out), x)
        return out


class Intermediate(nn.Module):
    """dense + GELU: the wide half of an FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """A layer of the language or the object-relationship encoder: self-attention, then an FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor | None, attention_out: list[Tensor] | None) -> Tensor:
        x = self.attention(x, mask, attention_out)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class CrossLayer(nn.Module):
    """A layer of the cross-modality encoder: both directions of cross-attention read the layer's
    inputs and share one set of weights, then each modality has self-attention and an FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visual_attention = CrossAttention(config)
        self.lang_self_att = SelfAttention(config)
        self.visn_self_att = SelfAttention(config)
        self.lang_inter = Intermediate(config)
        self.lang_output = Residual(config.intermediate_size, config)
        self.visn_inter = Intermediate(config)
        self.visn_output = Residual(config.intermediate_size, config)

    def forward(
        self,
        language: Tensor,
        language_mask: Tensor | None,
        vision: Tensor,
        vision_mask: Tensor | None,
        attention_out: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """language (M, L, H) and vision (M, O, H) with their masks -> the same shapes."""
        x = self.visual_attention(language, vision, vision_mask, attention_out)
        y = self.visual_attention(vision, language, language_mask, attention_out)
        x = self.lang_self_att(x, language_mask, attention_out)
        y = self.visn_self_att(y, vision_mask, attention_out)
        return self.lang_output(self.lang_inter(x), x), self.visn_output(self.visn_inter(y), y)


class WordEmbedding(nn.Module):
    """Word + position + segment 0, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """ids i64 (M, L) -> (M, L, H)."""
        position = torch.arange(ids.shape[1], device=ids.device)
        segment = torch.zeros_like(ids)
        x = self.word_embeddings(ids) + self.position_embeddings(position)
        out: Tensor = self.dropout(self.LayerNorm(x + self.token_type_embeddings(segment)))
        return out


class ObjectEmbedding(nn.Module):
    """(LN(W_f f + b_f) + LN(W_p p + b_p)) / 2, dropout (the paper's equations 1 to 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visn_fc = nn.Linear(config.feature_dim, config.hidden_size)
        self.visn_layer_norm = layer_norm(config.hidden_size)
        self.box_fc = nn.Linear(config.box_dim, config.hidden_size)
        self.box_layer_norm = layer_norm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """features (M, O, D), boxes (M, O, 4) -> (M, O, H)."""
        x = self.visn_layer_norm(self.visn_fc(features))
        y = self.box_layer_norm(self.box_fc(boxes))
        out: Tensor = self.dropout((x + y) / 2)
        return out


class Transform(nn.Module):
    """dense + GELU + LayerNorm, at the foot of the LM head and of the object head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return out
