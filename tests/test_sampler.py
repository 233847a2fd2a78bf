"""The sampler: exact shares, every pair once an epoch, and the future from a few integers."""

import json
from fractions import Fraction

import numpy as np
import pytest

from shards.errors import DataError
from shards.sampler import (
    Plan,
    SamplerSettings,
    SamplerState,
    advance,
    plan,
    start_state,
    streams_of,
)

SOURCES = ["cap", "vqa"]
SHARDS = [{"cap": 30, "vqa": 11}, {"cap": 25, "vqa": 4}, {"cap": 47}, {"vqa": 6, "cap": 2}]
NATURAL = SamplerSettings(seed=2, window=2)
BALANCED = SamplerSettings("balanced", 2, 2, mismatch=0.3, question_share=0.6)


def take(settings: SamplerSettings, sizes: list[int], state: SamplerState | None = None):
    streams = streams_of(settings, SHARDS, SOURCES, ["vqa"])
    state = state or start_state(streams)
    plans = []
    for count in sizes:
        plans.append(plan(settings, streams, state, count))
        state = advance(settings, state, count)
    return plans, state


def rows(plans: list[Plan]) -> list[tuple[int, ...]]:
    fields = ("stream", "epoch", "shard", "index", "mismatched")
    return [r for p in plans for r in zip(*(getattr(p, f).tolist() for f in fields), strict=True)]


def test_natural_takes_every_pair_once_an_epoch() -> None:
    total = sum(sum(s.values()) for s in SHARDS)
    for epoch in range(3):
        plans, _ = take(NATURAL, [16] * 50)
        seen = [r[2:4] for r in rows(plans) if r[1] == epoch]
        assert len(seen) == total == len(set(seen))


@pytest.mark.parametrize("settings", [NATURAL, BALANCED], ids=["natural", "balanced"])
def test_restoring_at_every_step_gives_the_same_tail(settings: SamplerSettings) -> None:
    whole, _ = take(settings, [17] * 20)
    for step in range(20):
        _, state = take(settings, [17] * step)
        state = SamplerState.from_json(json.loads(json.dumps(state.to_json())))
        tail, _ = take(settings, [17] * (20 - step), state)
        assert rows(tail) == rows(whole[step:])


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
    settings = SamplerSettings("balanced", 1, 0, mismatch, share)
    plans, _ = take(settings, [13] * 40)
    questions = [int((p.stream == 0).sum()) for p in plans]
    bad = [int(p.mismatched.sum()) for p in plans]
    for begin in range(40):
        for end in range(begin + 1, 41):
            pairs = 13 * (end - begin)
            assert abs(sum(questions[begin:end]) - pairs * Fraction(str(share))) <= 1
            assert abs(sum(bad[begin:end]) - pairs * Fraction(str(mismatch))) <= 1


def test_balanced_does_not_tie_mismatch_to_questions() -> None:
    settings = SamplerSettings("balanced", 1, 0, 0.5, 0.5)
    plans, _ = take(settings, [16] * 100)
    table = np.zeros((2, 2))
    for stream, *_, bad in rows(plans):
        table[stream, int(bad)] += 1
    assert np.abs(table / 1600 - 0.25).max() < 0.01


def test_natural_mismatches_with_the_given_probability() -> None:
    plans, _ = take(SamplerSettings(seed=1, mismatch=0.5), [125] * 40)
    share = np.mean([r[-1] for r in rows(plans)])
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(5000)


def test_a_share_of_questions_without_questions_is_an_error() -> None:
    with pytest.raises(DataError, match=r"question.*sampler\.question_share"):
        streams_of(BALANCED, [{"cap": 5}], ["cap"], [])
    with pytest.raises(DataError, match="no pairs"):
        streams_of(NATURAL, [{}], ["cap"], [])
