"""One optimizer step: forward, backward and update over a rank's micro-batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from model.batch import Batch
from model.objectives.base import LossSettings
from shards.order.draws import fold
from trainer.ranks import all_reduce_sum

_DROPOUT = 100  # purpose of draws; shards and batches use lower ones


def train_step(
    engine: Any,
    batches: list[Batch],
    weights: dict[str, float],
    counts: dict[str, float],
    losses: LossSettings,
    seed: int,
) -> dict[str, float]:
    """Train on this rank's micro-batches; the loss sums over all ranks, by objective.

    The loss of an objective is its sum over the global batch / max(global count, 1), so it does
    not depend on how pairs are spread over ranks and micro-batches. seed: of dropout.
    """
    device = engine.device
    world = dist.get_world_size()
    engine.train()
    total = torch.zeros(len(weights), device=device)
    # DeepSpeed averages gradients over the ranks: undo it, the counts are global already.
    scale = torch.tensor(
        [w * world / max(counts[name], 1.0) for name, w in weights.items()], device=device
    )
    for i, batch in enumerate(batches):
        torch.manual_seed(fold(seed, i) >> 1)
        out = engine(batch.to(device), objectives=frozenset(weights), settings=losses)
        sums = torch.stack([out.loss_sum[name] for name in weights])
        engine.backward((scale * sums).sum(), scale_wrt_gas=False)
        engine.step()
        total += sums.detach()
    return dict(zip(weights, all_reduce_sum(total.double()).tolist(), strict=True))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout is drawn anew at each step and on each rank, and the same again after a restart."""
    return fold(seed, _DROPOUT, step, rank)
