"""The heads of pre-training and fine-tuning. Names of modules are those of the released weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Transform, layer_norm


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
        """(words, H) -> (words, vocabulary)."""
        out: Tensor = self.decoder(self.transform(x)) + self.bias
        return out


class PreTrainingHeads(nn.Module):
    """Masked words and matching, under the one name that the released weights give them."""

    def __init__(self, config: ModelConfig, tied: Tensor) -> None:
        super().__init__()
        self.predictions = LanguageHead(config, tied)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class ObjectHead(nn.Module):
    """One shared transform, then a linear layer each for object ids, attribute ids and features."""

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
    """dense + GELU + LayerNorm at twice the width, then the answers."""

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
        """(questions, H) -> (questions, answers)."""
        out: Tensor = self.logit_fc(pooled)
        return out


class PairHead(nn.Module):
    """As the answer head, over the vectors of two images: dense + GELU + LayerNorm at the width of
    both, then the answers (Tan & Bansal 2019, appendix on NLVR2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide = 2 * config.hidden_size
        self.logit_fc = nn.Sequential(
            nn.Linear(wide, wide), nn.GELU(), layer_norm(wide), nn.Linear(wide, config.num_answers)
        )

    def forward(self, both: Tensor) -> Tensor:
        """(statements, 2 H) -> (statements, answers)."""
        out: Tensor = self.logit_fc(both)
        return out
