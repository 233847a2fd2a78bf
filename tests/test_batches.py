"""Batches: the same pairs, masks, sentences and answers whatever the ranks and loader workers."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from model.batch import Batch
from shards.build import BuildSettings, build
from shards.dataset import Dataset, open_dataset
from shards.sampler import (
    SamplerSettings,
    SamplerState,
    Stream,
    advance,
    plan,
    start_state,
    streams_of,
)
from tests.conftest import small_records
from trainer.batch import BatchSettings, make_batch
from trainer.loader import Share, load_steps, steps_ahead

GLOBAL_BATCH = 13
MODES = [
    SamplerSettings(seed=4, window=2),
    SamplerSettings("balanced", 4, 2, mismatch=0.4, question_share=0.7),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    settings = BuildSettings("batches", "test", images_per_shard=6)
    build(small_records(25, labels=True), folder / "set", settings)
    return open_dataset(str(folder / "set"), folder / "cache")


def drawn(data: Dataset, mask: float = 0.4) -> BatchSettings:
    return BatchSettings(4, mask, mask, 2, 3, 4, data.manifest.schema.vocab_size)


def streams(data: Dataset, settings: SamplerSettings) -> tuple[Stream, ...]:
    m = data.manifest
    sizes = [dict(s.pairs_per_source) for s in m.shards]
    return streams_of(settings, sizes, list(m.sources), list(m.question_sources))


def describe(batch: Batch) -> list[dict[str, object]]:
    """Everything that a model sees of each pair, independent of how pairs are put together."""
    objects = batch.features.shape[1]
    shown = batch.features[batch.image_index].float()
    flat = shown.flatten(0, 1)
    flat[batch.zero_position] = 0
    flat[batch.swap_position] = batch.swap_features.float()
    pairs = []
    for i in range(len(batch.matched)):
        begin, end = int(batch.token_start[i]), int(batch.token_start[i + 1])
        words = (batch.lm_position >= begin) & (batch.lm_position < end)
        count = int(batch.num_objects[batch.image_index[i]])
        masked = batch.object_position[batch.object_position // objects == i] - i * objects
        answer = batch.answer_target[batch.answer_pair == i]
        row = int(batch.image_index[i])
        labels = [
            t[row, :count].tolist()
            for t in (batch.object_label, batch.object_conf, batch.attribute_label)
            if t is not None
        ]
        pairs.append(
            {
                "pair": int(batch.pair_id[i]),
                "sentence": int(batch.sentence_id[i]),
                "source": int(batch.source[i]),
                "matched": int(batch.matched[i]),
                "tokens": batch.tokens[begin:end].tolist(),
                "lm": (
                    (batch.lm_position[words] - begin).tolist(),
                    batch.lm_target[words].tolist(),
                ),
                "features": shown[i, :count].numpy().tobytes(),
                "boxes": batch.boxes[row, :count].numpy().tobytes(),
                "masked": masked.tolist(),
                "answer": answer.tolist(),
                "labels": labels,
            }
        )
    return pairs


def run(
    data: Dataset,
    settings: SamplerSettings,
    world: int,
    total: int,
    accumulation: int = 1,
    workers: int = 0,
    state: SamplerState | None = None,
    global_batch: int = GLOBAL_BATCH,
) -> list[dict[str, object]]:
    """The pairs of all ranks and micro-batches, put together again in order."""
    parts = streams(data, settings)
    state = state or start_state(parts)
    ranks = [
        load_steps(
            data,
            settings,
            parts,
            drawn(data),
            Share(rank, world, accumulation),
            steps_ahead(settings, state, global_batch, total),
            workers,
            2,
        )
        for rank in range(world)
    ]
    return [
        pair
        for step in zip(*ranks, strict=True)
        for micro in step
        for batch in micro
        for pair in describe(batch)
    ]


@pytest.mark.parametrize("settings", MODES, ids=["natural", "balanced"])
def test_any_world_size_gives_the_same_stream(data: Dataset, settings: SamplerSettings) -> None:
    total = 2 * data.manifest.pairs + 5
    expected = run(data, settings, 1, total)
    assert len(expected) == total
    for world, accumulation in ((2, 1), (3, 2), (5, 1), (8, 3), (15, 2)):
        assert run(data, settings, world, total, accumulation) == expected, (world, accumulation)


def test_any_number_of_loader_workers_gives_the_same_stream(data: Dataset) -> None:
    expected = run(data, MODES[0], 1, 60)
    for workers in (1, 3):
        assert run(data, MODES[0], 2, 60, workers=workers) == expected


@pytest.mark.parametrize("settings", MODES, ids=["natural", "balanced"])
def test_resuming_at_every_step_gives_the_same_tail(
    data: Dataset, settings: SamplerSettings
) -> None:
    parts, total = streams(data, settings), data.manifest.pairs + 20
    expected = run(data, settings, 1, total)
    state = start_state(parts)
    while state.consumed < total:
        world = 1 + state.consumed % 4
        assert run(data, settings, world, total, state=state) == expected[state.consumed :]
        state = advance(settings, state, min(GLOBAL_BATCH, total - state.consumed))


def test_a_changed_global_batch_goes_on_with_the_same_pairs(data: Dataset) -> None:
    expected = run(data, MODES[0], 1, 120)
    state = SamplerState(39, (39,))
    assert run(data, MODES[0], 3, 120, state=state, global_batch=20) == expected[39:]


def test_every_epoch_holds_every_pair_once(data: Dataset) -> None:
    pairs = data.manifest.pairs
    stream = run(data, MODES[0], 3, 3 * pairs)
    for epoch in range(3):
        ids = [p["pair"] for p in stream[epoch * pairs : (epoch + 1) * pairs]]
        assert sorted(ids) == list(range(pairs))
    # The order and the draws are new in each epoch.
    first, second = stream[:pairs], stream[pairs : 2 * pairs]
    assert [p["pair"] for p in first] != [p["pair"] for p in second]
    tokens = {p["pair"]: p["tokens"] for p in first}
    assert any(p["tokens"] != tokens[p["pair"]] for p in second)


def one_batch(data: Dataset, count: int, mask: float, mismatch: float = 0.5) -> Batch:
    settings = SamplerSettings(seed=11, mismatch=mismatch)
    parts = streams(data, settings)
    return make_batch(
        data, parts, plan(settings, parts, start_state(parts), count), drawn(data, mask)
    )


def test_a_mismatched_sentence_is_another_images_and_uniform(data: Dataset) -> None:
    batch = one_batch(data, 4000, 0.0)
    bad = (batch.matched == 0).numpy()
    image, other = data.image_of(batch.pair_id.numpy()), data.image_of(batch.sentence_id.numpy())
    assert (image[bad] != other[bad]).all()
    assert (batch.sentence_id == batch.pair_id).numpy()[~bad].all()
    assert abs(bad.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    counts = np.bincount(batch.sentence_id.numpy()[bad], minlength=data.manifest.pairs)
    expected = bad.sum() / data.manifest.pairs
    assert ((counts - expected) ** 2 / expected).sum() < 1.6 * data.manifest.pairs


def test_masks_follow_their_probabilities(data: Dataset) -> None:
    batch = one_batch(data, 6000, 0.15, mismatch=0.0)
    words = len(batch.tokens) - 2 * 6000
    assert len(batch.lm_position) / words == pytest.approx(0.15, abs=0.01)
    shown = batch.tokens[batch.lm_position]
    assert float((shown == 4).float().mean()) == pytest.approx(0.8, abs=0.02)
    kept = float((shown == batch.lm_target).float().mean())
    assert kept == pytest.approx(0.1 + 0.1 / data.manifest.schema.vocab_size, abs=0.02)
    objects = int(batch.num_objects[batch.image_index].sum())
    masked = len(batch.object_position)
    assert masked / objects == pytest.approx(0.15, abs=0.01)
    assert len(batch.swap_position) / masked == pytest.approx(0.1, abs=0.03)
    # The last shard has one image: nothing to swap with, so a little more is zeroed.
    assert len(batch.zero_position) / masked == pytest.approx(0.8, abs=0.03)
    assert not set(batch.zero_position.tolist()) & set(batch.swap_position.tolist())


def test_a_swapped_object_is_of_another_image(data: Dataset) -> None:
    batch = one_batch(data, 500, 0.9)
    own = batch.features[batch.image_index]
    objects = own.shape[1]
    assert len(batch.swap_position)
    for position, donor in zip(batch.swap_position.tolist(), batch.swap_features, strict=True):
        pair = position // objects
        assert not any(torch.equal(donor, mine) for mine in own[pair])


def test_answers_are_drawn_by_their_score_for_matched_questions_only(data: Dataset) -> None:
    m = data.merged
    batch = one_batch(data, 6000, 0.0, mismatch=0.3)
    assert (batch.matched[batch.answer_pair] == 1).all()
    has_answers = (np.diff(m.answer_start) > 0)[batch.pair_id.numpy()]
    assert len(batch.answer_pair) == int((has_answers & (batch.matched == 1).numpy()).sum())
    rare = data.answers().index("rare")
    share = float((batch.answer_target == rare).float().mean())
    assert share == pytest.approx(0.3 / 1.3, abs=0.03)


def test_packed_tokens_begin_and_end_with_the_marks(data: Dataset) -> None:
    batch = one_batch(data, 50, 0.0)
    start = batch.token_start
    assert (batch.tokens[start[:-1]] == 2).all() and (batch.tokens[start[1:] - 1] == 3).all()
    assert int(start[-1]) == len(batch.tokens)
    assert {f.name for f in fields(batch) if getattr(batch, f.name) is None} == set()


def test_an_empty_slice_is_a_batch_of_no_pairs(data: Dataset) -> None:
    settings = MODES[0]
    parts = streams(data, settings)
    empty = plan(settings, parts, start_state(parts), 4).slice(2, 2)
    batch = make_batch(data, parts, empty, drawn(data))
    assert len(batch.matched) == len(batch.tokens) == len(batch.answer_pair) == 0
