"""One optimizer step that is bitwise the same at every number of workers: `train.strict`.

A step is V micro-batches, whoever makes them. Each has dropout of its own, keyed by its number, and
its gradients are turned into whole numbers of 2^-44, whose sum does not depend on an order. What
follows is done by every rank for all gradients, or is one rounding an element, so that it does not
matter where a partition of ZeRO begins.

It holds among machines of one kind with the same cluster.cpus_per_worker: products of matrices
round otherwise with other processors, libraries or numbers of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.objectives.base import LossSettings
from shards.order.draws import fold
from trainer.checkpoint.zero_state import adam_state, list_fragments, refresh_weights
from trainer.ranks import all_reduce_sum
from trainer.step.laps import Laps
from trainer.step.optimizer import AdamW
from trainer.step.train_step import Updated

_UNIT = 2.0**-44
"""Of the sums. Of an fp32 gradient above 2^-20 all is kept, of a smaller one what is above the
unit, and sums may reach 2^18."""
_AT_ONCE = 1 << 24
"""Numbers that are summed over the ranks at a time."""


def strict_step(
    engine: Any,
    batches: Iterable[Batch],
    first: int,
    parts: int,
    weights: dict[str, float],
    counts: dict[str, float],
    losses: LossSettings,
    seed: int,
    clip_norm: float,
    riders: Sequence[float],
    laps: Laps,
) -> Updated:
    """Train on this rank's micro-batches, on the device, of which `first` is the first one's number
    among the step's `parts`, as train_step does. seed: of dropout, the same on every rank. riders:
    as there.
    """
    engine.train()
    parameters = dict(engine.module.named_parameters())
    total = torch.zeros(
        sum(p.numel() for p in parameters.values()), dtype=torch.int64, device=engine.device
    )
    # A slot for each loss of each micro-batch: adding zeros is exact, so the ranks' order is none.
    slots = torch.zeros(parts, len(weights), dtype=torch.float64)
    bad = torch.zeros(1, dtype=torch.float64)
    for number, batch in enumerate(batches, start=first):
        laps("copy")
        torch.manual_seed(fold(seed, number) >> 1)
        out = engine.module(batch, objectives=frozenset(weights), settings=losses)
        sums = torch.stack([out.loss_sum[name] for name in weights])
        scale = sums.new_tensor([w / max(counts[name], 1.0) for name, w in weights.items()])
        laps("forward")
        # Not backward(): its hooks are DeepSpeed's reduction.
        own = list(parameters.values())
        found = torch.autograd.grad((scale * sums).sum(), own, allow_unused=True)
        bad += not _add(total, found, own, parts)
        slots[number] = sums.detach().double().cpu()
        laps("backward")
    told = torch.cat([slots.flatten(), bad, torch.tensor(riders, dtype=torch.float64)])
    by_slot, any_bad, rode = all_reduce_sum(told).split([slots.numel(), 1, len(riders)])
    sums_of_all = by_slot.view(parts, -1).sum(dim=0).tolist()
    # Within bounds, a sum of gradients is finite, and so is its square.
    finite = not any_bad and all(map(math.isfinite, sums_of_all))
    norm = math.nan
    if finite:
        for piece in total.split(_AT_ONCE):
            all_reduce_sum(piece)
        units = dict(
            zip(parameters, total.split([p.numel() for p in parameters.values()]), strict=True)
        )
        laps("reduce")
        norm = _norm(units)
        # As by torch.nn.utils.clip_grad_norm_.
        clipping = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        _update(engine, units, _UNIT * clipping)
    laps("update")
    return Updated(dict(zip(weights, sums_of_all, strict=True)), finite, norm, rode.tolist())


def _add(
    total: Tensor, found: Sequence[Tensor | None], parameters: Sequence[Tensor], parts: int
) -> bool:
    """Add a micro-batch's gradients; whether they are finite and within bounds."""
    at, good = 0, torch.ones((), dtype=torch.bool, device=total.device)
    for g, p in zip(found, parameters, strict=True):
        if g is not None:
            units = g.detach().flatten().float() / _UNIT  # exact: a power of two
            good &= (units.abs() < 2.0**62 / parts).all()
            total[at : at + p.numel()] += units.round().to(torch.int64)
        at += p.numel()
    return bool(good)


def _norm(units: dict[str, Tensor]) -> float:
    """Of all gradients, in fp64, over the parameters in their order, of what every rank has."""
    squares = [float((part.double() * _UNIT).square_().sum()) for part in units.values()]
    return math.sqrt(math.fsum(squares))


@torch.no_grad()
def _update(engine: Any, units: dict[str, Tensor], unit: float) -> None:
    """Move this rank's part of the weights and moments. units: the whole gradient of each
    parameter, flat, as multiples of `unit`."""
    optimizer = engine.basic_optimizer
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    steps: dict[Tensor, Tensor] = {}
    for fragment in list_fragments(engine):
        holder, (name, start, length) = fragment.holder, fragment.span
        state = adam_state(engine, holder)
        if holder not in steps:
            steps[holder] = state["step"].add_(1)
        own = slice(fragment.offset, fragment.offset + length)
        views = [t.view(-1)[own] for t in (holder, state["exp_avg"], state["exp_avg_sq"])]
        _move(
            views,
            (units[name][start : start + length].double() * unit).float(),
            group_of[holder],
            int(steps[holder]) if isinstance(optimizer, AdamW) else None,
        )
    refresh_weights(engine)


def _move(state: Sequence[Tensor], grad: Tensor, group: Any, step: int | None) -> None:
    """torch's AdamW, or without `step` the BertAdam of optimizer.py, of one operation at a time:
    what is fused rounds otherwise at the end of a tensor than within it. state: weight and moments,
    which are changed."""
    weight, exp_avg, exp_avg_sq = state
    beta1, beta2 = group["betas"]
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(1 - beta2))
    if step is None:
        update = exp_avg / exp_avg_sq.sqrt().add_(group["eps"])
        weight.sub_(update.add_(weight * group["weight_decay"]).mul_(group["lr"]))
        return
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight.sub_((exp_avg / denominator).mul_(group["lr"] / (1 - beta1**step)))
