"""The streams that a sampler draws from: which pairs, in which exact shares.

A stream is an endless order over some sources of one data set: when it is exhausted it goes on
with its own next epoch. A family of steps (shards/order/modes) mixes its streams within each step:
one for each kind of pairs, data set and group of sources of equal weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.order.apportionment import shares_of
from shards.order.draws import I64
from shards.order.modes.base import Family, Kind
from shards.order.settings import SamplerSettings


@dataclass(frozen=True)
class ShardRange:
    """One of the data sets that a run draws from: its shards are [begin, end) of all."""

    name: str
    begin: int
    end: int
    weight: float | None = None
    """Its share against the other data sets'; None = in proportion to its pairs."""


@dataclass(frozen=True)
class Contents:
    """What a sampler has to know of the data: pairs by shard and source."""

    pairs_per_source: I64
    """(shards, sources)."""
    sources: Sequence[str]
    questions: Sequence[str]
    """The sources whose sentences are questions."""
    datasets: Sequence[ShardRange] = ()
    """Where several are mixed: whose shards are whose."""

    def ranges(self) -> Sequence[ShardRange]:
        return self.datasets or (ShardRange("all", 0, len(self.pairs_per_source)),)


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless order over some sources of a data set."""

    name: str
    family: int
    """Number of its family in the mode's."""
    dataset: int
    """Number of its data set."""
    sources: tuple[int, ...]
    """Numbers of its sources, in the order in which the pairs of a shard are counted."""
    shards: NDArray[np.int32]
    """That have pairs of the stream, rising, (n,)."""
    sizes: I64
    """Pairs of the stream in each of them, i64 (n,)."""
    share: Fraction
    """Of its family's pairs."""
    key: int
    """Keys its order; equal where the same pairs come in the same order."""
    pairs: int = field(init=False)
    """Of an epoch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", int(self.sizes.sum()))


def streams_of(
    settings: SamplerSettings, families: Sequence[Family], contents: Contents
) -> tuple[Stream, ...]:
    """The streams of a mode's families over a data set.

    Raises DataError where the settings ask for pairs that there are none of.
    """
    if unknown := set(settings.source_weights) - set(contents.sources):
        raise DataError(
            f"sampler.source_weights names {', '.join(sorted(unknown))}, but the data set has "
            f"{', '.join(contents.sources)}: correct the name"
        )
    table = contents.pairs_per_source
    if not table.sum():
        raise DataError("the data set holds no pairs: build it from sources that have sentences")
    streams: list[Stream] = []
    for number, family in enumerate(families):
        for kind in family.kinds:
            if family.share * kind.share > 0:
                streams += _streams_of_kind(settings, number, kind, contents, table, len(streams))
    if settings.last_batch == "short" and len(streams) > 1:
        raise DataError(
            "sampler.last_batch=short needs one stream, whose epochs end for all pairs at once: "
            "use it with sampler.mode=natural, one data set and no source weights"
        )
    return tuple(streams)


def _streams_of_kind(
    settings: SamplerSettings, family: int, kind: Kind, contents: Contents, table: I64, key: int
) -> list[Stream]:
    """The streams of one kind of pairs, keyed from `key` on."""
    ranges, names = contents.ranges(), list(contents.sources)
    members = [
        s
        for s in names
        if kind.questions in (None, s in contents.questions)
        and settings.source_weights.get(s, 1.0) > 0
    ]
    groups = _groups(settings, members, contents, table)
    if not groups:
        raise DataError(
            f"the sampler wants {kind.name or 'some'} pairs, but the data set has none (sources: "
            f"{', '.join(names)}): change sampler.question_share, sampler.families or "
            "sampler.source_weights, or use sampler.mode=natural"
        )
    shares = shares_of([group.weight for group in groups])
    streams = []
    for i, (group, share) in enumerate(zip(groups, shares, strict=True)):
        label = [kind.name, ranges[group.dataset].name if len(ranges) > 1 else ""]
        label.append("+".join(group.sources) if len(group.sources) < len(members) else "")
        streams.append(
            Stream(
                name="/".join(x for x in label if x) or "all",
                family=family,
                dataset=group.dataset,
                sources=tuple(names.index(s) for s in group.sources),
                shards=group.shards,
                sizes=group.sizes,
                share=share * kind.share,
                key=key + i,
            )
        )
    return streams


@dataclass(frozen=True)
class _Group:
    """Sources of equal weight of one data set, which make one stream."""

    dataset: int
    sources: list[str]
    shards: NDArray[np.int32]
    sizes: I64
    weight: Fraction


def _groups(
    settings: SamplerSettings, members: list[str], contents: Contents, table: I64
) -> list[_Group]:
    names = list(contents.sources)
    by_weight: dict[float, list[str]] = {}
    for s in members:
        by_weight.setdefault(settings.source_weights.get(s, 1.0), []).append(s)
    found: list[_Group] = []
    for d, dataset in enumerate(contents.ranges()):
        here: list[_Group] = []
        for weight, group in by_weight.items():
            columns = [names.index(s) for s in group]
            each = table[dataset.begin : dataset.end, columns].sum(1, dtype=np.int64)
            if total := int(each.sum()):
                at = np.flatnonzero(each)
                shards = (dataset.begin + at).astype(np.int32)
                share = Fraction(str(weight)) * total
                here.append(_Group(d, group, shards, each[at], share))
        if not here or dataset.weight == 0:
            continue
        weights = sum(group.weight for group in here)
        scale = Fraction(1) if dataset.weight is None else Fraction(str(dataset.weight)) / weights
        found += [replace(g, weight=g.weight * scale) for g in here]
    return found
