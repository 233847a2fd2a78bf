"""What a mode of the sampler is: the families of steps that it has, and what each draws from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from shards.order.settings import SamplerSettings


@dataclass(frozen=True)
class Kind:
    """Pairs that a family draws from."""

    name: str
    """Of its streams; empty where the family has one kind of any pairs."""
    questions: bool | None
    """True: question pairs only; False: the others only; None: both."""
    share: Fraction
    """Of the family's pairs."""


@dataclass(frozen=True)
class Family:
    """Steps that serve the same objectives."""

    name: str
    """Of the family of objectives that its steps serve; "all" serves every one."""
    share: Fraction
    """Of the steps."""
    mismatch: Literal["coin", "exact", "never"]
    """How pairs get another image's sentence: each by a coin of its own with probability
    `mismatch`, as an exact share of the pairs, or not at all."""
    masks: bool
    """Whether words and objects are masked."""
    kinds: tuple[Kind, ...]


Mode = Callable[[SamplerSettings], tuple[Family, ...]]
