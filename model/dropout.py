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
    if x.device.type != "cpu":
        return F.dropout(x, p)
    kept, scale = keep(x, p)
    return x if kept is None else x * (kept * scale)


def add_dropout(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """residual + dropout(x, p)."""
    if x.device.type != "cpu":
        return residual + F.dropout(x, p)
    kept, scale = keep(x, p)
    return residual + x if kept is None else torch.addcmul(residual, x, kept, value=scale)


def keep(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    """What dropout on the CPU multiplies x by: 1 where an element is kept and else 0, of its shape
    and type, None where all are; and the scale."""
    if p == 0:
        return None, 1.0
    dropped = dropped_of(p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits >= dropped - _STEPS // 2
    return kept.to(x.dtype), _STEPS / (_STEPS - dropped)


def dropped_of(p: float) -> int:
    """How many of 2^16 numbers drop an element."""
    return min(round(p * _STEPS), _STEPS - 1)
