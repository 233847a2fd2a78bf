"""Where DeepSpeed keeps each parameter's fp32 master and Adam moments on this rank.

A fragment is a run of elements of one flattened parameter. Whatever the ZeRO stage, a rank's part
of the training state is a list of fragments; checkpoints hold fragments and nothing else, which is
why they reload at any world size and any stage. Layouts are those of deepspeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """name, start, count: the elements [start, start + count) of the flattened parameter.

    holder: the fp32 tensor that Adam updates and whose optimizer state is looked up; offset: of the
    fragment in the flattened holder. replicated: every rank holds the same (ZeRO 0).
    """

    name: str
    start: int
    count: int
    holder: Tensor
    offset: int
    replicated: bool = False


def list_fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments, in a fixed order."""
    return list(_fragments(engine))


def _fragments(engine: Any) -> Iterator[Fragment]:
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    names = engine.param_names
    if stage == 0:
        # fp32: Adam updates the parameters themselves; bf16: fp32 copies in the same order.
        masters = getattr(optimizer, "fp32_groups", None)
        if masters is None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    yield Fragment(names[p], 0, p.numel(), p, 0, True)
        else:
            for params, holders in zip(optimizer.fp16_groups, masters, strict=True):
                for p, holder in zip(params, holders, strict=True):
                    yield Fragment(names[p], 0, p.numel(), holder, 0, True)
    elif stage < 3:
        for group_index, holder in enumerate(optimizer.single_partition_of_fp32_groups):
            addresses = optimizer._param_slice_mappings[group_index]
            for p in optimizer.bit16_groups[group_index]:
                address = addresses.get(names[p])
                if address is not None and address.numel:
                    start = p._hp_mapping.lp_fragment_address.start
                    yield Fragment(names[p], start, address.numel, holder, address.start)
    else:
        rank = dist.get_rank()
        for params, holder in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            offset = 0
            for p in params:
                size = p.partition_numel()
                start = rank * size
                count = min(size, p.ds_numel - start)
                if count > 0:
                    yield Fragment(names[p], start, count, holder, offset)
                offset += size


def read(engine: Any, fragment: Fragment, kind: str) -> Tensor:
    """A view, 1-D fp32, of the fragment's master or moment (zeros before the first step)."""
    if kind == "master":
        whole = fragment.holder
    else:
        state = engine.basic_optimizer.state.get(fragment.holder)
        if not state:
            return torch.zeros(fragment.count)
        whole = state[kind]
    return whole.detach().view(-1).narrow(0, fragment.offset, fragment.count)


def write(engine: Any, fragment: Fragment, kind: str, values: Tensor, step: int) -> None:
    """Set the fragment's master or moment; `step` is Adam's count of finished steps."""
    if kind != "master" and not engine.basic_optimizer.state.get(fragment.holder):
        engine.basic_optimizer.state[fragment.holder] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.zeros_like(fragment.holder),
            "exp_avg_sq": torch.zeros_like(fragment.holder),
        }
    with torch.no_grad():
        read(engine, fragment, kind).copy_(values)


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Make the weights that the forward reads follow the masters; collective under ZeRO 1-3."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage == 0:
        for params, holders in zip(
            getattr(optimizer, "fp16_groups", []),
            getattr(optimizer, "fp32_groups", []),
            strict=True,
        ):
            for p, holder in zip(params, holders, strict=True):
                p.copy_(holder)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        for flat, holder in zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        ):
            flat.copy_(holder)
        # Small parameters stay gathered on every rank: gather them anew.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
