"""Multi-head attention among packed rows (packing.py), over true lengths."""

from __future__ import annotations

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropout import dropout
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

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, H) -> query, key and value of each row, (R, heads, H / heads)."""
        parts = (self.query, self.key, self.value)
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return q, k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Rows,
        context: Rows,
        attention_out: list[Tensor] | None,
    ) -> Tensor:
        """Each sequence's queries, in `rows`, over its keys and values, in `context` -> (R, H).

        attention_out: collects the weights (M, heads, L, C), zero where padded.
        """
        p = self.dropout if self.training else 0.0
        if attention_out is not None:
            attention_out.append(_weights(q, k, rows, context))
        over = _nested if q.is_cuda else _grouped
        return over(q, k, v, rows, context, p).flatten(1)


def _nested(q: Tensor, k: Tensor, v: Tensor, rows: Rows, context: Rows, p: float) -> Tensor:
    """One kernel for sequences of any lengths, where the device has such."""
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x, r.end, min_seqlen=0, max_seqlen=max(r.longest, 1)
        ).transpose(1, 2)
        for x, r in ((q, rows), (k, context), (v, context))
    )
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    values: Tensor = out.transpose(1, 2).values()
    return values


def _grouped(q: Tensor, k: Tensor, v: Tensor, rows: Rows, context: Rows, p: float) -> Tensor:
    """Sequences of equal lengths, where they lie beside each other, as one batch of matrices."""
    runs = _runs(rows, context)
    here, there = [m * n for m, n, _ in runs], [m * c for m, _, c in runs]
    parts = zip(runs, q.split(here), k.split(there), v.split(there), strict=True)
    out = [_attention(_heads(a, m), _heads(b, m), _heads(c, m), p) for (m, _, _), a, b, c in parts]
    return torch.cat(out) if out else q[:0]


def _runs(rows: Rows, context: Rows) -> list[tuple[int, int, int]]:
    """How many sequences beside each other have the same lengths, these and their contexts'."""
    pairs = zip(rows.lengths, context.lengths, strict=True)
    return [(len(list(run)), *lengths) for lengths, run in groupby(pairs)]


def _heads(x: Tensor, sequences: int) -> Tensor:
    """(m * n, heads, d) -> (m, heads, n, d)."""
    return x.unflatten(0, (sequences, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """(m, heads, n, d) over (m, heads, c, d) -> (m * n, heads, d)."""
    score = q @ k.transpose(-1, -2)
    weights = dropout((score / math.sqrt(q.shape[-1])).softmax(-1), p)
    return (weights @ v).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _weights(q: Tensor, k: Tensor, rows: Rows, context: Rows) -> Tensor:
    a, b = rows.pad(q, max(rows.longest, 1)), context.pad(k, max(context.longest, 1))
    score = torch.einsum("mlhd,mchd->mhlc", a, b) / math.sqrt(q.shape[-1])
    there, seen = (
        torch.arange(x.shape[1], device=x.device) < r.length[:, None]
        for x, r in ((a, rows), (b, context))
    )
    weights = score.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    return weights * there[:, None, :, None]
