"""natural: one family of all pairs as they come; a coin of its own mismatches a pair."""

from __future__ import annotations

from fractions import Fraction

from shards.order.modes.base import Family, Kind
from shards.order.settings import SamplerSettings

_ONE = Fraction(1)


def natural(_settings: SamplerSettings) -> tuple[Family, ...]:
    return (Family("all", _ONE, "coin", True, (Kind("", None, _ONE),)),)
