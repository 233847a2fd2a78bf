"""Features of boxes out of a convolutional map, in torch alone."""

from __future__ import annotations

import torch

_SAMPLES = 14  # along each side of a box: as RoIAlign of 7 × 7 bins with 2 × 2 samples, then a mean


def pool_boxes(features: torch.Tensor, boxes: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean features of boxes: bilinear samples at 14 × 14 points of each (RoIAlign of He et al.,
    Mask R-CNN, 2017, averaged).

    features: [C, H, W]; boxes: [n, 4], x1 y1 x2 y2 as fractions of the picture; valid: [2], the
    part of the map's width and height that shows the picture, the rest being padding. Returns
    [n, C].
    """
    steps = (torch.arange(_SAMPLES, dtype=boxes.dtype, device=boxes.device) + 0.5) / _SAMPLES
    begin, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    points = (begin[:, None] + size[:, None] * steps[None, :, None]) * valid  # [n, samples, 2]
    x = points[:, None, :, 0].expand(-1, _SAMPLES, -1)
    y = points[:, :, None, 1].expand(-1, -1, _SAMPLES)
    grid = torch.stack([x, y], -1).reshape(1, -1, _SAMPLES, 2) * 2 - 1
    sampled = torch.nn.functional.grid_sample(
        features[None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[0].reshape(features.shape[0], len(boxes), -1).mean(-1).T
