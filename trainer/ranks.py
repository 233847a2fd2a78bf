"""What ranks tell each other. Without a process group, as in an evaluation, there is one rank."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from shards.processes import boot_id

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def this_node() -> str:
    """A name of this rank's machine, the same in all ranks there."""
    return f"{boot_id()} {socket.gethostname()}"


def ranks_by_node() -> list[list[int]]:
    """The ranks of each machine; machines in the order of their first ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(gather_objects(this_node()) if dist.is_initialized() else [""]):
        nodes.setdefault(name, []).append(rank)
    return list(nodes.values())


def ranks_of_node() -> int:
    """How many of the ranks are on this rank's machine."""
    return len(next(ranks for ranks in ranks_by_node() if rank_and_world()[0] in ranks))


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    return begin_all_reduce_sum(values)()


def begin_all_reduce_sum(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to sum over the ranks, in place; what is returned waits for the sums. All ranks begin
    their collectives in one order."""
    work: dist.Work | None = None
    if dist.is_initialized() and dist.get_world_size() > 1:
        work = dist.all_reduce(values, async_op=True)

    def sums() -> torch.Tensor:
        if work:
            work.wait()
        return values

    return sums


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, on every rank. group: of all ranks, for a thread of its own."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value, group=group)
    return told


def from_rank_0(action: Callable[[], T]) -> T:
    """Run on rank 0 and tell all; an error of rank 0's is raised on every rank."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def raise_from_rank_0(error: Exception | None) -> NoReturn:
    """Raise rank 0's error on every rank. error: not looked at on the others."""
    told: list[Any] = [error]
    dist.broadcast_object_list(told, src=0)
    raise told[0]
