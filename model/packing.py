"""Packed rows: sequences one after the other in a tensor (R, …), with no padding between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.errors import ModelError


@dataclass(frozen=True)
class Rows:
    """Where M sequences lie in R packed rows. `total` and `longest` are the host's, so that nothing
    waits for a device to tell them."""

    length: Tensor
    """i64[M] rows of each."""
    total: int
    """R."""
    longest: int
    """Of `length`; 0 where there is none."""

    @cached_property
    def end(self) -> Tensor:
        """i64[M+1]: 0, then the end of each sequence."""
        zero = self.length.new_zeros(1)
        return torch.cat([zero, self.length.cumsum(0)])

    @cached_property
    def start(self) -> Tensor:
        """i64[M] the first row of each."""
        return self.end[:-1]

    @cached_property
    def sequence(self) -> Tensor:
        """i64[R] the sequence that each row is of."""
        number = torch.arange(len(self.length), device=self.length.device)
        return torch.repeat_interleave(number, self.length, output_size=self.total)

    @cached_property
    def place(self) -> Tensor:
        """i64[R] each row's place in its sequence."""
        return torch.arange(self.total, device=self.length.device) - self.start[self.sequence]

    @cached_property
    def lengths(self) -> list[int]:
        """`length` on the host, which waits for a device."""
        found: list[int] = self.length.tolist()
        return found

    def row_of(self, position: Tensor, width: int) -> Tensor:
        """i64 the rows of places that are given as flat indices into (M, width)."""
        return row_of(self.start, position, width)

    def pad(self, x: Tensor, width: int) -> Tensor:
        """Packed (R, …) -> padded with zeros (M, width, …)."""
        out = x.new_zeros(len(self.length), width, *x.shape[1:])
        out[self.sequence, self.place] = x
        return out


def row_of(start: Tensor, position: Tensor, width: int) -> Tensor:
    """i64 the rows of flat indices into (M, width), where each of M begins at i64[M] `start`."""
    return start[position // width] + position % width


def rows_of_mask(mask: Tensor) -> Rows:
    """The rows of a padded (M, L), where a bool mask of that shape is True. ModelError where what
    is padded is not last: places are counted from the first."""
    length = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < length[:, None]):
        raise ModelError("a mask has padding before what is real: put the padding last")
    return Rows(length, int(length.sum()), int(length.max()) if len(length) else 0)


def take(x: Tensor, row: Tensor) -> Tensor:
    """x[row] of x (R, H), whose gradient is a sum for each row, quick on every device."""
    return torch.nn.functional.embedding(row, x)
