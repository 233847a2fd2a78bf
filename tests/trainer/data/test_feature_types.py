"""Training on features of every type: the same pairs and masks, and nearly the same losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.config import ModelConfig
from model.lxmert import Lxmert, pack
from model.stored import decoded
from shards.dataset import DatasetSpec, open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.features import from_uint8, to_uint8
from shards.order.settings import SamplerSettings
from tests.conftest import MakeRecords, files_of
from tests.ranks import config_tree, run_ranks, step_record
from trainer.data.batch import make_batch, settings_of
from trainer.data.digest import digest
from trainer.data.loader import RankSlice, load_steps
from trainer.sections import LoaderSettings

TYPES = ("fp16", "fp32", "uint8")


@pytest.fixture
def sets(tmp_path: Path, make_records: MakeRecords) -> dict[str, Path]:
    """The same records, stored in each type."""
    records = make_records(30, labels=True)
    for kind in TYPES:
        settings = BuildSettings("t", "test", vocab_size=200, images_per_shard=10)
        build(records, tmp_path / kind, replace(settings, feature_type=kind))
    return {kind: tmp_path / kind for kind in TYPES}


def batch_of(folder: Path) -> Batch:
    data = open_dataset(str(folder), folder.parent / "cache")
    sampler = data.sampler(SamplerSettings(), 3)
    plan = sampler.plan(sampler.step(sampler.start(), 24))
    return make_batch(data, sampler, plan, settings_of(data, 3, 0.5, 0.5))


def test_batches_and_losses(sets: dict[str, Path]) -> None:
    batches = {kind: batch_of(folder) for kind, folder in sets.items()}
    half = batches["fp16"]
    assert len(half.zero_position) and len(half.swap_position)
    assert [b.features.dtype for b in batches.values()] == [
        torch.float16,
        torch.float32,
        torch.uint8,
    ]
    for batch in batches.values():
        for name in ("tokens", "image_index", "object_position", "zero_position", "swap_position"):
            assert torch.equal(getattr(batch, name), getattr(half, name)), name
        assert digest(batch, 0) == digest(half, 0), "what the audit compares"
    numbers = {k: decoded(b.features.flatten(0, 1), torch.float32) for k, b in batches.items()}
    assert torch.equal(numbers["fp32"], numbers["fp16"]), "these records are of fp16"
    step = np.ptp(numbers["fp32"].numpy(), axis=1).max() / 255
    assert 0 < (numbers["uint8"] - numbers["fp32"]).abs().max() <= step / 2 * 1.01
    swapped = [decoded(b.swap_features, torch.float32) for b in batches.values()]
    assert torch.equal(swapped[0], swapped[1])
    for batch in batches.values():
        packed = pack(batch, torch.float32)
        used = packed.features[packed.feature]
        assert int((used == 0).all(1).sum()) >= len(batch.zero_position), "zero is exactly zero"
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=200,
        num_answers=40,
        hidden_size=24,
        num_heads=3,
        intermediate_size=40,
        language_layers=1,
        object_layers=1,
        cross_layers=1,
        feature_dim=8,
    )
    model = Lxmert(config).eval()
    losses = {kind: model(batch).loss_sum for kind, batch in batches.items()}
    for name, due in losses["fp16"].items():
        assert losses["fp32"][name].item() == due.item()
        assert losses["uint8"][name].item() == pytest.approx(due.item(), rel=2e-2), name


@pytest.mark.parametrize("kind", ["fp32", "uint8"])
def test_loader_processes_hand_over_the_same(sets: dict[str, Path], kind: str) -> None:
    data = open_dataset(str(sets[kind]), sets[kind].parent / "cache")
    sampler = data.sampler(SamplerSettings(), 3)
    made = []
    for workers in (0, 2):
        steps = load_steps(
            data,
            sampler,
            settings_of(data, 3, 0.5, 0.5),
            RankSlice(0, 1, 1),
            sampler.start(),
            12,
            36,
            LoaderSettings(loader_workers=workers),
        )
        made.append(
            [(b.features.clone(), b.swap_features.clone()) for s in steps for b in s.batches]
        )
    assert len(made[0]) == len(made[1]) == 3
    for one, other in zip(*made, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_types_do_not_mix(sets: dict[str, Path], tmp_path: Path, make_records: MakeRecords) -> None:
    first = sets["fp16"]
    settings = BuildSettings("u", "test", vocab=first, feature_type="uint8")
    answers = json.loads((files_of(first) / "answers.json").read_text())
    build(make_records(5, labels=True, seed=4), tmp_path / "u", replace(settings, answers=answers))
    with pytest.raises(DataError, match="another type of features"):
        open_dataset(
            [DatasetSpec(str(first)), DatasetSpec(str(tmp_path / "u"))], tmp_path / "cache"
        )


@pytest.mark.parametrize("width", [8, 6, 7], ids=["of fours", "as VinVL's 2054", "odd"])
def test_any_rows_of_uint8_are_decoded(width: int) -> None:
    """None, one, or some from the middle: where they begin in memory need not suit fp32."""
    rows = to_uint8(np.random.default_rng(0).normal(size=(6, width)).astype(np.float32))
    for part in (slice(0), slice(1), slice(1, 2), slice(3, 4), slice(1, 5)):
        found = decoded(torch.from_numpy(rows)[part], torch.float32)
        np.testing.assert_array_equal(found.numpy(), from_uint8(rows[part]))


def test_runs_of_each_type_learn_the_same(tmp_path: Path, make_records: MakeRecords) -> None:
    """Whole runs, of a width that is no multiple of four and with steps that mask one object or
    none: the same pairs and masks, and nearly the same losses."""
    records = make_records(30, labels=True, feature_dim=6)
    jobs = []
    for kind in TYPES:
        settings = BuildSettings("t", "test", vocab_size=200, images_per_shard=10)
        build(records, tmp_path / kind, replace(settings, feature_type=kind))
        tree = config_tree(
            tmp_path / kind,
            tmp_path,
            f"run-{kind}",
            model={"dropout": 0.0, "attention_dropout": 0.0},
            objectives={"object_mask": 0.05},
            train={"steps": 6, "global_batch": 12},
        )
        jobs.append((tree, None, False))
    assert not run_ranks(1, jobs)
    half, single, byte = (step_record(tree) for tree, _, _ in jobs)
    assert len(half) == len(single) == len(byte) == 6
    for step, due in half.items():
        for name, value in due.items():
            if not name.startswith("loss"):
                continue
            assert single[step][name] == value, "these records are of fp16"
            assert byte[step][name] == pytest.approx(value, rel=2e-2, abs=1e-3), name
