"""To the device without the host's waiting for it: batches, each copied while the one before it is
used, and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch

from model.batch import Batch


def copied(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device, in their order, to go through once. The copy of the first begins
    now, that of each other one before the batch before it is handed out; on a GPU on a stream of
    their own, so it takes no time of the computation's where a batch is pinned."""
    begun = map(partial(_begin, device=device), batches)
    return _one_ahead(next(begun, None), begun)


def to_device(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """f64 of them on the device."""
    here = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def _one_ahead(
    copy: Callable[[], Batch] | None, others: Iterator[Callable[[], Batch]]
) -> Iterator[Batch]:
    while copy:
        following = next(others, None)
        yield copy()
        copy = following


def _begin(batch: Batch, device: torch.device) -> Callable[[], Batch]:
    """Begin to copy a batch; call what is returned for the copy, where it is used."""
    if device.type != "cuda":
        there = batch.to(device)
        return lambda: there
    stream = _stream(device)
    with torch.cuda.stream(stream):
        there = batch.to(device)
        done = stream.record_event()

    def copy() -> Batch:
        user = torch.cuda.current_stream(device)
        user.wait_event(done)
        there.record_stream(user)
        return there

    return copy


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
