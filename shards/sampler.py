"""The multi-task sampler: which pairs a step trains on, and which of them get another sentence.

A sampler state is a few integers; `plan` maps (state, number of pairs) to the next pairs and
`advance` to the state after them. Both are pure, so any rank, loader worker or restart that holds
the state holds the future.

Streams. `natural` has one stream, all pairs; the sentence of a pair is mismatched with probability
`mismatch`. `balanced` has two, questions and captions, each with its own endless order; of the
first c pairs of a run exactly floor(c * share) are questions and floor(c * mismatch) are
mismatched, so over any run of steps both counts are within one of their weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.order import I64, draw, epoch_order, fold, uniform

# Purposes of draws: part of every key, so that no two uses of a pair's randomness coincide.
PURPOSE_MATCH, PURPOSE_ARRANGE = 1, 2


@dataclass(frozen=True)
class SamplerSettings:
    """Every setting that changes the order; all of them enter the data state's fingerprint.

    mode:           `natural` | `balanced`
    seed:           of the order and of every draw
    window:         shards per shuffle window; 0 = all (an exact global shuffle)
    mismatch:       natural: probability; balanced: exact share of mismatched pairs
    question_share: balanced only: exact share of question pairs
    """

    mode: Literal["natural", "balanced"] = "natural"
    seed: int = 0
    window: int = 0
    mismatch: float = 0.5
    question_share: float = 0.5


@dataclass(frozen=True)
class Stream:
    """An endless order over some sources: `sizes[i]` of its pairs are in shard i."""

    name: str
    sources: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def pairs(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class SamplerState:
    """consumed: pairs taken since the run began; cursors: pairs taken from each stream."""

    consumed: int
    cursors: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cursors": list(self.cursors)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> SamplerState:
        return SamplerState(int(data["consumed"]), tuple(int(c) for c in data["cursors"]))


@dataclass(frozen=True)
class Plan:
    """The pairs of one step, in order; every array has one element a pair.

    stream: index into the streams; epoch: the stream's own epoch; shard and index: the pair as
    the index-th pair of its stream in that shard; mismatched: gets another image's sentence.
    """

    stream: I64
    epoch: I64
    shard: I64
    index: I64
    mismatched: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.stream)

    def slice(self, begin: int, end: int) -> Plan:
        return Plan(*(getattr(self, f)[begin:end] for f in self.__dataclass_fields__))


def streams_of(
    settings: SamplerSettings,
    pairs_per_source: list[dict[str, int]],
    sources: list[str],
    questions: list[str],
) -> tuple[Stream, ...]:
    """The streams of a data set, given each shard's number of pairs per source."""

    def stream(name: str, members: list[str]) -> Stream:
        sizes = tuple(sum(shard.get(s, 0) for s in members) for shard in pairs_per_source)
        return Stream(name, tuple(sources.index(s) for s in members), sizes)

    if settings.mode == "natural":
        streams: tuple[Stream, ...] = (stream("all", sources),)
    else:
        captions = [s for s in sources if s not in questions]
        asked = [s for s in sources if s in questions]
        streams = (stream("question", asked), stream("caption", captions))
        shares = (settings.question_share, 1 - settings.question_share)
        for part, share in zip(streams, shares, strict=True):
            if share > 0 and not part.pairs:
                raise DataError(
                    f"the sampler wants a share of {share:g} {part.name} pairs, but the data set "
                    f"has none (sources: {', '.join(sources)}): change sampler.question_share "
                    "or use sampler.mode=natural"
                )
    if not any(s.pairs for s in streams):
        raise DataError("the data set holds no pairs: build it from sources that have sentences")
    return streams


def start_state(streams: tuple[Stream, ...]) -> SamplerState:
    return SamplerState(0, (0,) * len(streams))


def _quota(weight: float, begin: int, end: int) -> int:
    """floor(end * w) - floor(begin * w) with w as an exact fraction: no drift at any count."""
    w = Fraction(str(weight))
    return int(end * w) - int(begin * w)


def _takes(settings: SamplerSettings, state: SamplerState, count: int) -> tuple[int, ...]:
    """How many of the next `count` pairs come from each stream."""
    if settings.mode == "natural":
        return (count,)
    asked = _quota(settings.question_share, state.consumed, state.consumed + count)
    return asked, count - asked


def advance(settings: SamplerSettings, state: SamplerState, count: int) -> SamplerState:
    """The state after the next `count` pairs."""
    takes = _takes(settings, state, count)
    cursors = tuple(c + t for c, t in zip(state.cursors, takes, strict=True))
    return SamplerState(state.consumed + count, cursors)


def plan(
    settings: SamplerSettings, streams: tuple[Stream, ...], state: SamplerState, count: int
) -> Plan:
    """The next `count` pairs after `state`."""
    parts: list[Plan] = []
    for i, (stream, cursor, take) in enumerate(
        zip(streams, state.cursors, _takes(settings, state, count), strict=True)
    ):
        position = cursor + np.arange(take, dtype=np.int64)
        epoch = position // max(stream.pairs, 1)
        for e in np.unique(epoch):
            order = epoch_order(stream.sizes, settings.seed, int(e), settings.window, i)
            shard, index = order.locate(position[epoch == e] - int(e) * stream.pairs)
            parts.append(
                Plan(
                    np.full(len(shard), i),
                    np.full(len(shard), int(e)),
                    shard,
                    index,
                    _coin(settings, i, int(e), shard, index),
                )
            )
    fields = Plan.__dataclass_fields__
    joined = Plan(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))
    return joined if settings.mode == "natural" else _arrange(settings, state, joined)


def _coin(
    settings: SamplerSettings, stream: int, epoch: int, shard: I64, index: I64
) -> NDArray[np.bool_]:
    key = fold(settings.seed, stream, epoch, PURPOSE_MATCH)
    return uniform(draw(key, shard, index)) < settings.mismatch


def _arrange(settings: SamplerSettings, state: SamplerState, pairs: Plan) -> Plan:
    """Balanced mode: set the exact number of mismatched pairs, then mix the streams in the step.

    Questions and captions share the mismatched pairs in proportion (each cell of the two-way table
    follows its own quota as far as the two exact margins allow).
    """
    begin, end = state.consumed, state.consumed + len(pairs)
    asked = int((pairs.stream == 0).sum())
    bad = _quota(settings.mismatch, begin, end)
    joint = float(Fraction(str(settings.mismatch)) * Fraction(str(settings.question_share)))
    bad_asked = min(max(_quota(joint, begin, end), asked + bad - len(pairs), 0), asked, bad)
    mismatched = np.zeros(len(pairs), dtype=bool)
    key = fold(settings.seed, begin, PURPOSE_ARRANGE)
    rank = draw(key, np.arange(len(pairs)))
    # Which pairs of a stream: those whose draw is lowest; the order of a stream is random already.
    mismatched[np.argsort(rank[:asked], kind="stable")[:bad_asked]] = True
    mismatched[asked + np.argsort(rank[asked:], kind="stable")[: bad - bad_asked]] = True
    slots = np.argsort(draw(key, np.arange(len(pairs)), 1), kind="stable")
    return Plan(
        pairs.stream[slots],
        pairs.epoch[slots],
        pairs.shard[slots],
        pairs.index[slots],
        mismatched[slots],
    )
