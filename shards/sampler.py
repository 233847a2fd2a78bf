"""The multi-task sampler: which pairs a step trains on, and which of them get another sentence.

A sampler state is a few integers; `plan` maps (state, number of pairs) to the next pairs and
`advance` to the state after them. Both are pure, so any rank, loader worker or restart that holds
the state holds the future.

A stream is an endless order over some sources of one data set: when it is exhausted it goes on
with its own next epoch. Streams of one family are mixed within each step, by exact shares
(shards/quota.py); families alternate step by step:

    natural      one family; streams for data sets and groups of sources of equal weight. A pair
                 is mismatched with probability `mismatch`, by a coin of its own
    balanced     one family; questions and captions apart, `question_share` of the pairs questions
                 and `mismatch` of them mismatched, exactly
    alternating  a family each for the masked objectives, matching and QA: a step serves one of
                 them, as UNITER's do; `mismatch` of the matching pairs are mismatched, exactly
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.order import I64, EpochOrder, chance, draw, epoch_order, fold
from shards.quota import apportion, follow, next_taker, shares_of

# Purposes of draws: part of every key, so that no two uses of a pair's randomness coincide.
PURPOSE_MATCH, PURPOSE_ARRANGE = 1, 2

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
class Part:
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


@dataclass(frozen=True)
class SamplerState:
    """The whole data state.

    consumed: pairs taken since the run began; cursors: pairs taken from each stream; mismatched:
    how many of them exactly (not by a coin) got another sentence; steps: steps of each family;
    skipped: (shard, consumed when it was given up) under on_error=skip; skipped_pairs: positions
    that were passed over for it.
    """

    consumed: int
    cursors: tuple[int, ...]
    mismatched: tuple[int, ...]
    steps: tuple[int, ...]
    skipped: tuple[tuple[int, int], ...] = ()
    skipped_pairs: int = 0

    def to_json(self) -> dict[str, Any]:
        lists = {k: list(getattr(self, k)) for k in ("cursors", "mismatched", "steps")}
        return {
            "consumed": self.consumed,
            **lists,
            "skipped": [list(entry) for entry in self.skipped],
            "skipped_pairs": self.skipped_pairs,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> SamplerState:
        def numbers(key: str) -> tuple[int, ...]:
            return tuple(int(n) for n in data[key])

        return SamplerState(
            int(data["consumed"]),
            numbers("cursors"),
            numbers("mismatched"),
            numbers("steps"),
            tuple((int(s), int(c)) for s, c in data["skipped"]),
            int(data["skipped_pairs"]),
        )


@dataclass(frozen=True)
class Plan:
    """The pairs of one step, or a slice of them, in order; every array has one element a pair.

    stream: index into the streams; epoch: the stream's own epoch; shard and index: the pair as
    the index-th pair of its stream in that shard; mismatched: gets another image's sentence.
    slot: its place in the step. masks: whether words and objects are masked.
    """

    stream: I64
    epoch: I64
    shard: I64
    index: I64
    mismatched: NDArray[np.bool_]
    slot: I64
    masks: bool = True

    def __len__(self) -> int:
        return len(self.stream)

    def take(self, rows: slice | I64) -> Plan:
        return Plan(
            self.stream[rows],
            self.epoch[rows],
            self.shard[rows],
            self.index[rows],
            self.mismatched[rows],
            self.slot[rows],
            self.masks,
        )

    def without(self, shards: Sequence[int]) -> Plan:
        """The plan less the pairs of some shards."""
        if not shards:
            return self
        return self.take(np.flatnonzero(~np.isin(self.shard, np.asarray(shards))))


# --- streams ------------------------------------------------------------------------------------


def streams_of(
    settings: SamplerSettings,
    pairs_per_source: Sequence[dict[str, int]],
    sources: Sequence[str],
    questions: Sequence[str],
    parts: Sequence[Part] = (),
) -> tuple[Stream, ...]:
    """The streams of a data set, given each shard's number of pairs per source.

    Raises DataError where the settings ask for pairs that there are none of.
    """
    parts = parts or (Part("all", 0, len(pairs_per_source)),)
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
    parts: Sequence[Part],
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


def start_state(streams: Sequence[Stream]) -> SamplerState:
    zeros = (0,) * len(streams)
    return SamplerState(0, zeros, zeros, (0,) * (1 + max(s.family for s in streams)))


# --- state and plan -----------------------------------------------------------------------------


def family_of(settings: SamplerSettings, state: SamplerState) -> str:
    """Which objectives the next step serves: `all`, or one of FAMILIES."""
    return "all" if settings.mode != "alternating" else FAMILIES[_family(settings, state)]


def _family(settings: SamplerSettings, state: SamplerState) -> int:
    if settings.mode != "alternating":
        return 0
    return next_taker(shares_of(settings.families), state.steps)


def next_count(
    settings: SamplerSettings,
    streams: Sequence[Stream],
    state: SamplerState,
    global_batch: int,
    total: int,
) -> int:
    """Pairs of the next step, of a run of `total` pairs."""
    count = min(global_batch, total - state.consumed)
    if settings.last_batch == "short":
        count = min(count, streams[0].pairs - state.consumed % streams[0].pairs)
    return count


def _takes(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, count: int
) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """The next step's streams, how many of its pairs come from each, and how many of those are
    mismatched (where that is exact)."""
    family = _family(settings, state)
    chosen = [i for i, s in enumerate(streams) if s.family == family]
    cursors = [state.cursors[i] for i in chosen]
    shares = [streams[i].share for i in chosen]
    takes = apportion(shares, cursors, count) if len(chosen) > 1 else (count,)
    if settings.mode == "natural" or (
        settings.mode == "alternating" and FAMILIES[family] != "matching"
    ):
        return chosen, takes, (0,) * len(chosen)
    before = [state.mismatched[i] for i in chosen]
    share = Fraction(str(settings.mismatch))
    bad = apportion((share, 1 - share), (sum(before), sum(cursors) - sum(before)), count)[0]
    targets = [share * (c + t) for c, t in zip(cursors, takes, strict=True)]
    return chosen, takes, follow(targets, before, bad, takes)


def advance(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, count: int
) -> SamplerState:
    """The state after a step of `count` pairs."""
    cursors, mismatched = list(state.cursors), list(state.mismatched)
    for i, take, bad in zip(*_takes(settings, streams, state, count), strict=True):
        cursors[i] += take
        mismatched[i] += bad
    steps = list(state.steps)
    steps[_family(settings, state)] += 1
    return replace(
        state,
        consumed=state.consumed + count,
        cursors=tuple(cursors),
        mismatched=tuple(mismatched),
        steps=tuple(steps),
    )


@lru_cache(maxsize=16)
def stream_epoch(stream: Stream, seed: int, epoch: int, window: int, k: int) -> EpochOrder:
    """The order of one epoch of a stream."""
    return epoch_order(stream.sizes, seed, epoch, window, stream.key, k)


def plan(
    settings: SamplerSettings,
    streams: Sequence[Stream],
    state: SamplerState,
    count: int,
    begin: int = 0,
    end: int | None = None,
) -> Plan:
    """Pairs [begin, end) of the step of `count` pairs after `state`."""
    end = count if end is None else end
    chosen, takes, bad = _takes(settings, streams, state, count)
    slot = np.arange(begin, end)
    if len(chosen) == 1 and settings.mode == "natural":
        stream_of = np.full(end - begin, chosen[0])
        position = state.cursors[chosen[0]] + slot
        mismatched = np.zeros(end - begin, dtype=bool)
    else:
        order, ends, mismatched = _arrange(settings, state, takes, bad)
        order = order[begin:end]
        which = np.searchsorted(ends, order, side="right")
        starts = np.asarray([state.cursors[i] for i in chosen]) - (ends - np.asarray(takes))
        stream_of, position = np.asarray(chosen)[which], starts[which] + order
        mismatched = mismatched[order]
    epoch, shard, index = (np.empty(end - begin, dtype=np.int64) for _ in range(3))
    for i in chosen:
        rows = np.flatnonzero(stream_of == i) if len(chosen) > 1 else slice(None)
        found = _locate(settings, streams[i], position[rows])
        epoch[rows], shard[rows], index[rows] = found
        if settings.mode == "natural":
            mismatched[rows] = _coin(settings, streams[i], *found)
    family = _family(settings, state)
    masks = settings.mode != "alternating" or FAMILIES[family] == "masked"
    return Plan(stream_of, epoch, shard, index, mismatched, slot, masks)


def _locate(settings: SamplerSettings, stream: Stream, position: I64) -> tuple[I64, I64, I64]:
    """Positions of a stream -> (epoch, shard, index)."""
    arguments = settings.window, settings.sentences_per_visit
    epoch = position // stream.pairs
    first = int(epoch.min(initial=0)) if len(epoch) else 0
    last = int(epoch.max(initial=0))
    shard, index = np.empty_like(position), np.empty_like(position)
    for e in range(first, last + 1):
        rows = slice(None) if first == last else np.flatnonzero(epoch == e)
        order = stream_epoch(stream, settings.seed, e, *arguments)
        shard[rows], index[rows] = order.locate(position[rows] - e * stream.pairs)
    return epoch, shard, index


def _coin(
    settings: SamplerSettings, stream: Stream, epoch: I64, shard: I64, index: I64
) -> NDArray[np.bool_]:
    """natural: whether a pair is mismatched, which no other pair and no batch decides."""
    key = fold(settings.seed, stream.key, PURPOSE_MATCH)
    return chance(draw(key, epoch, shard, index), settings.mismatch)


def _arrange(
    settings: SamplerSettings, state: SamplerState, takes: Sequence[int], bad: Sequence[int]
) -> tuple[I64, I64, NDArray[np.bool_]]:
    """How a step mixes its streams: which pair (counted through the streams) is in each slot, the
    end of each stream's pairs in that count, and which pairs are mismatched."""
    count = sum(takes)
    key = fold(settings.seed, state.consumed, PURPOSE_ARRANGE)
    ends = np.cumsum(np.asarray(takes, dtype=np.int64))
    rank = draw(key, np.arange(count))
    mismatched = np.zeros(count, dtype=bool)
    for end, take, chosen in zip(ends.tolist(), takes, bad, strict=True):
        # Those whose draw is lowest; the order of a stream is random already.
        if chosen:
            begin = end - take
            mismatched[begin + np.argsort(rank[begin:end], kind="stable")[:chosen]] = True
    order = np.argsort(draw(key, np.arange(count), 1), kind="stable")
    return order, ends, mismatched


