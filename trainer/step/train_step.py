"""One optimizer step: forward, backward and update over a rank's micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from model.batch import Batch
from model.objectives.base import LossSettings
from shards.order.draws import fold
from shards.order.keys import Purpose
from trainer.ranks import all_reduce_sum
from trainer.step.copying import to_device
from trainer.step.laps import Laps

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Updated:
    """What a step has done, the same on every rank."""

    sums: dict[str, float]
    """The losses' sums over all ranks, by objective."""
    updated: bool
    """Whether weights and moments were."""
    norm: float
    """Of the gradients before clipping; not finite where that says why they were not."""
    riders: list[float]
    """Sums over all ranks of the numbers that went along."""


def train_step(
    engine: Any,
    batches: Iterable[Batch],
    weights: dict[str, float],
    counts: dict[str, float],
    losses: LossSettings,
    seed: int,
    riders: Sequence[float],
    laps: Laps,
) -> Updated:
    """Train on this rank's micro-batches, which are on the device. There is no update, on no rank,
    where a loss or the norm of the gradients is not finite on any.

    The loss of an objective is its sum over the global batch / max(global count, 1), so it does
    not depend on how pairs are spread over ranks and micro-batches. seed: of dropout. riders:
    numbers that are summed over the ranks with the losses.
    """
    world = dist.get_world_size()
    engine.train()
    total = torch.zeros(len(weights), device=engine.device)
    # DeepSpeed averages gradients over the ranks: undo it, the counts are global already.
    scales = [w * world / max(counts[name], 1.0) for name, w in weights.items()]
    given = to_device([*scales, *riders], engine.device)
    scale, along = given[: len(scales)].float(), given[len(scales) :]
    for i, batch in enumerate(batches):
        laps("copy")
        if i:
            engine.step()  # DeepSpeed counts the micro-batches by it
        torch.manual_seed(fold(seed, i) >> 1)
        out = engine(batch, objectives=frozenset(weights), settings=losses)
        sums = torch.stack([out.loss_sum[name] for name in weights])
        laps("forward")
        engine.backward((scale * sums).sum(), scale_wrt_gas=False)
        total += sums.detach()
        laps("backward")
    # Before the update, so that all ranks know whether there is to be one.
    sums = torch.cat([total.double(), _unchecked_square(engine).double(), along])
    told = all_reduce_sum(sums).tolist()
    sums_of_all, square, rode = told[: len(weights)], told[len(weights)], told[len(weights) + 1 :]
    laps("reduce")
    finite = square <= _LARGEST and all(map(math.isfinite, sums_of_all))
    # DeepSpeed goes through its step all the same, which clears the gradients.
    engine.basic_optimizer.hold = not finite
    engine.step()
    updated = finite and bool(engine.was_step_applied())
    norm = engine.get_global_grad_norm()
    norm = math.sqrt(square) if norm is None else float(norm)
    laps("update")
    return Updated(dict(zip(weights, sums_of_all, strict=True)), updated, norm, rode)


def _unchecked_square(engine: Any) -> torch.Tensor:
    """This rank's part of the square of the gradients' norm, (1,), where DeepSpeed does not look
    itself whether that is finite in fp32: under ZeRO 3, whose norm is in fp64, and 0 in fp32. 0
    elsewhere; there `was_step_applied` says what it found.

    The square may overflow where every gradient is finite. Clipping would then make all of them 0,
    or Adam have an infinite moment.
    """
    optimizer, share = engine.optimizer, 1.0
    if engine.zero_optimization_stage() == 3:
        grads = [g for group in optimizer.averaged_gradients.values() for g in group]
    elif optimizer is engine.basic_optimizer:
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        share = 1.0 / dist.get_world_size()  # every rank has all of them
    else:
        grads = []
    if not grads:
        return torch.zeros(1, device=engine.device)
    norms = torch.stack([torch.linalg.vector_norm(g) for g in grads]).float()
    return norms.square().sum().reshape(1) * share


def dropout_seed(seed: int, step: int, *rank: int) -> int:
    """Dropout is drawn anew at each step, on each rank where it is given, and the same again after
    a restart."""
    return fold(seed, Purpose.DROPOUT, step, *rank)
