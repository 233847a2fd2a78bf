"""The streams that a sampler draws from: which pairs, how they are mixed, in exact shares.

A stream is an endless order over some sources of one data set: when it is exhausted it goes on
with its own next epoch. Streams of one family are mixed within each step, by exact shares
(shards/order/apportionment.py); families alternate step by step:

    natural      one family; streams for data sets and groups of sources of equal weight. A pair
                 is mismatched with probability `mismatch`, by a coin of its own
    balanced     one family; questions and captions apart, `question_share` of the pairs questions
                 and `mismatch` of them mismatched, exactly
    alternating  a family each for the masked objectives, matching and QA: a step serves one of
                 them, as UNITER's do; `mismatch` of the matching pairs are mismatched, exactly
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

from shards.errors import DataError
from shards.order.apportionment import shares_of
from shards.order.draws import I64

FAMILIES = ("masked", "matching", "qa")


@dataclass(frozen=True)
class SamplerSettings:
    """Every setting that changes the order; all of them enter the data state's fingerprint.

    mode:           `natural` | `balanced` | `alternating`
    seed:           of the order and of every draw
    window:         shards per shuffle window; 0 = all (an exact global shuffle)
    mismatch:       natural: probability; else: exact share of mismatched pairs
    question_share: balanced only: exact share of question pairs
    source_weights: how often pairs of a source come, against 1 for those not named
    families:       alternating only: weights of FAMILIES
    sentences_per_visit: neighbouring pairs of a shard, most of one image, that come together
    last_batch:     `wrap`: a batch may span two epochs; `short`: an epoch's last batch is short
    """

    mode: Literal["natural", "balanced", "alternating"] = "natural"
    seed: int = 0
    window: int = 0
    mismatch: float = 0.5
    question_share: float = 0.5
    source_weights: tuple[tuple[str, float], ...] = ()
    families: tuple[float, float, float] = (1.0, 1.0, 1.0)
    sentences_per_visit: int = 1
    last_batch: Literal["wrap", "short"] = "wrap"


@dataclass(frozen=True)
class ShardRange:
    """One of the data sets that a run draws from: its shards are [begin, end) of the whole's.

    weight: its share against the other parts', None = by its pairs
    """

    name: str
    begin: int
    end: int
    weight: float | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless order over some sources of a part; `sizes[i]` of its pairs are in shard i."""

    name: str
    family: int
    part: int
    sources: tuple[int, ...]
    sizes: I64
    share: Fraction
    """Of its family's pairs."""
    key: int
    """Number that keys its order, equal where the same pairs come in the same order."""
    questions: bool = False
    pairs: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", int(self.sizes.sum()))


def streams_of(
    settings: SamplerSettings,
    pairs_per_source: Sequence[dict[str, int]],
    sources: Sequence[str],
    questions: Sequence[str],
    parts: Sequence[ShardRange] = (),
) -> tuple[Stream, ...]:
    """The streams of a data set, given each shard's number of pairs per source.

    Raises DataError where the settings ask for pairs that there are none of.
    """
    parts = parts or (ShardRange("all", 0, len(pairs_per_source)),)
    names = list(sources)
    weights = dict(settings.source_weights)
    if unknown := set(weights) - set(names):
        raise DataError(
            f"sampler.source_weights names {', '.join(sorted(unknown))}, but the data set has "
            f"{', '.join(names)}: correct the name"
        )
    table = np.zeros((len(pairs_per_source), len(names)), dtype=np.int64)
    for i, shard in enumerate(pairs_per_source):
        for name, pairs in shard.items():
            table[i, names.index(name)] = pairs
    if not table.sum():
        raise DataError("the data set holds no pairs: build it from sources that have sentences")
    one = Fraction(1)
    kinds: list[tuple[int, str, tuple[bool, ...], Fraction]]  # family, name, questions?, share
    if settings.mode == "natural":
        kinds = [(0, "", (True, False), one)]
    elif settings.mode == "balanced":
        asked = Fraction(str(settings.question_share))
        kinds = [(0, "question", (True,), asked), (0, "caption", (False,), one - asked)]
    else:
        kinds = [
            (i, name, (True,) if name == "qa" else (True, False), one)
            for i, name in enumerate(FAMILIES)
            if settings.families[i] > 0
        ]
    streams: list[Stream] = []
    for family, kind, wanted, share in kinds:
        if share <= 0:
            continue
        members = [s for s in names if (s in questions) in wanted and weights.get(s, 1.0) > 0]
        found = _streams_of_kind(settings, table, names, parts, members, weights)
        if not found:
            raise DataError(
                f"the sampler wants {kind or 'some'} pairs, but the data set has none (sources: "
                f"{', '.join(names)}): change sampler.question_share, sampler.families or "
                "sampler.source_weights, or use sampler.mode=natural"
            )
        shares = shares_of([weight for *_, weight in found])
        for (part, group, sizes, _), own in zip(found, shares, strict=True):
            label = [kind, parts[part].name if len(parts) > 1 else ""]
            label.append("+".join(group) if len(group) < len(members) else "")
            streams.append(
                Stream(
                    "/".join(x for x in label if x) or "all",
                    family,
                    part,
                    tuple(names.index(s) for s in group),
                    sizes,
                    own * share,
                    len(streams),
                    wanted == (True,),
                )
            )
    if settings.last_batch == "short" and len(streams) > 1:
        raise DataError(
            "sampler.last_batch=short needs one stream, whose epochs end for all pairs at once: "
            "use it with sampler.mode=natural, one data set and no source weights"
        )
    return tuple(streams)


def _streams_of_kind(
    settings: SamplerSettings,
    table: I64,
    names: list[str],
    parts: Sequence[ShardRange],
    members: list[str],
    weights: dict[str, float],
) -> list[tuple[int, list[str], I64, Fraction]]:
    """(part, sources, sizes, weight) of each stream: a part's sources of equal weight are one."""
    found: list[tuple[int, list[str], I64, Fraction]] = []
    for p, part in enumerate(parts):
        groups: dict[float, list[str]] = {}
        for s in members:
            groups.setdefault(weights.get(s, 1.0), []).append(s)
        here: list[tuple[list[str], I64, Fraction]] = []
        for weight, group in groups.items():
            sizes = np.zeros(len(table), dtype=np.int64)
            columns = [names.index(s) for s in group]
            sizes[part.begin : part.end] = table[part.begin : part.end, columns].sum(1)
            if sizes.any():
                here.append((group, sizes, Fraction(str(weight)) * int(sizes.sum())))
        if not here or part.weight == 0:
            continue
        total = sum(weight for *_, weight in here)
        scale = Fraction(1) if part.weight is None else Fraction(str(part.weight)) / total
        found += [(p, group, sizes, weight * scale) for group, sizes, weight in here]
    return found
