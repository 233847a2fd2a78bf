"""Features as they are stored, to numbers, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_HEAD = 8  # bytes of scale and minimum, f32, before the values of a row of uint8


def decoded(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (N, D) of `dtype` of rows of floats, or of uint8 (N, 8 + D): minimum + scale * byte, as
    shards/format/features.py stores them. A row of zero bytes is a row of zeros."""
    if features.dtype != torch.uint8:
        return features.to(dtype)
    # A copy even of one row, which is contiguous where it is, but need not be aligned for f32.
    head = features[:, :_HEAD].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (head[:, 1:] + head[:, :1] * features[:, _HEAD:].float()).to(dtype)
