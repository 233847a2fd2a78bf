"""Multi-head attention among packed rows (packing.py), over true lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropout import keep
from model.joined import joined_linear
from model.packing import Rows


class Attention(nn.Module):
    """Attention before its output projection. Query, key and value are one product of matrices;
    their weights keep the released names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_dropout

    def forward(
        self, x: Tensor, sides: Sequence[tuple[Rows, Rows]], attention_out: list[Tensor] | None
    ) -> Tensor:
        """x (R, H) -> (R, H), of which rows that lie one after the other are queries, each sequence
        of `sides[i][0]` over the one of `sides[i][1]`. The contexts' rows are those of x, too: with
        one side itself, with two those of the other.

        attention_out: collects the weights (M, heads, L, C) of each side, zero where padded.
        """
        qkv = joined_linear(x, (self.query, self.key, self.value))
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if attention_out is not None:
            attention_out += _weights(qkv, sides)
        p = self.dropout if self.training else 0.0
        return _attend(qkv, sides, p).flatten(1)


def _attend(qkv: Tensor, sides: Sequence[tuple[Rows, Rows]], p: float) -> Tensor:
    """qkv (R, 3, heads, d) -> (R, heads, d), by what is quickest on the device."""
    if qkv.device.type == "cuda":
        from model.tiled_attention import fits, tiled

        parts = [rows for rows, _ in sides]
        if fits(parts, qkv.shape[-1]):
            return tiled(qkv, parts, p)
    return (_grouped if qkv.device.type == "cpu" else _nested)(qkv, sides, p)


def _places(sides: Sequence[tuple[Rows, Rows]]) -> list[tuple[Rows, int, Rows, int]]:
    """Each side's rows and its context's, and where they begin."""
    starts = [0, *(rows.total for rows, _ in sides)][: len(sides)]
    return [(a, i, b, j) for (a, b), i, j in zip(sides, starts, starts[::-1], strict=True)]


# --- a device's kernels for sequences of any lengths ----------------------------------------------


def _nested(qkv: Tensor, sides: Sequence[tuple[Rows, Rows]], p: float) -> Tensor:
    """qkv (R, 3, heads, d) -> (R, heads, d), all sides by one kernel."""
    if not len(qkv):
        return qkv[:, 0]
    q, k, v = qkv.transpose(0, 1).contiguous().unbind(0)
    rows, context = (_joined([side[i] for side in sides]) for i in (0, 1))
    if len(sides) > 1:
        sizes = [side.total for side, _ in sides]
        k, v = (torch.cat(x.split(sizes)[::-1]) for x in (k, v))
    out = F.scaled_dot_product_attention(
        _jagged(q, rows), _jagged(k, context), _jagged(v, context), dropout_p=p
    )
    values: Tensor = out.transpose(1, 2).values()
    return values


def _joined(parts: Sequence[Rows]) -> Rows:
    """Rows that lie one after the other."""
    if len(parts) == 1:
        return parts[0]
    length = torch.cat([part.length for part in parts])
    return Rows(length, sum(part.total for part in parts), max(part.longest for part in parts))


def _jagged(x: Tensor, rows: Rows) -> Tensor:
    """(R, heads, d) -> nested (sequences, heads, places, d)."""
    # The kernels ask that no sequence is empty, and none is: see model/lxmert.py.
    return torch.nested.nested_tensor_from_jagged(
        x, rows.end, min_seqlen=1, max_seqlen=rows.longest
    ).transpose(1, 2)


# --- sequences of equal lengths as one batch of matrices ------------------------------------------


def _grouped(qkv: Tensor, sides: Sequence[tuple[Rows, Rows]], p: float) -> Tensor:
    """qkv (R, 3, heads, d) -> (R, heads, d)."""
    runs = []
    for rows, i, context, j in _places(sides):
        lengths = zip(rows.lengths, context.lengths, strict=True)
        for (n, c), run in groupby(lengths):
            m = len(list(run))
            runs.append((m, slice(i, i + m * n), slice(j, j + m * c)))
            i, j = i + m * n, j + m * c
    out: Tensor = _Grouped.apply(qkv, runs, p)
    return out


class _Grouped(torch.autograd.Function):
    """runs: of m sequences beside each other that have equal lengths, m with their rows and their
    contexts'. Written out, as autograd would copy all of qkv for every run of them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, runs: list[tuple[int, slice, slice]], p: float) -> Tensor:
        out = torch.empty_like(qkv[:, 0])
        saved = []
        for m, a, b in runs:
            q, k, v = _heads(qkv[a, 0], m), _heads(qkv[b, 1], m), _heads(qkv[b, 2], m)
            weights = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5).softmax(-1)
            kept, scale = keep(weights, p)
            found = weights @ v if kept is None else ((weights * kept) @ v).mul_(scale)
            _heads(out[a], m).copy_(found)
            saved.append((weights, kept))
        ctx.runs, ctx.scale = runs, scale if runs else 1.0
        ctx.dropped = p > 0
        ctx.save_for_backward(qkv, *(t for pair in saved for t in pair if t is not None))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        qkv, *saved = ctx.saved_tensors
        out = torch.empty_like(qkv)
        left = iter(saved)
        for m, a, b in ctx.runs:
            weights = next(left)
            kept = next(left) if ctx.dropped else None
            q, k, v = _heads(qkv[a, 0], m), _heads(qkv[b, 1], m), _heads(qkv[b, 2], m)
            g, shown = _heads(grad[a], m), weights
            of_weights = g @ v.transpose(-1, -2)
            if kept is not None:
                of_weights = of_weights.mul_(kept).mul_(ctx.scale)
                shown = (weights * kept).mul_(ctx.scale)
            _heads(out[b, 2], m).copy_(shown.transpose(-1, -2) @ g)
            # The gradient of a softmax.
            of_weights.sub_((of_weights * weights).sum(-1, keepdim=True))
            of_score = of_weights.mul_(weights).mul_(q.shape[-1] ** -0.5)
            _heads(out[a, 0], m).copy_(of_score @ k)
            _heads(out[b, 1], m).copy_(of_score.transpose(-1, -2) @ q)
        return out, None, None


def _heads(x: Tensor, sequences: int) -> Tensor:
    """(m * n, heads, d) -> (m, heads, n, d), a view."""
    return x.unflatten(0, (sequences, len(x) // sequences)).transpose(1, 2)


# --- on request -----------------------------------------------------------------------------------


@torch.no_grad()
def _weights(qkv: Tensor, sides: Sequence[tuple[Rows, Rows]]) -> list[Tensor]:
    """The weights of each side, padded."""
    q, k, _ = qkv.unbind(1)
    return [
        _padded_weights(q[i : i + rows.total], k[j : j + context.total], rows, context)
        for rows, i, context, j in _places(sides)
    ]


def _padded_weights(q: Tensor, k: Tensor, rows: Rows, context: Rows) -> Tensor:
    a, b = rows.pad(q, max(rows.longest, 1)), context.pad(k, max(context.longest, 1))
    score = torch.einsum("mlhd,mchd->mhlc", a, b) / math.sqrt(q.shape[-1])
    there, seen = (
        torch.arange(x.shape[1], device=x.device) < r.length[:, None]
        for x, r in ((a, rows), (b, context))
    )
    weights = score.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    return weights * there[:, None, :, None]
