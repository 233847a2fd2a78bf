"""Where DeepSpeed keeps each parameter's fp32 master and Adam moments on this rank.

Whatever the ZeRO stage, a rank's part of the training state is a list of fragments: runs of
elements of flattened parameters. Checkpoints hold fragments and nothing else, which is why they
reload at any world size and any stage. Layouts are those of deepspeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.format import Span


@dataclass(frozen=True)
class Fragment:
    """Elements of one parameter whose state this rank holds, and where it holds them."""

    span: Span
    holder: Tensor
    """The fp32 tensor that Adam updates, and under which it keeps its state; the moments have the
    holder's shape."""
    offset: int
    """Of the span in the flattened holder and moments."""
    replicated: bool = False
    """Every rank holds the same (ZeRO 0)."""


# --- finding ------------------------------------------------------------------------------------


def list_fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments, in a fixed order."""
    stage = engine.zero_optimization_stage()
    layout = _replicated if stage == 0 else _of_flat_groups if stage < 3 else _of_parameters
    return list(layout(engine))


def _replicated(engine: Any) -> Iterator[Fragment]:
    """ZeRO 0: every rank holds every parameter whole."""
    for p, holder in _pairs_with_masters(engine):
        yield Fragment(Span(engine.param_names[p], 0, p.numel()), holder, 0, replicated=True)


def _pairs_with_masters(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """ZeRO 0: (parameter, holder). In fp32 nothing is wrapped around Adam, which updates the
    parameters themselves. In bf16 DeepSpeed gives Adam fp32 copies in their place, and only the
    order of the two lists says which copy is whose."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        for group in optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)
        return
    for params, holders in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(params, holders, strict=True)


def _of_flat_groups(engine: Any) -> Iterator[Fragment]:
    """ZeRO 1 and 2: the parameters of a group, laid end to end and padded, are cut into one equal
    part a rank, so that a cut may go through a parameter.

    Both ends of the mapping are DeepSpeed's own. Adding up sizes would give the same only while
    its options for order (round robin), alignment and padding stay as they are.
    """
    optimizer = engine.optimizer
    for group, holder in enumerate(optimizer.single_partition_of_fp32_groups):
        # Name → address in this rank's part; parameters that lie in others' are not in it.
        in_part = optimizer._param_slice_mappings[group]
        for p in optimizer.bit16_groups[group]:
            name = engine.param_names[p]
            address = in_part.get(name)
            if address is not None and address.numel:
                # lp_fragment_address: the same elements, counted from the parameter's first.
                start = p._hp_mapping.lp_fragment_address.start
                yield Fragment(Span(name, start, address.numel), holder, address.start)


def _of_parameters(engine: Any) -> Iterator[Fragment]:
    """ZeRO 3: each parameter is cut by itself into one equal part a rank, the last ones padded;
    a holder has this rank's parts of the parameters of one sub-group, end to end."""
    optimizer = engine.optimizer
    rank = dist.get_rank()
    for params, holder in zip(
        optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        offset = 0
        for p in params:
            size = p.partition_numel()
            start = rank * size
            # What the last ranks hold of a small parameter may be padding only.
            count = min(size, p.ds_numel - start)
            if count > 0:
                yield Fragment(Span(engine.param_names[p], start, count), holder, offset)
            # The padding has its room in the holder all the same.
            offset += size


# --- reading and writing ------------------------------------------------------------------------


def read(engine: Any, fragment: Fragment, kind: str) -> Tensor:
    """A view, 1-D fp32, of the fragment's master or moment (zeros before the first step)."""
    if kind == "master":
        whole = fragment.holder
    else:
        state = engine.basic_optimizer.state.get(fragment.holder)
        if not state:
            return torch.zeros(fragment.span.length)
        whole = state[kind]
    return whole.detach().view(-1).narrow(0, fragment.offset, fragment.span.length)


def adam_state(engine: Any, holder: Tensor) -> dict[str, Tensor]:
    """Of a holder, with its count of updates: made here if there is none yet, as Adam itself makes
    its state at its first step only."""
    state: dict[str, Tensor] = engine.basic_optimizer.state[holder]
    if not state:
        state["step"] = torch.tensor(0.0, device=holder.device)  # where a fused Adam wants it
        state["exp_avg"] = torch.zeros_like(holder)
        state["exp_avg_sq"] = torch.zeros_like(holder)
    return state


def write(
    engine: Any, fragment: Fragment, kind: str, values: Tensor, step: int, start: int = 0
) -> None:
    """Set the elements of the fragment's master or moment from `start` on to values, 1-D fp32.

    step: Adam's count of the updates that it has made.
    """
    if kind != "master":
        state = adam_state(engine, fragment.holder)
        # Every time: a damaged generation that was given up may have set another count.
        state["step"] = torch.full_like(state["step"], step)
    read(engine, fragment, kind).narrow(0, start, len(values)).copy_(values)


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Make the weights that the forward reads follow the masters; collective under ZeRO 1-3.

    DeepSpeed copies masters to weights at the end of a step only, and the first forward comes
    before it.
    """
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage == 0:
        for p, holder in _pairs_with_masters(engine):
            if p is not holder:
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
        # Small parameters stay gathered on every rank between steps, in copies that do not follow
        # their parts: drop the copies without writing them back, and gather them anew.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
