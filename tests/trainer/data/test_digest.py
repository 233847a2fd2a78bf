"""A digest covers all that the model is shown of a pair, however a step is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.batch import Batch
from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from shards.order.settings import SamplerSettings
from tests.conftest import small_records
from trainer.data.batch import draw_batch, make_batch, settings_of
from trainer.data.digest import digest


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[list[Batch]]:
    """A step of 40 pairs, whole and in three slices, of which one is empty."""
    folder = tmp_path_factory.mktemp("digest")
    build(small_records(30), folder / "set", BuildSettings("digest", "test", images_per_shard=6))
    data = open_dataset(str(folder / "set"), folder / "cache")
    sampler = data.sampler(SamplerSettings(), 3)
    plan = sampler.plan(sampler.step(sampler.start(), 40))
    drawn = settings_of(data, 3, 0.4, 0.4)
    cuts = [[slice(0, 40)], [slice(0, 11), slice(11, 11), slice(11, 40)]]
    return [[make_batch(data, sampler, plan.take(cut), drawn) for cut in row] for row in cuts]


def test_slices_add_up(slices: list[list[Batch]]) -> None:
    for version in (1, 2):
        (whole,), parts = ([digest(b, 100, version) for b in row] for row in slices)
        assert sum(parts) % (1 << 64) == whole
        assert whole != digest(slices[0][0], 101, version)


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        "lm_position",
        "lm_target",
        "object_position",
        "zero_position",
        "swap_position",
        "matched",
        "answer_target",
        "answer_pair",
        "num_objects",
        "pair_id",
        "sentence_id",
        "offset",
    ],
)
def test_one_other_number_is_another_digest(slices: list[list[Batch]], name: str) -> None:
    batch = slices[0][0]
    values = getattr(batch, name).clone()
    values[1] ^= 1
    assert digest(replace(batch, **{name: values}), 0) != digest(batch, 0)


def test_no_tar_is_needed_for_it(tmp_path: Path) -> None:
    build(small_records(9), tmp_path / "set", BuildSettings("digest", "test"))
    data = open_dataset(str(tmp_path / "set"), tmp_path / "cache")
    sampler = data.sampler(SamplerSettings(), 3)
    plan = sampler.plan(sampler.step(sampler.start(), 9))
    drawn = settings_of(data, 3, 0.4, 0.4)
    expected = digest(make_batch(data, sampler, plan, drawn), 0)
    for tar in (tmp_path / "set").rglob("*.tar"):
        tar.unlink()
    assert digest(draw_batch(data, sampler, plan, drawn).batch, 0) == expected
