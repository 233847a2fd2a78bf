"""Pictures, and a detector that stands for the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Conditional DETR with random weights, whose map is 64 wide. It names a box under
    several classes, as its like do."""
    from transformers import (
        ConditionalDetrConfig,
        ConditionalDetrForObjectDetection,
        ConditionalDetrImageProcessor,
        ResNetConfig,
    )

    torch.manual_seed(0)
    last: dict[str, Any] = {"out_features": ["stage4"]}
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], **last
    )
    sizes: dict[str, Any] = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    config = ConditionalDetrConfig(
        backbone_config=backbone, num_queries=20, **sizes | {"num_labels": 5}
    )
    model = ConditionalDetrForObjectDetection(config)
    with torch.no_grad():  # else its boxes are all one
        for name, values in model.named_parameters():
            if "ref_point_head" in name or "query_position" in name:
                values.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("detr")
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    ConditionalDetrImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine random pictures of several sizes, one of them in a folder below."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i in range(9):
        pixels = rng.integers(0, 256, (40 + 3 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / (f"below/{i}.png" if i == 8 else f"{i}.png"))
    return folder
