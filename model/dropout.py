"""Dropout. On the CPU its random bits come 16 a number, where torch draws 53, one number after the
other, in the time of a product of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element 0 with probability p, on the CPU to the nearest 2^-16, and else scaled so
    that the mean stays. Drawn from torch's generator of the device."""
    if p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return x * _mask(x, p)


def add_dropout(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """residual + dropout(x, p)."""
    if p == 0 or x.device.type != "cpu":
        return residual + dropout(x, p)
    return torch.addcmul(residual, x, _mask(x, p))


def _mask(x: Tensor, p: float) -> Tensor:
    """What x is multiplied by."""
    dropped = round(p * _STEPS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits >= dropped - _STEPS // 2
    return kept.to(x.dtype).mul_(_STEPS / (_STEPS - dropped))
