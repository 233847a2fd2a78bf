"""The map in what a model puts out, and what part of it shows a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class MapError(ValueError):
    """A model puts out nothing that features of boxes can be pooled from."""

    def __init__(self) -> None:
        super().__init__(
            "it has no map to pool features from: choose a detector with a ResNet or another "
            "convolutional backbone (DETR, Conditional or Deformable DETR, RT-DETR) or YOLOS, or a "
            "backbone as ResNet, ConvNeXt, ViT or DINOv2"
        )


@dataclass(frozen=True)
class FeatureMap:
    """Of a batch."""

    values: torch.Tensor
    """[B, C, H, W]."""
    extent: tuple[float, float] = (1.0, 1.0)
    """Width and height of what the model was given, as parts of the map's: more than 1 where
    patches leave an edge out."""


def last_map(output: Any, config: Any, width: int, height: int) -> FeatureMap:
    """The last map of a backbone's output: of a convolutional one the last [B, C, H, W] in it, else
    the patches among the tokens [B, n, C]; width and height are those of what it was given.
    MapError where there is none."""
    if found := _in_order(output):
        return FeatureMap(found[-1])
    tokens, patch = getattr(output, "last_hidden_state", None), getattr(config, "patch_size", None)
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3 or not isinstance(patch, int):
        raise MapError
    columns, rows = width // patch, height // patch
    # The class's token and registers come before the patches, tokens of YOLOS' boxes after them.
    before = 1 + (getattr(config, "num_register_tokens", 0) or 0)
    after = getattr(config, "num_detection_tokens", 0) or 0
    count = columns * rows
    if not count or tokens.shape[1] != before + count + after:
        raise MapError
    values = tokens[:, before : before + count].transpose(1, 2)
    extent = (width / (columns * patch), height / (rows * patch))
    return FeatureMap(values.reshape(len(tokens), -1, rows, columns), extent)


def _in_order(value: Any) -> list[torch.Tensor]:
    """The maps [B, C, H, W] in an output, in its order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim == 4 else []
    if hasattr(value, "last_hidden_state"):
        return _in_order(value.last_hidden_state)
    if isinstance(value, dict):
        value = list(value.values())
    return [m for v in value for m in _in_order(v)] if isinstance(value, list | tuple) else []


def valid_part(mask: torch.Tensor | None, i: int) -> torch.Tensor:
    """Of a padded batch: the parts of width and height that its i-th picture takes, [2]."""
    if mask is None:
        return torch.ones(2)
    rows, columns = mask[i].any(1).sum(), mask[i].any(0).sum()
    return torch.stack([columns / mask.shape[2], rows / mask.shape[1]]).float()
