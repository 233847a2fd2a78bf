"""Attention among packed rows on a GPU: each head of a short sequence is one tile of one kernel.

LXMERT's sequences have tens of rows, where kernels for long ones leave most of their tile empty and
ask for copies of query, key and value. Here a program reads its three tiles where the projection
wrote them, has the whole softmax in registers, and keeps nothing for the backward, which computes
the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.dropout import dropped_of
from model.packing import Rows

LONGEST = 128
"""Rows of a sequence at most: more do not fit a program's registers."""


def fits(parts: Sequence[Rows], head_size: int) -> bool:
    """Whether these kernels take such sequences and heads."""
    return max(part.longest for part in parts) <= LONGEST and head_size in (16, 32, 64, 128)


def tiled(qkv: Tensor, parts: Sequence[Rows], p: float) -> Tensor:
    """qkv (R, 3, heads, d) -> (R, heads, d). One part: its sequences attend to themselves; two, one
    after the other: each sequence to the other part's."""
    seed = torch.randint(2**62, (1,), device=qkv.device) if p else _no_seed(qkv.device)
    out: Tensor = _attend(
        qkv,
        seed,
        [part.start for part in parts],
        [part.length for part in parts],
        [part.total for part in parts],
        [part.longest for part in parts],
        p,
    )
    return out


def _no_seed(device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=device)


# --- the operator: one for eager and compiled code ------------------------------------------------


@torch.library.custom_op("lxscale::attend", mutates_args=())
def _attend(
    qkv: Tensor,
    seed: Tensor,
    starts: Sequence[Tensor],
    lengths: Sequence[Tensor],
    totals: Sequence[int],
    longest: Sequence[int],
    p: float,
) -> Tensor:
    out = torch.empty_like(qkv[:, 0])
    for grid, places, sizes in _sides(qkv, starts, lengths, totals, longest, p):
        _forward[grid](qkv, out, seed, *places, **sizes)
    return out


@torch.library.custom_op("lxscale::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    qkv: Tensor,
    seed: Tensor,
    starts: Sequence[Tensor],
    lengths: Sequence[Tensor],
    totals: Sequence[int],
    longest: Sequence[int],
    p: float,
) -> Tensor:
    out, grad = torch.empty_like(qkv), grad.contiguous()
    for grid, places, sizes in _sides(qkv, starts, lengths, totals, longest, p):
        _backward[grid](grad, qkv, out, seed, *places, **sizes)
    return out


@_attend.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv[:, 0])


@_attend_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, seed, starts, lengths, ctx.totals, ctx.longest, ctx.p = inputs
    ctx.save_for_backward(qkv, seed, *starts, *lengths)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    qkv, seed, *rows = ctx.saved_tensors
    starts, lengths = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    found = _attend_backward(grad, qkv, seed, starts, lengths, ctx.totals, ctx.longest, ctx.p)
    none = [None] * len(starts)
    return found, None, none, none, None, None, None


_attend.register_autograd(_gradient, setup_context=_keep)


