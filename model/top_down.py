"""Bottom-up top-down attention in place of the cross-modality encoder: the paper's baseline.

After Anderson et al. 2018 (arXiv 1707.07998), section 3.3: the sentence's vector asks every object,
and is multiplied by what it finds. Here the sentence's vector is [CLS] after the language encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.packing import Rows, take


class TopDown(nn.Module):
    """One look at the objects, by one head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.of_object = nn.Linear(h, h)
        self.of_sentence = nn.Linear(h, h)
        self.score = nn.Linear(h, 1)
        self.sentence = nn.Linear(h, h)
        self.seen = nn.Linear(h, h)

    def forward(self, language: Tensor, vision: Tensor, tokens: Rows, objects: Rows) -> Tensor:
        """language (T, H), vision (V, H) -> language (T, H), with what was seen in [CLS]."""
        asked = take(language, tokens.start)
        met = self.of_object(vision) + take(self.of_sentence(asked), objects.sequence)
        score = self.score(torch.tanh(met)).float()
        width = max(objects.longest, 1)
        there = torch.arange(width, device=score.device) < objects.length[:, None]
        weights = objects.pad(score, width)[..., 0].masked_fill(~there, -torch.inf).softmax(-1)
        each = weights[objects.sequence, objects.place].to(vision.dtype)
        found = torch.zeros_like(asked).index_add(0, objects.sequence, each[:, None] * vision)
        joint = self.sentence(asked).relu() * self.seen(found).relu()
        return language.index_copy(0, tokens.start, joint.to(language.dtype))
