"""data.text=window: words come with their shards, and sentences from the pair's neighbourhood."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.dataset import Dataset, DatasetSpec, open_dataset
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings, build
from shards.order.settings import FamilyWeights, SamplerSettings
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from tests.trainer.data.test_batches import GLOBAL_BATCH, SEED, drawn, run, run_processes, states
from trainer.audit import audit
from trainer.data.batch import make_batch
from trainer.sections import LoaderSettings

MODES = {
    "natural": SamplerSettings(window=3),
    "balanced": SamplerSettings(mode="balanced", window=2, mismatch=0.4, question_share=0.7),
    "alternating": SamplerSettings(
        mode="alternating", window=2, families=FamilyWeights(masked=2, matching=1, qa=1)
    ),
    "weighted": SamplerSettings(window=2, source_weights={"vqa": 2.0}),
    "visits": SamplerSettings(window=2, sentences_per_visit=2),
}
every_mode = pytest.mark.parametrize("mode", MODES)


def built(folder: Path, name: str, images: int, **settings: Any) -> str:
    given = BuildSettings(name, "test", images_per_shard=4, **settings)
    build(small_records(images, labels=True, seed=images), folder / name, given)
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window")
    built(folder, "set", 38)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return open_dataset(str(folder / "set"), folder / "cache", text="window")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Dataset:
    return open_dataset(str(folder / "set"), folder / "cache")


SENTENCE = ("sentence", "tokens", "lm")  # what another sentence changes


@every_mode
def test_all_but_the_other_sentences_are_as_in_all(
    data: Dataset, whole: Dataset, mode: str
) -> None:
    total = data.manifest.pairs + 30
    found, expected = (run(d, MODES[mode], 1, total) for d in (data, whole))
    others = 0
    for one, two in zip(found, expected, strict=True):
        left_out = () if one["matched"] else SENTENCE
        others += not one["matched"]
        for key in one.keys() - set(left_out):
            assert one[key] == two[key], key
    assert others > 10


@every_mode
def test_another_sentence_is_of_another_image_of_the_neighbourhood(
    data: Dataset, whole: Dataset, mode: str
) -> None:
    sampler = data.sampler(MODES[mode], SEED)
    for step in sampler.steps_ahead(sampler.start(), GLOBAL_BATCH, 2 * data.manifest.pairs):
        plan = sampler.plan(step)
        batch = make_batch(data, sampler, plan, drawn(data))
        plan = plan.take(batch.offset.numpy())
        image = whole.image_of(batch.pair_id.numpy())
        shown = whole.image_of(batch.sentence_id.numpy())
        assert ((image != shown) == plan.mismatched).all()
        shard = whole.shard_of_image(shown)
        where = (plan.stream, plan.epoch, plan.window, plan.lane)
        for i in np.flatnonzero(plan.mismatched).tolist():
            assert shard[i] in sampler.neighbourhood(*(int(x[i]) for x in where))


def test_every_other_sentence_of_the_neighbourhood_is_equally_likely(
    data: Dataset, whole: Dataset
) -> None:
    """One pair over many epochs of a window of all shards, where all are in its neighbourhood."""
    sampler = data.sampler(SamplerSettings(mismatch=1.0), SEED)
    shown: Counter[int] = Counter()
    pairs = data.manifest.pairs
    for step in sampler.steps_ahead(sampler.start(), pairs, 60 * pairs):
        batch = make_batch(data, sampler, sampler.plan(step), drawn(data))
        shown.update(batch.sentence_id[batch.pair_id == 5].tolist())
        shown.update(batch.sentence_id[batch.pair_id == pairs - 1].tolist())
    # Most sentences are drawn, none very often: 120 draws from about 75.
    assert len(shown) > 0.6 * pairs and max(shown.values()) <= 9


@pytest.mark.parametrize("mode", ["natural", "balanced", "alternating"])
def test_world_sizes_workers_and_restarts_give_the_same_stream(data: Dataset, mode: str) -> None:
    settings, total = MODES[mode], 110
    expected = run(data, settings, 1, total)
    for world in (2, 5):
        assert run(data, settings, world, total, accumulation=2) == expected, world
    assert run(data, settings, 2, total, loader=LoaderSettings(loader_workers=2)) == expected
    for state in states(data, settings, total)[::3]:
        assert run(data, settings, 1, total, state=state) == expected[state.consumed :]


def test_real_processes_give_the_same_stream(data: Dataset) -> None:
    expected = run(data, MODES["balanced"], 1, 80)
    assert run_processes(data, MODES["balanced"], 2, 80, workers=2) == expected


def test_data_sets_that_are_mixed_keep_to_their_own_sentences(
    data: Dataset, whole: Dataset, folder: Path
) -> None:
    first = Path(data.specs[0].url)
    vocab = next(first.rglob(data.manifest.vocab.file))
    answers = load_answers(next(first.rglob(data.manifest.answers.file)))
    other = built(folder, "other", 14, vocab=vocab, answers=answers)
    places = (DatasetSpec(str(first), 3.0), DatasetSpec(other, 1.0))
    mixed = open_dataset(places, folder / "cache", text="window")
    expected = run(mixed, MODES["natural"], 1, 130)
    assert run(mixed, MODES["natural"], 3, 130) == expected
    edge = int(mixed.dataset_pairs[1])
    assert {p["pair"] < edge for p in expected} == {True, False}
    for p in expected:
        assert (p["pair"] < edge) == (p["sentence"] < edge)


def test_no_more_tables_are_held_than_those_in_use(folder: Path) -> None:
    data = open_dataset(str(folder / "set"), folder / "cache", text="window")
    assert data.tables and len(data.index.shard) == 0
    most = 0
    sampler = data.sampler(SamplerSettings(window=2), SEED)
    for step in sampler.steps_ahead(sampler.start(), GLOBAL_BATCH, data.manifest.pairs):
        plan = sampler.plan(step)
        make_batch(data, sampler, plan, drawn(data))
        most = max(most, len(data.tables.index(np.unique(plan.shard)).shard))
    assert most <= 4 < len(data.manifest.shards)


def test_a_neighbourhood_of_one_image_has_that_of_the_shard_beside(tmp_path: Path) -> None:
    settings = BuildSettings("one", "test", images_per_shard=1)
    build(small_records(5), tmp_path / "one", settings)
    data = open_dataset(str(tmp_path / "one"), tmp_path / "cache", text="window")
    whole = open_dataset(str(tmp_path / "one"), tmp_path / "cache")
    pairs = data.manifest.pairs
    for lanes in (1, 1000):
        sampler = data.sampler(SamplerSettings(window=1, lanes=lanes, mismatch=1.0), SEED)
        plan = sampler.plan(sampler.step(sampler.start(), pairs))
        batch = make_batch(data, sampler, plan, drawn(data))
        of = [whole.image_of(x.numpy()) for x in (batch.pair_id, batch.sentence_id)]
        assert (of[0] != of[1]).all()
        # With all others lost there is none.
        left = plan.without([1, 2, 3, 4])
        with pytest.raises(DataError, match=r"two images, .*shard-000000.* there is one"):
            make_batch(data, sampler, left, drawn(data), skipped=[1, 2, 3, 4])


def test_captions_of_one_image_are_mismatched_with_the_shard_of_the_next_number(
    tmp_path: Path,
) -> None:
    """Their stream has no shard beside it in any order."""
    records = small_records(9, seed=1)
    only = next(i for i in range(1, 9) if not records[i].sentences[0].answers)
    records = [
        r if i == only else replace(r, sentences=tuple(s for s in r.sentences if s.answers))
        for i, r in enumerate(records)
    ]
    build(records, tmp_path / "one", BuildSettings("one", "test", images_per_shard=1))
    data = open_dataset(str(tmp_path / "one"), tmp_path / "cache", text="window")
    whole = open_dataset(str(tmp_path / "one"), tmp_path / "cache")
    settings = SamplerSettings(mode="balanced", window=2, mismatch=1.0)
    sampler = data.sampler(settings, SEED)
    plan = sampler.plan(sampler.step(sampler.start(), 40))
    batch = make_batch(data, sampler, plan, drawn(data))
    own, shown = (
        whole.shard_of_image(whole.image_of(x.numpy())) for x in (batch.pair_id, batch.sentence_id)
    )
    assert (own == only).any() and (own != shown).any()
    assert set(shown[(own == only) & plan.mismatched].tolist()) <= set(range(9)) - {only}


@pytest.mark.faults
def test_a_run_is_proved_and_its_text_is_part_of_its_data_state(
    folder: Path, tmp_path: Path
) -> None:
    def tree(text: str) -> dict[str, Any]:
        return config_tree(
            folder / "set", tmp_path, "run", data={"text": text}, sampler={"window": 2}
        )

    run_ranks(2, [(tree("window"), 4, True)])
    assert not run_ranks(1, [(tree("window"), 2, False)])
    (error,) = run_ranks(1, [(tree("all"), None, False)])
    assert "data.text: checkpoint 'window', now 'all'" in error
    assert not run_ranks(3, [(tree("window"), None, False)])
    shutil.rmtree(tmp_path / "cache")
    found = audit(str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    assert found.problems == []
    assert not list((tmp_path / "cache").glob("merged-*"))
