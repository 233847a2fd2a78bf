"""The layers of LXMERT. Names of modules are those of the released weights.

All work on packed rows (packing.py): (R, H) with no padding, hidden size H. attention_out collects
the attention weights (M, heads, L, C) in the order of computation; None: they are not kept, with
the same result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.dropout import add_dropout, dropout
from model.packing import Rows, take

LAYER_NORM_EPS = 1e-12  # BERT's, also in every part of LXMERT


def layer_norm(size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=LAYER_NORM_EPS)


class Residual(nn.Module):
    """Projection, dropout, residual, LayerNorm: the end of every sub-layer."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = config.dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (R, size), residual (R, H) -> (R, H)."""
        p = self.dropout if self.training else 0.0
        out: Tensor = self.LayerNorm(add_dropout(self.dense(x), residual, p))
        return out


class SelfAttention(nn.Module):
    """Attention of sequences over themselves, with its projection and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = Attention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        read: Tensor | None = None,
        attention_out: list[Tensor] | None = None,
    ) -> Tensor:
        """x (R, H) -> the same, or only its rows `read`, i64."""
        found = self.self(x, [(rows, rows)], attention_out)
        if read is not None:
            found, x = take(found, read), take(x, read)
        out: Tensor = self.output(found, x)
        return out


class CrossAttention(nn.Module):
    """Attention of each modality over the other, with its projection and residual. Both directions
    read the layer's inputs and share one set of weights, so their rows are projected together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.att = Attention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(
        self,
        language: Tensor,
        vision: Tensor,
        tokens: Rows,
        objects: Rows,
        attention_out: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """language (T, H), vision (V, H) -> the same shapes."""
        both = torch.cat([language, vision])
        found = self.att(both, [(tokens, objects), (objects, tokens)], attention_out)
        language, vision = self.output(found, both).split([len(language), len(vision)])
        return language, vision


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

    def forward(self, x: Tensor, rows: Rows, attention_out: list[Tensor] | None = None) -> Tensor:
        """x (R, H) -> (R, H)."""
        x = self.attention(x, rows, None, attention_out)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class CrossLayer(nn.Module):
    """A layer of the cross-modality encoder: cross-attention, then each modality has self-attention
    and an FFN."""

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
        vision: Tensor,
        tokens: Rows,
        objects: Rows,
        read: tuple[Tensor, Tensor] | None = None,
        attention_out: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """language (T, H), vision (V, H) -> the same, or only the rows of each in `read`, i64."""
        x, y = self.visual_attention(language, vision, tokens, objects, attention_out)
        read_x, read_y = read or (None, None)
        x = self.lang_self_att(x, tokens, read_x, attention_out)
        y = self.visn_self_att(y, objects, read_y, attention_out)
        return self.lang_output(self.lang_inter(x), x), self.visn_output(self.visn_inter(y), y)


class WordEmbedding(nn.Module):
    """Word + position + segment 0, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = config.dropout

    def forward(self, ids: Tensor, place: Tensor) -> Tensor:
        """ids i64 (T,), each one's place in its sentence i64 (T,) -> (T, H)."""
        x = self.word_embeddings(ids) + self.position_embeddings(place)
        x = self.LayerNorm(x + self.token_type_embeddings(torch.zeros_like(ids)))
        return dropout(x, self.dropout if self.training else 0.0)


class ObjectEmbedding(nn.Module):
    """(LN(W_f f + b_f) + LN(W_p p + b_p)) / 2, dropout (the paper's equations 1 to 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visn_fc = nn.Linear(config.feature_dim, config.hidden_size)
        self.visn_layer_norm = layer_norm(config.hidden_size)
        self.box_fc = nn.Linear(config.box_dim, config.hidden_size)
        self.box_layer_norm = layer_norm(config.hidden_size)
        self.dropout = config.dropout

    def forward(self, features: Tensor, boxes: Tensor, feature: Tensor, box: Tensor) -> Tensor:
        """features (N, D), boxes (N', 4), and which of each an object has, i64 (V,) -> (V, H):
        what many objects have is embedded once."""
        x = self.visn_layer_norm(self.visn_fc(features))
        y = self.box_layer_norm(self.box_fc(boxes))
        out = (take(x, feature) + take(y, box)) / 2
        return dropout(out, self.dropout if self.training else 0.0)


class Transform(nn.Module):
    """dense + GELU + LayerNorm, at the foot of the LM head and of the object head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return out
