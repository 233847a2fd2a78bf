"""The sampler: exact shares, every pair once an epoch, and the future from a few integers."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
from pydantic import TypeAdapter

from shards.errors import DataError
from shards.order.apportionment import Shares, apportion, next_taker, shares_of
from shards.order.keys import VERSION
from shards.order.lookahead import Future, working_set
from shards.order.sampler import Plan, Sampler, SamplerState, make_sampler
from shards.order.settings import FamilyWeights, SamplerSettings
from shards.order.streams import Contents, ShardRange

SOURCES = ["cap", "vqa"]
SHARDS = np.asarray([[30, 11], [25, 4], [47, 0], [2, 6]])
PARTS = [ShardRange("a", 0, 2, 3.0), ShardRange("b", 2, 4, 1.0)]
SEED = 2
NATURAL = SamplerSettings(window=2)
BALANCED = SamplerSettings(mode="balanced", window=2, mismatch=0.3, question_share=0.6)
ALTERNATING = SamplerSettings(
    mode="alternating", window=2, mismatch=0.25, families=FamilyWeights(masked=3, matching=1, qa=2)
)
WEIGHTED = SamplerSettings(window=2, source_weights={"vqa": 2.0})
VISITS = SamplerSettings(window=2, sentences_per_visit=3)
ALL = {
    "natural": NATURAL,
    "balanced": BALANCED,
    "alternating": ALTERNATING,
    "weighted": WEIGHTED,
    "visits": VISITS,
    "lanes": BALANCED.model_copy(update={"lanes": 5}),
}
every_mode = pytest.mark.parametrize("settings", ALL.values(), ids=ALL)


def sampler_for(
    settings: SamplerSettings, parts: Sequence[ShardRange] = (), version: int = VERSION
) -> Sampler:
    return make_sampler(settings, SEED, Contents(SHARDS, SOURCES, ["vqa"], parts), version)


def take(
    settings: SamplerSettings,
    sizes: list[int],
    state: SamplerState | None = None,
    parts: Sequence[ShardRange] = (),
    version: int = VERSION,
) -> tuple[list[Plan], SamplerState]:
    sampler = sampler_for(settings, parts, version)
    state = state or sampler.start()
    plans = []
    for count in sizes:
        step = sampler.step(state, count)
        plans.append(sampler.plan(step))
        state = step.after
    return plans, state


def restored(state: SamplerState) -> SamplerState:
    """As a checkpoint gives it back."""
    stored = TypeAdapter(SamplerState)
    return stored.validate_json(stored.dump_json(state), strict=True)


def rows(plans: list[Plan]) -> list[tuple[int, ...]]:
    fields = ("stream", "epoch", "shard", "index", "mismatched")
    return [r for p in plans for r in zip(*(getattr(p, f).tolist() for f in fields), strict=True)]


def worst_run(counts: list[int], pairs: list[int], share: Fraction) -> Fraction:
    """The largest deviation from `share` over any run of consecutive steps."""
    lead, low, high, worst = Fraction(0), Fraction(0), Fraction(0), Fraction(0)
    for count, n in zip(counts, pairs, strict=True):
        lead += count - share * n
        low, high = min(low, lead), max(high, lead)
        worst = max(worst, lead - low, high - lead)
    return worst


def test_natural_takes_every_pair_once_an_epoch() -> None:
    total = int(SHARDS.sum())
    for epoch in range(3):
        plans, _ = take(NATURAL, [16] * 50)
        seen = [r[2:4] for r in rows(plans) if r[1] == epoch]
        assert len(seen) == total == len(set(seen))


@every_mode
@pytest.mark.parametrize("parts", [(), PARTS], ids=["one set", "two sets"])
def test_restoring_at_every_step_gives_the_same_tail(
    settings: SamplerSettings, parts: Sequence[ShardRange]
) -> None:
    whole, _ = take(settings, [17] * 20, parts=parts)
    for step in range(20):
        _, state = take(settings, [17] * step, parts=parts)
        state = restored(state)
        tail, _ = take(settings, [17] * (20 - step), state, parts)
        assert rows(tail) == rows(whole[step:])


@every_mode
@pytest.mark.parametrize("parts", [(), PARTS], ids=["one set", "two sets"])
@pytest.mark.parametrize("lanes", [1, 2, 5, 16])
def test_slices_of_a_step_are_the_step(
    settings: SamplerSettings, parts: Sequence[ShardRange], lanes: int
) -> None:
    sampler = sampler_for(settings.model_copy(update={"lanes": lanes}), parts)
    for step in sampler.steps_ahead(sampler.start(), 23, 12 * 23):
        whole = sampler.plan(step)
        assert whole.offset.tolist() == list(range(23))
        for world in (1, 2, 3, 7, 16, 23):
            slices = [sampler.slice(step, rank, world) for rank in range(world)]
            if lanes == 1:  # as they lie, of sizes that differ by one at most
                edges = [23 * rank // world for rank in range(world + 1)]
                assert [len(s) for s in slices] == np.diff(edges).tolist()
                assert rows(slices) == rows([whole])
            for rank, part in enumerate(slices):
                first, last = sampler.lanes_of(rank, world)
                assert ((first <= part.lane) & (part.lane < last)).all()
                assert rows([part]) == rows([whole.take(part.offset)])
            offsets = np.concatenate([s.offset for s in slices])
            assert sorted(offsets.tolist()) == list(range(23))


@every_mode
@pytest.mark.parametrize("parts", [(), PARTS], ids=["one set", "two sets"])
def test_every_stream_takes_each_of_its_pairs_once_an_epoch(
    settings: SamplerSettings, parts: Sequence[ShardRange]
) -> None:
    plans, state = take(settings, [19] * 120, parts=parts)
    taken = rows(plans)
    for i, stream in enumerate(sampler_for(settings, parts).streams):
        cursor = state.cursors[i]
        expected = {(s, k) for s, size in enumerate(stream.sizes.tolist()) for k in range(size)}
        for epoch in range(cursor // stream.pairs):
            seen = [r[2:4] for r in taken if r[0] == i and r[1] == epoch]
            assert len(seen) == len(expected) and set(seen) == expected
        rest = [r[2:4] for r in taken if r[0] == i and r[1] == cursor // stream.pairs]
        assert len(rest) == len(set(rest)) == cursor % stream.pairs


# Of 40 steps of 17 pairs, as the first lxscale with such an order gave them.
GOLDEN = {
    (2, "natural"): "01d7f6b2d715b2b7",
    (2, "balanced"): "111f9d8ad88461c0",
    (2, "alternating"): "5bb02cd4a34be351",
    (2, "weighted"): "018d2a8e294b8845",
    (2, "visits"): "e3983358179a4ef1",
    (3, "natural"): "8ffc4b9165d6b64b",
    (3, "balanced"): "04d2af5c56cc44eb",
    (3, "alternating"): "e199e9c8fa758b59",
    (3, "weighted"): "ef68c892e09456a1",
    (3, "visits"): "46e388cde19f2833",
    (3, "lanes"): "b5fc920b16fbc7bf",
}


@pytest.mark.parametrize(("version", "mode"), GOLDEN)
def test_an_order_is_what_its_version_says(version: int, mode: str) -> None:
    """Whoever changes it raises keys.VERSION: runs of before must not go on with it."""
    plans, state = take(ALL[mode], [17] * 40, version=version)
    found = hashlib.sha256(json.dumps([version, rows(plans), asdict(state)]).encode())
    assert found.hexdigest()[:16] == GOLDEN[version, mode]


def test_a_changed_global_batch_takes_the_same_pairs_in_the_same_order() -> None:
    a, _ = take(NATURAL, [10] * 12)
    b, _ = take(NATURAL, [30, 15, 60, 5, 10])
    assert rows(a) == rows(b)
    # Balanced: each stream goes on in its own order, nothing lost or repeated.
    for stream in (0, 1):
        a, _ = take(BALANCED, [10] * 12)
        b, _ = take(BALANCED, [30, 15, 60, 5, 10])
        key = [sorted(r[:4] for r in rows(x) if r[0] == stream) for x in (a, b)]
        assert key[0] == key[1]


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("mismatch", [0.0, 0.25, 0.5, 0.9])
def test_balanced_shares_are_exact_over_any_run_of_steps(share: float, mismatch: float) -> None:
    settings = SamplerSettings(mode="balanced", mismatch=mismatch, question_share=share)
    plans, _ = take(settings, [13] * 40)
    asked = np.asarray([s.sources == (1,) for s in sampler_for(settings).streams])
    questions = [int(asked[p.stream].sum()) for p in plans]
    bad = [int(p.mismatched.sum()) for p in plans]
    for begin in range(40):
        for end in range(begin + 1, 41):
            pairs = 13 * (end - begin)
            assert abs(sum(questions[begin:end]) - pairs * Fraction(str(share))) <= 1
            assert abs(sum(bad[begin:end]) - pairs * Fraction(str(mismatch))) <= 1


def random_sizes() -> list[int]:
    choice = random.Random(3)
    return [choice.choice([1, 2, 13, 64]) for _ in range(300)]


@pytest.mark.parametrize("parts", [(), PARTS], ids=["one set", "two sets"])
def test_two_weighted_streams_are_exact_over_any_run_of_steps(parts: Sequence[ShardRange]) -> None:
    settings = SamplerSettings() if parts else WEIGHTED
    streams = sampler_for(settings, parts).streams
    sizes = random_sizes()
    plans, _ = take(settings, sizes, parts=parts)
    # vqa x 2: 21 of 125 pairs weigh twice; two sets: 3 to 1.
    assert [s.share for s in streams] == (
        [Fraction(3, 4), Fraction(1, 4)] if parts else [Fraction(104, 146), Fraction(42, 146)]
    )
    for i, stream in enumerate(streams):
        counts = [int((p.stream == i).sum()) for p in plans]
        assert worst_run(counts, sizes, stream.share) <= 1


def test_many_streams_stay_within_one_of_their_share_from_the_start() -> None:
    """Of K streams none is off by one or more at any step, nor by 2 - 2/K over any run."""
    choice = random.Random(1)
    for _ in range(40):
        weights = [choice.randint(1, 40) for _ in range(choice.randint(3, 6))]
        shares, taken, steps = shares_of(weights), [0] * len(weights), []
        for _ in range(200):
            got = apportion(
                Shares.of(shares), taken, count := choice.choice([len(weights) * 40, 64 * 40])
            )
            assert sum(got) == count and min(got) >= 0
            taken = [a + b for a, b in zip(taken, got, strict=True)]
            steps.append((got, count))
            off = [abs(t - s * sum(taken)) for t, s in zip(taken, shares, strict=True)]
            assert max(off) <= 1 - Fraction(1, len(weights))
        for i, share in enumerate(shares):
            run = worst_run([g[i] for g, _ in steps], [n for _, n in steps], share)
            assert run <= 2 - Fraction(2, len(weights))


def test_alternating_serves_one_family_a_step_in_exact_shares() -> None:
    sampler = sampler_for(ALTERNATING)
    streams, names = sampler.streams, [f.name for f in sampler.families]
    assert names == ["masked", "matching", "qa"]
    families, wrong, pairs = [], [], []
    for step in sampler.steps_ahead(sampler.start(), 13, 240 * 13):
        whole, family = sampler.plan(step), step.family
        families.append(family)
        assert {names[streams[i].family] for i in whole.stream.tolist()} == {family}
        assert whole.masks == (family == "masked")
        if family == "matching":
            wrong.append(int(whole.mismatched.sum()))
            pairs.append(13)
        else:
            assert not whole.mismatched.any()
        if family == "qa":
            assert all(streams[i].sources == (1,) for i in whole.stream.tolist())
    for family, share in zip(names, shares_of((3, 1, 2)), strict=True):
        assert worst_run([int(f == family) for f in families], [1] * 240, share) <= 1
    assert worst_run(wrong, pairs, Fraction("0.25")) <= 1


def test_any_weights_of_families_are_followed_within_one_step() -> None:
    choice = random.Random(5)
    for _ in range(60):
        shares = shares_of([choice.randint(1, 30) for _ in range(3)])
        taken = [0, 0, 0]
        for _ in range(200):
            taken[next_taker(shares, taken)] += 1
            off = [abs(t - s * sum(taken)) for t, s in zip(taken, shares, strict=True)]
            assert max(off) <= Fraction(3, 4)  # Tijdeman's bound for three


def test_an_exhausted_set_wraps_into_its_own_next_epoch() -> None:
    settings = SamplerSettings()
    plans, state = take(settings, [16] * 100, parts=PARTS)
    streams = sampler_for(settings, PARTS).streams
    assert [c // s.pairs for c, s in zip(state.cursors, streams, strict=True)] == [17, 7]
    taken = rows(plans)
    for i in range(2):
        assert {r[1] for r in taken if r[0] == i} == set(range([18, 8][i]))


def test_short_batches_end_epochs() -> None:
    sampler = sampler_for(SamplerSettings(window=2, last_batch="short"))
    steps = list(sampler.steps_ahead(sampler.start(), 16, 2 * 125 + 7))
    assert [step.count for step in steps] == [*([16] * 7), 13, *([16] * 7), 13, 7]
    for step in steps:
        assert len(set(sampler.plan(step).epoch.tolist())) == 1
        assert step == next(sampler.steps_ahead(step.before, 16, 257))
    with pytest.raises(DataError, match=r"last_batch=short.*one stream"):
        sampler_for(BALANCED.model_copy(update={"last_batch": "short"}))


def test_sentences_of_a_visit_come_together() -> None:
    plans, _ = take(VISITS, [15] * 8)
    shard, index = (np.concatenate([getattr(p, f) for p in plans]) for f in ("shard", "index"))
    together = (np.diff(index) == 1) & (np.diff(shard) == 0)
    # Of three neighbours two follow their neighbour; a few pairs fill no visit.
    assert together.mean() > 0.6
    plans, _ = take(NATURAL, [15] * 8)
    shard, index = (np.concatenate([getattr(p, f) for p in plans]) for f in ("shard", "index"))
    assert ((np.diff(index) == 1) & (np.diff(shard) == 0)).mean() < 0.1


@every_mode
@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("parts", [(), PARTS], ids=["one set", "two sets"])
def test_the_future_names_the_next_use_of_every_shard(
    settings: SamplerSettings, lanes: int, parts: Sequence[ShardRange]
) -> None:
    """A shard is never needed before its time, within the shares' rounding, and no shard that is
    in use is ever said to be free, at any world size."""
    sampler = sampler_for(settings.model_copy(update={"lanes": lanes}), parts)
    steps = list(sampler.steps_ahead(sampler.start(), 7, 60 * 7))
    slack = 7 * 8  # families alternate, shares are met within a step or two
    every = np.arange(len(SHARDS))
    for world in (1, 3):
        for rank in range(world):
            future = Future(sampler, sampler.lanes_of(rank, world), 0, 60 * 7)
            own = [set(sampler.slice(step, rank, world).shard.tolist()) for step in steps]
            plans = [set(sampler.plan(step).shard.tolist()) for step in steps]
            for at, step in enumerate(steps[:40]):
                future.at(step.before)
                now, due = set(future.now().tolist()), future.due(every)
                ahead: dict[int, float] = {}
                for shard, when, _ in future.upcoming():
                    ahead.setdefault(shard, when)
                assert list(ahead.values()) == sorted(ahead.values())
                assert {s for s in ahead if ahead[s] == 0} == now
                for later in range(at, 60):
                    end = 7 * (later + 1)
                    assert all(due[s] <= end + slack for s in plans[later])
                    assert all(ahead[s] <= end + slack for s in own[later])
                assert all(due[s] == -1 for s in now)
                assert all(due[s] <= ahead[s] for s in ahead if due[s] != -1)


@every_mode
def test_a_future_that_goes_along_is_the_one_that_begins_there(settings: SamplerSettings) -> None:
    every = np.arange(len(SHARDS))
    for lanes in (1, 6):
        sampler = sampler_for(settings.model_copy(update={"lanes": lanes}), PARTS)
        along = Future(sampler, (0, 1), 20, 900)
        unchanged = 0
        for step in sampler.steps_ahead(sampler.start(), 7, 600):
            if step.before.consumed > 300:
                step = replace(step, before=replace(step.before, skipped=((2, 300),)))
            new = Future(sampler, (0, 1), 20, 900)
            new.at(step.before)
            if not along.at(step.before):
                unchanged += 1
            assert along.now().tolist() == new.now().tolist()
            one, two = along.due(every), new.due(every)
            assert ((one == -1) == (two == -1)).all() and ((one == np.inf) == (two == np.inf)).all()
            finite = np.isfinite(one)
            # Times are of the last change of windows; those that are past are.
            one, two = (np.maximum(x[finite], step.before.consumed) for x in (one, two))
            assert (np.abs(one - two) <= 7 * 8).all()
        assert unchanged > 5


def test_the_working_set_is_two_windows_of_every_stream() -> None:
    sizes = np.asarray([10, 20, 30, 40])
    one, two = sampler_for(SamplerSettings(window=1)), sampler_for(NATURAL)
    assert working_set(one, sizes, 5) == 70
    assert working_set(two, sizes, 5) == 100
    # A batch that spans several windows needs them all.
    assert working_set(one, sizes, 60) == 100


def test_balanced_does_not_tie_mismatch_to_questions() -> None:
    settings = SamplerSettings(mode="balanced")
    plans, _ = take(settings, [16] * 100)
    table = np.zeros((2, 2))
    for stream, *_, bad in rows(plans):
        table[stream, int(bad)] += 1
    assert np.abs(table / 1600 - 0.25).max() < 0.01


def test_natural_mismatches_with_the_given_probability() -> None:
    plans, _ = take(SamplerSettings(mismatch=0.5), [125] * 40)
    share = np.mean([r[-1] for r in rows(plans)])
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(5000)


def test_a_wrong_source_weight_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"source_weights names vgq.*cap, vqa"):
        sampler_for(SamplerSettings(source_weights={"vgq": 2.0}))


def test_a_share_of_questions_without_questions_is_an_error() -> None:
    with pytest.raises(DataError, match=r"question.*sampler\.question_share"):
        make_sampler(BALANCED, SEED, Contents(np.asarray([[5]]), ["cap"], []))
    with pytest.raises(DataError, match="no pairs"):
        make_sampler(NATURAL, SEED, Contents(np.asarray([[0]]), ["cap"], []))
