"""balanced: one family; exact shares of questions and of mismatched pairs."""

from __future__ import annotations

from fractions import Fraction

from shards.order.modes.base import Family, Kind
from shards.order.settings import SamplerSettings


def balanced(settings: SamplerSettings) -> tuple[Family, ...]:
    asked = Fraction(str(settings.question_share))
    kinds = (Kind("question", True, asked), Kind("caption", False, 1 - asked))
    return (Family("all", Fraction(1), "exact", True, kinds),)
