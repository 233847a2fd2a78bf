"""Batches on their way to the device: one is copied while the one before it is used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from model.batch import Batch
from model.config import ModelConfig
from step_batches import make_batch
from trainer.step.copying import copied, to_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
REAL = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def batches(count: int) -> list[Batch]:
    return [make_batch(ModelConfig(), 2 + i, i) for i in range(count)]


@pytest.mark.parametrize("device", [*REAL, "meta"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_arrive_in_their_order(count: int, device: str) -> None:
    given = batches(count)
    found = list(copied(given, torch.device(device)))
    assert [b.pairs for b in found] == [b.pairs for b in given]
    for here, there in zip(given, found, strict=True):
        assert there.features.device.type == device
        assert there.extent == here.extent
        if device != "meta":
            assert torch.equal(there.features.cpu(), here.features)
            assert torch.equal(there.tokens.cpu(), here.tokens)


def test_each_is_begun_before_the_one_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    to = Batch.to

    def noted(batch: Batch, device: torch.device | str) -> Batch:
        told.append(f"begin {batch.pairs}")
        return to(batch, device)

    monkeypatch.setattr(Batch, "to", noted)
    found = copied(batches(3), torch.device("cpu"))
    assert told == ["begin 2"]  # at once
    for batch in found:
        told.append(f"use {batch.pairs}")
    assert told == ["begin 2", "begin 3", "use 2", "begin 4", "use 3", "use 4"]


@pytest.mark.parametrize("device", REAL)
def test_numbers_arrive_exactly(device: str) -> None:
    numbers = [1 / 3, 1e-300, 2.0**53 + 1]
    found = to_device(numbers, torch.device(device))
    assert found.dtype == torch.float64 and found.tolist() == numbers
    assert to_device([], torch.device(device)).shape == (0,)


@needs_gpu
def test_the_host_does_not_wait_for_a_gpu() -> None:
    """A batch's memory is used anew only when what was to be done with it is."""
    device = torch.device("cuda")
    given = [batch.pin_memory() for batch in batches(8)]
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            for batch in copied(given, device):
                torch.cuda._sleep(1_000_000)  # what follows is late
                sums.append(batch.features.double().sum())
                del batch
            to_device([1.0, 2.0], device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [float(b.features.double().sum()) for b in given] * 20
    assert [float(s) for s in sums] == pytest.approx(expected)