def _sides(
    qkv: Tensor,
    starts: Sequence[Tensor],
    lengths: Sequence[Tensor],
    totals: Sequence[int],
    longest: Sequence[int],
    p: float,
) -> Iterator[tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]]:
    """Each part as queries: the grid, where queries and contexts lie, and what is compiled in."""
    heads, size = qkv.shape[2:]
    firsts = [0, totals[0]][: len(totals)]
    for a, b in zip(range(len(totals)), reversed(range(len(totals))), strict=True):
        places = (starts[a], lengths[a], firsts[a], starts[b], lengths[b], firsts[b])
        q, k = (max(16, triton.next_power_of_2(longest[i])) for i in (a, b))
        sizes = {"HEADS": heads, "SIZE": size, "Q": q, "K": k, "DROPPED": dropped_of(p)}
        if len(lengths[a]):
            yield (
                (heads, len(lengths[a])),
                (*places, size**-0.5),
                sizes | {"num_warps": min(8, max(2, q * k // 1024))},
            )


# --- the kernels ----------------------------------------------------------------------------------


@triton.jit
def _weights(q, k, context, scale, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The softmax of a tile, (Q, K), 0 where there is no context."""
    score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    score = tl.where(tl.arange(0, K)[None, :] < context, score, float("-inf"))
    weights = tl.exp(score - tl.max(score, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _kept(seed, Q: tl.constexpr, K: tl.constexpr, DROPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(Q, K): 1 / (1 - p) where a weight is kept, else 0. An element has 16 bits by its sequence,
    head, row and column, whatever the tile's size."""
    head, m = tl.program_id(0), tl.program_id(1)
    stream = tl.load(seed) + m * tl.num_programs(0) + head
    eights = tl.arange(0, Q)[:, None] * 16 + tl.arange(0, K // 8)[None, :]
    a, b, c, d = tl.randint4x(stream, eights)
    four = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32, bitcast=True)
    drawn = tl.reshape(tl.join(four & 0xFFFF, four >> 16), (Q, K))
    return tl.where(drawn >= DROPPED, 65536.0 / (65536 - DROPPED), 0.0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv,
    out,
    seed,
    q_start,
    q_length,
    q_first,
    k_start,
    k_length,
    k_first,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    DROPPED: tl.constexpr,
):
    head, m = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = HEADS * SIZE
    n, c = tl.load(q_length + m), tl.load(k_length + m)
    rows = (tl.load(q_start + m) + q_first + tl.arange(0, Q))[:, None]
    columns = (tl.load(k_start + m) + k_first + tl.arange(0, K))[:, None]
    depth = (head * SIZE + tl.arange(0, SIZE))[None, :]
    there, seen = tl.arange(0, Q)[:, None] < n, tl.arange(0, K)[:, None] < c
    q = tl.load(qkv + rows * (3 * width) + depth, there, 0.0)
    k = tl.load(qkv + columns * (3 * width) + width + depth, seen, 0.0)
    v = tl.load(qkv + columns * (3 * width) + 2 * width + depth, seen, 0.0)
    weights = _weights(q, k, c, scale, K)
    if DROPPED > 0:
        weights *= _kept(seed, Q, K, DROPPED)
    found = tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
    tl.store(out + rows * width + depth, found.to(v.dtype), there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad,
    qkv,
    out,
    seed,
    q_start,
    q_length,
    q_first,
    k_start,
    k_length,
    k_first,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    DROPPED: tl.constexpr,
):
    head, m = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = HEADS * SIZE
    n, c = tl.load(q_length + m), tl.load(k_length + m)
    rows = (tl.load(q_start + m) + q_first + tl.arange(0, Q))[:, None]
    columns = (tl.load(k_start + m) + k_first + tl.arange(0, K))[:, None]
    depth = (head * SIZE + tl.arange(0, SIZE))[None, :]
    there, seen = tl.arange(0, Q)[:, None] < n, tl.arange(0, K)[:, None] < c
    at_q = rows * (3 * width) + depth
    at_k = columns * (3 * width) + width + depth
    q = tl.load(qkv + at_q, there, 0.0)
    k = tl.load(qkv + at_k, seen, 0.0)
    v = tl.load(qkv + at_k + width, seen, 0.0)
    # 0 past the last row, so that these rows add nothing to what follows.
    g = tl.load(grad + rows * width + depth, there, 0.0)
    weights = _weights(q, k, c, scale, K)
    of_weights = tl.dot(g, tl.trans(v), input_precision="tf32x3")
    shown = weights
    if DROPPED > 0:
        kept = _kept(seed, Q, K, DROPPED)
        of_weights *= kept
        shown *= kept
    of_v = tl.dot(tl.trans(shown.to(g.dtype)), g, input_precision="tf32x3")
    tl.store(out + at_k + width, of_v.to(g.dtype), seen)
    mean = tl.sum(of_weights * weights, 1)[:, None]
    of_score = (weights * (of_weights - mean) * scale).to(g.dtype)
    tl.store(out + at_q, tl.dot(of_score, k, input_precision="tf32x3").to(g.dtype), there)
    of_k = tl.dot(tl.trans(of_score), q, input_precision="tf32x3")
    tl.store(out + at_k, of_k.to(g.dtype), seen)
