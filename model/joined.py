"""One product of matrices for several linear layers of one input, whose weights stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def joined_linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """x (R, H) -> (R, sum of the layers' sizes): their outputs beside each other."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers]
    if torch.compiler.is_compiling():
        return F.linear(x, torch.cat(weights), torch.cat(biases))
    out: Tensor = _Joined.apply(x, *weights, *biases)
    return out


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        half = len(parameters) // 2
        weight, bias = _one(parameters[:half]), _one(parameters[half:])
        ctx.save_for_backward(x, *parameters[:half])
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        x, *weights = ctx.saved_tensors
        sizes = [len(w) for w in weights]
        return (grad @ _one(weights), *(grad.t() @ x).split(sizes), *grad.sum(0).split(sizes))


def _one(parts: Sequence[Tensor]) -> Tensor:
    """The tensors as one, without a copy where they lie beside each other, as in ZeRO's flat
    buffers."""
    first, at = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        apart = part.untyped_storage().data_ptr() != storage or part.storage_offset() != at
        if apart or not part.is_contiguous():
            return torch.cat(list(parts))
        at += part.numel()
    shape = (sum(len(p) for p in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())
