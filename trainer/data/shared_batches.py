"""Memory for batches that is used again and again, shared between a loader worker and its reader.

Fresh pages for 38 MB of features cost more than filling them. So batches are made in slots of one
shared mapping, sent as a slot's number, and read where they lie; a slot is free again when the last
tensor over it is gone. Nothing has a name in the file system: when its processes die, however they
die, the kernel takes the memory back.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch

_ALIGN = 64
_HUGE_PAGE = 2 << 20


Layout = list[tuple[str, str, tuple[int, ...], int]]
"""Of each field of a batch: name, dtype, shape, offset in bytes."""


@dataclass(frozen=True)
class Packed:
    """A batch in a slot."""

    slot: int
    layout: Layout


class SharedBatches:
    """`groups` times `count` slots of `size` bytes; a loader worker uses one group's. Slots that no
    other process uses are in huge pages, where the kernel gives them."""

    def __init__(self, groups: int, count: int, size: int, shared: bool = True) -> None:
        size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
        fd = os.memfd_create("lxscale-batches") if shared else -1
        if shared:
            os.ftruncate(fd, groups * count * size + _HUGE_PAGE)
        self._attach(groups, count, size, fd)

    def _attach(self, groups: int, count: int, size: int, fd: int) -> None:
        self._shape, self._fd = (groups, count, size), fd
        flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(fd, groups * count * size + _HUGE_PAGE, flags=flags)
        if fd < 0:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            weakref.finalize(self, os.close, fd)
        # One byte a slot says whether it is in use: set by the process that fills it, cleared by
        # the one that has read it. No lock is needed, as one worker fills the slots of a group.
        self._busy = np.frombuffer(self._memory, np.uint8, groups * count)

    def __getstate__(self) -> Any:
        return (self._shape, reduction.DupFd(self._fd))

    def __setstate__(self, state: Any) -> None:
        (groups, count, size), fd = state
        self._attach(groups, count, size, fd.detach())

    @property
    def shared(self) -> bool:
        """Whether other processes can read the slots."""
        return self._fd >= 0

    def take(self, group: int) -> int | None:
        """A free slot, now in use; None if all are."""
        _, count, _ = self._shape
        free = np.flatnonzero(self._busy[group * count : (group + 1) * count] == 0)
        if not len(free):
            return None
        slot = group * count + int(free[0])
        self._busy[slot] = 1
        return slot

    def release(self, slot: int) -> None:
        self._busy[slot] = 0

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """The bytes of a slot."""
        size = self._shape[2]
        return np.frombuffer(self._memory, np.uint8, size, _HUGE_PAGE + slot * size)

    def read(self, packed: Packed) -> Batch:
        """The batch, in place; its slot is free again when no tensor of it is left."""
        root = self.memory(packed.slot)
        # Every view keeps its root, and so does a tensor over a view.
        weakref.finalize(root, self.release, packed.slot)
        found: dict[str, torch.Tensor] = {}
        for name, dtype, shape, offset in packed.layout:
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            found[name] = torch.from_numpy(root[offset : offset + count].view(dtype)).view(shape)
        return Batch(**found)


Empty = Callable[[tuple[int, ...], str], torch.Tensor]
"""Shape and NumPy's name of a type -> an uninitialised tensor."""


def fresh_memory(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.empty(shape, dtype))


def make_in_slot(
    slots: SharedBatches, group: int, make: Callable[[Empty], Batch]
) -> Packed | Batch:
    """A batch made in a slot of the group; as it is where no slot is free or large enough. Where no
    other process will read it, only its features are in the slot.

    make: gets the function that gives the memory of the features.
    """
    slot = slots.take(group)
    if slot is None:
        return make(fresh_memory)
    memory = slots.memory(slot)
    used = 0

    def empty(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        # Features, nearly all of a batch, are gathered where they will be read: no copy.
        nonlocal used
        used = np.dtype(dtype).itemsize * int(np.prod(shape))
        if used > len(memory):
            used = 0
            return fresh_memory(shape, dtype)
        return torch.from_numpy(memory[:used].view(dtype)).view(shape)

    try:
        batch = make(empty)
    except BaseException:
        slots.release(slot)
        raise
    if not slots.shared:
        weakref.finalize(memory, slots.release, slot)
        return batch
    layout = _pack(batch, memory, used) if used else None
    if layout:
        return Packed(slot, layout)
    # The slot is given back, so nothing of the batch may stay in it.
    if batch.features.data_ptr() == memory.ctypes.data:
        batch = replace(batch, features=batch.features.clone())
    slots.release(slot)
    return batch


def _pack(batch: Batch, memory: NDArray[np.uint8], used: int) -> Layout | None:
    """Copy all but the features, which fill the first `used` bytes, behind them; None where that
    does not fit."""
    features = batch.features.numpy()
    layout: Layout = [("features", str(features.dtype), features.shape, 0)]
    end = used
    for f in fields(batch):
        tensor = getattr(batch, f.name)
        if f.name == "features" or tensor is None:
            continue
        array = tensor.numpy()
        at = -(-end // _ALIGN) * _ALIGN
        end = at + array.nbytes
        if end > len(memory):
            return None
        layout.append((f.name, str(array.dtype), array.shape, at))
        memory[at:end] = array.reshape(-1).view(np.uint8)
    return layout
