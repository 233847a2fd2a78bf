"""Batches: the same pairs, masks, sentences and answers whatever the ranks and loader workers."""

from __future__ import annotations

import hashlib
import multiprocessing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from model.batch import Batch
from shards.dataset import Dataset, DatasetSpec, open_dataset
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings, build
from shards.order.keys import VERSION
from shards.order.sampler import SamplerState, make_sampler
from shards.order.settings import FamilyWeights, SamplerSettings
from shards.order.streams import Contents, ShardRange
from tests.conftest import files_of, small_records
from trainer.data.batch import BatchSettings, make_batch
from trainer.data.loader import RankSlice, largest_slice, load_steps
from trainer.sections import LoaderSettings

GLOBAL_BATCH = 13
SEED = 4
MODES = {
    "natural": SamplerSettings(window=2),
    "balanced": SamplerSettings(mode="balanced", window=2, mismatch=0.4, question_share=0.7),
    "alternating": SamplerSettings(
        mode="alternating", window=2, families=FamilyWeights(masked=2, matching=1, qa=1)
    ),
    "weighted": SamplerSettings(window=2, source_weights={"vqa": 2.0}),
    "visits": SamplerSettings(window=2, sentences_per_visit=2),
    "short": SamplerSettings(window=2, last_batch="short"),
    "lanes": SamplerSettings(mode="balanced", window=3, lanes=7),
}
IN_PROCESS = LoaderSettings()
NATURAL = MODES["natural"]
every_mode = pytest.mark.parametrize("mode", MODES)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.trainer.data.test_batches"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    settings = BuildSettings("batches", "test", images_per_shard=6)
    build(small_records(25, labels=True), folder / "set", settings)
    return open_dataset(str(folder / "set"), folder / "cache")