# --- what comes when ----------------------------------------------------------------------------


def rates(settings: SamplerSettings, streams: Sequence[Stream]) -> list[float]:
    """Pairs of each stream per pair consumed, in the long run."""
    if settings.mode != "alternating":
        return [float(s.share) for s in streams]
    families = shares_of(settings.families)
    return [float(s.share * families[s.family]) for s in streams]


def next_use(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, behind: int = 0
) -> NDArray[np.float64]:
    """For each shard, pairs that will be consumed before its next window begins, f64 (shards,).

    0 for the shards of the windows that the streams stand in, -1 for those that were left less
    than `behind` pairs ago, where others may still be; inf for shards that no stream visits.
    """
    arguments = settings.window, settings.sentences_per_visit
    out = np.full(len(streams[0].sizes), np.inf)
    left = np.zeros(len(out), dtype=bool)
    for stream, cursor, rate in zip(streams, state.cursors, rates(settings, streams), strict=True):
        back = max(cursor - int(behind * rate), 0)
        for epoch in range(back // stream.pairs, cursor // stream.pairs + 2):
            order = stream_epoch(stream, settings.seed, epoch, *arguments)
            edges = epoch * stream.pairs + order.window_start()
            window_of = np.arange(len(order.shard_order)) // order.window
            begin, end = edges[window_of], edges[window_of + 1]
            shards = order.shard_order
            left[shards[(end > back) & (end <= cursor)]] = True
            due = np.where(end > cursor, np.maximum(begin - cursor, 0) / max(rate, 1e-12), np.inf)
            out[shards] = np.minimum(out[shards], due)
    return np.where(left & (out > 0), -1.0, out)


def next_windows(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, behind: int = 0
) -> NDArray[np.bool_]:
    """Which shards are in the window that a stream enters next, bool (shards,).

    None of a stream that left its last window less than `behind` pairs ago: that one's shards are
    still in use, and may be those that are due last.
    """
    arguments = settings.window, settings.sentences_per_visit
    out = np.zeros(len(streams[0].sizes), dtype=bool)
    for stream, cursor, rate in zip(streams, state.cursors, rates(settings, streams), strict=True):
        epoch, position = divmod(cursor, stream.pairs)
        order = stream_epoch(stream, settings.seed, epoch, *arguments)
        now = order.window_of(position)
        edges = order.window_start()
        if cursor and position - int(behind * rate) < edges[now]:
            continue
        if now + 2 == len(edges):
            order, now = stream_epoch(stream, settings.seed, epoch + 1, *arguments), -1
        out[order.shard_order[(now + 1) * order.window : (now + 2) * order.window]] = True
    return out


def windows_at(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, behind: int = 0
) -> tuple[int, ...]:
    """Which windows the streams stand in and have left less than `behind` pairs ago: `next_use` is
    another only when these are."""
    arguments = settings.window, settings.sentences_per_visit
    out: list[int] = []
    for stream, cursor, rate in zip(streams, state.cursors, rates(settings, streams), strict=True):
        for at in (cursor, max(cursor - int(behind * rate), 0)):
            epoch, position = divmod(at, stream.pairs)
            order = stream_epoch(stream, settings.seed, epoch, *arguments)
            out += [epoch, order.window_of(position)]
    return tuple(out)


def working_set(
    settings: SamplerSettings, streams: Sequence[Stream], shard_bytes: I64, in_flight: int
) -> int:
    """Bytes of the shards that steps in flight can need at once, at most: of every stream the
    windows that `in_flight` consecutive pairs can touch."""
    total = 0
    for stream, rate in zip(streams, rates(settings, streams), strict=True):
        visited = np.flatnonzero(stream.sizes)
        window = settings.window or len(visited)
        pairs = int(in_flight * rate) + 1
        smallest = int(np.sort(stream.sizes[visited])[:window].sum())
        shards = window * (2 + pairs // max(smallest, 1))
        # An epoch's last window may be smaller, and then all of it lies between two others.
        shards += len(visited) % window * (1 + pairs // stream.pairs)
        total += int(np.sort(shard_bytes[visited])[::-1][:shards].sum())
    used = np.any([s.sizes > 0 for s in streams], axis=0)
    return min(total, int(shard_bytes[used].sum()))


def steps_ahead(
    settings: SamplerSettings,
    streams: Sequence[Stream],
    state: SamplerState,
    global_batch: int,
    total: int,
) -> Iterator[tuple[SamplerState, int]]:
    """(state before, number of pairs) of the steps until `total` pairs are consumed."""
    while state.consumed < total:
        count = next_count(settings, streams, state, global_batch, total)
        yield state, count
        state = advance(settings, streams, state, count)
