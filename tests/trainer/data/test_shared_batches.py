"""Batches in shared slots: equal to the batch that was made, reused only when nobody reads them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch
from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from shards.order.settings import SamplerSettings
from tests.conftest import small_records
from trainer.data.batch import BatchSettings, make_batch
from trainer.data.shared_batches import Packed, SharedBatches, make_in_slot


@pytest.fixture(scope="module", params=[True, False], ids=["labels", "no labels"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("slots")
    build(small_records(20, labels=request.param), folder / "set", BuildSettings("slots", "test"))
    return open_dataset(str(folder / "set"), folder / "cache")


def maker(data: Dataset, count: int) -> Callable[..., Batch]:
    sampler = data.sampler(SamplerSettings(), 4)
    pairs = sampler.plan(sampler.step(sampler.start(), count))
    drawn = BatchSettings(4, 0.4, 0.4, 2, 3, 4, data.manifest.schema.vocab_size)
    return lambda empty: make_batch(data, sampler, pairs, drawn, empty)


def assert_equal(one: Batch, other: Batch) -> None:
    for f in fields(Batch):
        a, b = getattr(one, f.name), getattr(other, f.name)
        assert (a is None) == (b is None), f.name
        if a is not None:
            assert a.dtype == b.dtype and torch.equal(a, b), f.name


def plain(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.empty(shape, dtype))


@pytest.mark.parametrize("count", [0, 1, 17])
def test_a_batch_in_a_slot_is_the_batch(data: Dataset, count: int) -> None:
    slots = SharedBatches(1, 2, 1 << 20)
    packed = make_in_slot(slots, 0, maker(data, count))
    if count:
        assert isinstance(packed, Packed)
    batch = slots.read(packed) if isinstance(packed, Packed) else packed
    assert_equal(batch, maker(data, count)(plain))


def test_a_slot_is_free_when_no_tensor_of_it_is_left(data: Dataset) -> None:
    slots = SharedBatches(2, 1, 1 << 20)
    packed = make_in_slot(slots, 1, maker(data, 5))
    assert isinstance(packed, Packed) and slots.take(1) is None
    batch = slots.read(packed)
    kept = batch.features.view(-1)[3:]
    expected = kept.clone()
    del batch
    gc.collect()
    # The last view still holds it: another batch goes elsewhere.
    assert isinstance(make_in_slot(slots, 1, maker(data, 9)), Batch)
    assert torch.equal(kept, expected)
    del kept
    gc.collect()
    assert slots.take(1) == packed.slot
    assert slots.take(0) == 0  # the other group's own


def test_a_batch_that_does_not_fit_goes_without_a_slot(data: Dataset) -> None:
    whole = maker(data, 40)(plain)
    assert 2 * whole.features.numel() < 1 << 21
    slots = SharedBatches(1, 1, 1)  # one huge page
    slots._shape = (1, 1, 2 * whole.features.numel() + 64)  # room for features, not for the rest
    for _ in range(2):
        made = make_in_slot(slots, 0, maker(data, 40))
        assert isinstance(made, Batch)
        assert_equal(made, whole)
    slots._shape = (1, 1, 64)
    made = make_in_slot(slots, 0, maker(data, 40))
    assert isinstance(made, Batch)
    assert_equal(made, whole)


def test_a_failure_gives_the_slot_back(data: Dataset, tmp_path: Path) -> None:
    def broken(empty: Callable[..., torch.Tensor]) -> Batch:
        empty((1, 1, 1), "<f2")
        raise OSError("disk")

    slots = SharedBatches(1, 1, 1 << 20)
    with pytest.raises(OSError, match="disk"):
        make_in_slot(slots, 0, broken)
    assert slots.take(0) == 0


def test_slots_of_one_process_are_used_again_too(data: Dataset) -> None:
    slots = SharedBatches(1, 1, 1 << 20, shared=False)
    batch = make_in_slot(slots, 0, maker(data, 9))
    assert isinstance(batch, Batch) and slots.take(0) is None
    assert_equal(batch, maker(data, 9)(plain))
    kept = batch.features[1:]
    del batch
    assert slots.take(0) is None
    del kept
    assert slots.take(0) == 0