@pytest.fixture(scope="module")
def mixed(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two data sets with equal vocabulary and answers, mixed three to one."""
    folder = tmp_path_factory.mktemp("mixed")
    first = Path(data.specs[0].url)
    answers = load_answers(files_of(first) / data.manifest.answers.file)
    settings = BuildSettings(
        "other",
        "test",
        images_per_shard=4,
        vocab=files_of(first) / data.manifest.vocab.file,
        answers=answers,
    )
    build(small_records(14, labels=True, seed=9), folder / "set", settings)
    places = (DatasetSpec(str(first), 3.0), DatasetSpec(str(folder / "set"), 1.0))
    return open_dataset(places, folder / "cache")


def drawn(data: Dataset, mask: float = 0.4) -> BatchSettings:
    return BatchSettings(4, mask, mask, 2, 3, 4, data.manifest.schema.vocab_size)


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
    loader: LoaderSettings = IN_PROCESS,
    state: SamplerState | None = None,
    global_batch: int = GLOBAL_BATCH,
    version: int = VERSION,
) -> list[dict[str, object]]:
    """The pairs of all ranks and micro-batches, put together again in order."""
    sampler = data.sampler(settings, SEED, version)
    state = state or sampler.start()
    ranks = [
        load_steps(
            data,
            sampler,
            replace(drawn(data), order=version),
            RankSlice(rank, world, accumulation),
            state,
            global_batch,
            total,
            loader,
        )
        for rank in range(world)
    ]
    pairs: list[dict[str, object]] = []
    try:
        for step in zip(*ranks, strict=True):
            begin, places, slices = len(pairs), list[int](), list[int]()
            for loaded in step:
                if loaded.missing:
                    raise DataError(loaded.missing.message)
                for batch in loaded.batches:
                    places += batch.offset.tolist()
                    slices += sorted(batch.offset.tolist())
                    edges = data.dataset_pairs[batch.dataset.numpy()]
                    assert (edges <= batch.pair_id.numpy()).all()
                    edges = data.dataset_pairs[batch.dataset.numpy() + 1]
                    assert (batch.pair_id.numpy() < edges).all()
                    pairs += describe(batch)
            assert settings.lanes > 1 or slices == sorted(places)
            order = np.argsort(places)
            assert np.sort(places).tolist() == list(range(len(places)))
            pairs[begin:] = [pairs[begin + i] for i in order.tolist()]
    finally:
        for steps in ranks:
            steps.close()
    return pairs


def _rank(queue: Any, rank: int, arguments: tuple[Any, ...]) -> None:
    (places, cache, text), settings, world, accumulation, workers, state, total = arguments
    data = open_dataset(places, cache, text=text)
    steps = load_steps(
        data,
        data.sampler(settings, SEED),
        drawn(data),
        RankSlice(rank, world, accumulation),
        state,
        GLOBAL_BATCH,
        total,
        LoaderSettings(loader_workers=workers),
    )
    pairs = [
        [(at, p) for b in s.batches for at, p in zip(b.offset.tolist(), describe(b), strict=True)]
        for s in steps
    ]
    queue.put((rank, pairs))


def run_processes(
    data: Dataset,
    settings: SamplerSettings,
    world: int,
    total: int,
    accumulation: int = 1,
    workers: int = 0,
    state: SamplerState | None = None,
) -> list[dict[str, object]]:
    """`run`, with a process for each rank."""
    state = state or data.sampler(settings, SEED).start()
    opened = data.specs, data.cache, data.text
    arguments = (opened, settings, world, accumulation, workers, state, total)
    queue = CONTEXT.Queue()
    ranks = [CONTEXT.Process(target=_rank, args=(queue, r, arguments)) for r in range(world)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    out: list[dict[str, object]] = []
    for step in zip(*(found[r] for r in range(world)), strict=True):
        placed = sorted((pair for part in step for pair in part), key=lambda pair: pair[0])
        out += [p for _, p in placed]
    return out


# Of an epoch and 30 pairs in each mode, by version of the order, as the first lxscale with it made
# them: what is drawn for a pair is as much a part of a run as the order.
GOLDEN = {
    (2, "natural"): "51a0cbbbd1a5764e",
    (2, "balanced"): "55d89787639146dc",
    (2, "alternating"): "97da141acb3c15ab",
    (2, "weighted"): "921f46278e3de89e",
    (2, "visits"): "318a49990093714c",
    (3, "natural"): "4d5d90a6a3bcd42c",
    (3, "balanced"): "9b22baf0663d7c01",
    (3, "alternating"): "4b75ef8096f8d918",
    (3, "weighted"): "56a6286a809df4c3",
    (3, "visits"): "e8e70220c303e700",
}


@pytest.mark.parametrize(("version", "mode"), GOLDEN)
def test_batches_are_what_their_version_says(data: Dataset, version: int, mode: str) -> None:
    found = run(data, MODES[mode], 1, data.manifest.pairs + 30, version=version)
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == GOLDEN[version, mode]


def test_equal_lengths_lie_beside_each_other(data: Dataset) -> None:
    """For attention over true lengths, which takes those beside each other at once."""
    sampler = data.sampler(MODES["natural"], SEED)
    (loaded, *_) = load_steps(
        data, sampler, drawn(data), RankSlice(0, 1, 1), sampler.start(), 24, 24, IN_PROCESS
    )
    (batch,) = loaded.batches
    lengths = list(
        zip(
            batch.num_objects[batch.image_index].tolist(),
            batch.token_start.diff().tolist(),
            strict=True,
        )
    )
    assert lengths == sorted(lengths) and len(set(lengths)) > 4
    assert sorted(batch.offset.tolist()) == list(range(24)) != batch.offset.tolist()


@every_mode
def test_any_world_size_gives_the_same_stream(data: Dataset, mode: str) -> None:
    settings = MODES[mode]
    total = data.manifest.pairs + 30
    expected = run(data, settings, 1, total)
    assert len(expected) == total
    for world in (2, 3, 4, 5, 6, 8, 12, 15):
        accumulation = 1 + world % 3
        assert run(data, settings, world, total, accumulation) == expected, world


def test_data_sets_mixed_by_weight_give_the_same_stream(mixed: Dataset) -> None:
    for mode in ("natural", "balanced", "alternating"):
        settings = MODES[mode]
        expected = run(mixed, settings, 1, 130)
        for world in (2, 5):
            assert run(mixed, settings, world, 130) == expected
        # Sentences of another image are of the pair's own data set.
        edge = int(mixed.dataset_pairs[1])
        for p in expected:
            assert (p["pair"] < edge) == (p["sentence"] < edge)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_loader_workers_gives_the_same_stream(data: Dataset, workers: int) -> None:
    expected = run(data, NATURAL, 1, 60)
    assert run(data, NATURAL, 2, 60, loader=LoaderSettings(loader_workers=workers)) == expected


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_loader_workers_may_start_in_any_way(
    data: Dataset, start: Literal["fork", "spawn", "forkserver"]
) -> None:
    expected = run(data, NATURAL, 1, 60)
    loader = LoaderSettings(loader_workers=2, loader_start=start)
    assert run(data, NATURAL, 1, 60, loader=loader) == expected


@pytest.mark.parametrize(
    ("world", "workers"), [(2, 0), (3, 2), (15, 0), pytest.param(6, 1, marks=pytest.mark.faults)]
)
def test_real_processes_give_the_same_stream(data: Dataset, world: int, workers: int) -> None:
    settings = MODES["balanced"]
    expected = run(data, settings, 1, 80)
    assert run_processes(data, settings, world, 80, workers=workers) == expected


def restored(state: SamplerState) -> SamplerState:
    """As a checkpoint gives it back."""
    stored = TypeAdapter(SamplerState)
    return stored.validate_json(stored.dump_json(state), strict=True)


def states(data: Dataset, settings: SamplerSettings, total: int) -> list[SamplerState]:
    """The state before each step, as a checkpoint gives it back."""
    sampler = data.sampler(settings, SEED)
    steps = sampler.steps_ahead(sampler.start(), GLOBAL_BATCH, total)
    return [restored(s.before) for s in steps]


@every_mode
def test_resuming_at_every_step_gives_the_same_tail(data: Dataset, mode: str) -> None:
    settings = MODES[mode]
    total = data.manifest.pairs + 3 * GLOBAL_BATCH
    expected = run(data, settings, 1, total)
    for i, state in enumerate(states(data, settings, total)):
        assert run(data, settings, 1 + i % 5, total, state=state) == expected[state.consumed :]


def test_resuming_at_every_step_in_new_processes_gives_the_same_tail(data: Dataset) -> None:
    settings = MODES["balanced"]
    total = data.manifest.pairs + 3 * GLOBAL_BATCH
    expected = run(data, settings, 1, total)
    for i, state in enumerate(states(data, settings, total)):
        tail = run_processes(data, settings, 1 + (i + 1) % 3, total, state=state)
        assert tail == expected[state.consumed :], state


def test_chains_of_world_sizes_give_the_same_stream(data: Dataset) -> None:
    for mode in ("natural", "balanced", "alternating"):
        settings = MODES[mode]
        sampler = data.sampler(settings, SEED)
        total = 10 * GLOBAL_BATCH
        expected = run(data, settings, 1, total)
        state, found = sampler.start(), []
        for world in (8, 3, 5, 8, 1):
            found += run(data, settings, world, state.consumed + 2 * GLOBAL_BATCH, state=state)
            for _ in range(2):
                state = sampler.step(state, GLOBAL_BATCH).after
            # Saved twice with no step between: what is restored is the same.
            state = restored(state)
            state = restored(state)
        assert found == expected


def test_resuming_at_an_epochs_very_end_begins_the_next(data: Dataset) -> None:
    settings, pairs = MODES["short"], data.manifest.pairs
    expected = run(data, settings, 1, 2 * pairs)
    at_edge = [s for s in states(data, settings, 2 * pairs) if s.consumed == pairs]
    assert len(at_edge) == 1
    assert run(data, settings, 4, 2 * pairs, state=at_edge[0]) == expected[pairs:]
    ids = [p["pair"] for p in expected[pairs:]]
    assert sorted(ids) == list(range(pairs))


def test_a_changed_global_batch_goes_on_with_the_same_pairs(data: Dataset) -> None:
    for mode in ("natural", "visits"):
        expected = run(data, MODES[mode], 1, 120)
        state = states(data, MODES[mode], 120)[3]
        assert run(data, MODES[mode], 3, 120, state=state, global_batch=20) == expected[39:]
    # Where streams are mixed, each goes on in its own order.
    settings = MODES["balanced"]
    expected = run(data, settings, 1, 120)
    state = states(data, settings, 120)[3]
    changed = run(data, settings, 3, 120, state=state, global_batch=27)
    assert sorted(p["pair"] for p in changed) == sorted(p["pair"] for p in expected[39:])


def test_every_epoch_holds_every_pair_once(data: Dataset) -> None:
    pairs = data.manifest.pairs
    stream = run(data, NATURAL, 3, 3 * pairs)
    for epoch in range(3):
        ids = [p["pair"] for p in stream[epoch * pairs : (epoch + 1) * pairs]]
        assert sorted(ids) == list(range(pairs))
    # The order and the draws are new in each epoch.
    first, second = stream[:pairs], stream[pairs : 2 * pairs]
    assert [p["pair"] for p in first] != [p["pair"] for p in second]
    tokens = {p["pair"]: p["tokens"] for p in first}
    assert any(p["tokens"] != tokens[p["pair"]] for p in second)


def one_batch(data: Dataset, count: int, mask: float, mismatch: float = 0.5) -> Batch:
    sampler = data.sampler(SamplerSettings(mismatch=mismatch), 11)
    pairs = sampler.plan(sampler.step(sampler.start(), count))
    return make_batch(data, sampler, pairs, drawn(data, mask))


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
    m = data.index
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
    missing = {f.name for f in fields(batch) if getattr(batch, f.name) is None}
    assert missing == {
        *("view", "view_pair"),  # of sampler.share_vision alone
        "first_objects",  # of records of two images
        *(f"question_{name}" for name in ("pair", "answered", "answer", "score")),  # fine-tuning's
    }


def test_an_empty_slice_is_a_batch_of_no_pairs(data: Dataset) -> None:
    sampler = data.sampler(NATURAL, SEED)
    empty = sampler.plan(sampler.step(sampler.start(), 4)).take(slice(2, 2))
    batch = make_batch(data, sampler, empty, drawn(data))
    assert len(batch.matched) == len(batch.tokens) == len(batch.answer_pair) == 0


@pytest.mark.parametrize("lanes", [1, 4, 50, 64])
@pytest.mark.parametrize("streams", [1, 12])
def test_memory_for_batches_is_enough_for_slices_of_lanes(lanes: int, streams: int) -> None:
    """A batch that does not fit is made in fresh memory, which costs more than filling it."""
    ranges = [ShardRange(f"d{i}", 20 * i, 20 * i + 20, 1.0 + i % 3) for i in range(streams)]
    contents = Contents(np.full((20 * streams, 1), 90), ["pairs"], [], ranges)
    sampler = make_sampler(SamplerSettings(window=8, lanes=lanes), SEED, contents)
    for world in (1, 3, 8):
        most = largest_slice(sampler, 400, world)
        assert most <= 2 * 400 / world
        steps = list(sampler.steps_ahead(sampler.start(), 400, 20 * 400))
        sizes = [len(sampler.slice(step, rank, world)) for step in steps for rank in range(world)]
        assert np.mean(np.asarray(sizes) <= most) > 0.99
