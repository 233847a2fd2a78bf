"""alternating: a step serves the masked objectives, matching or QA, as UNITER's do.

Only the matching steps have mismatched pairs, an exact share; only the masked ones have masks.
"""

from __future__ import annotations

from fractions import Fraction

from shards.order.apportionment import shares_of
from shards.order.modes.base import Family, Kind
from shards.order.settings import SamplerSettings


def alternating(settings: SamplerSettings) -> tuple[Family, ...]:
    weights = settings.families
    masked, matching, qa = shares_of((weights.masked, weights.matching, weights.qa))

    def kinds(name: str, questions: bool | None = None) -> tuple[Kind, ...]:
        return (Kind(name, questions, Fraction(1)),)

    return (
        Family("masked", masked, "never", True, kinds("masked")),
        Family("matching", matching, "exact", False, kinds("matching")),
        Family("qa", qa, "never", False, kinds("qa", questions=True)),
    )
