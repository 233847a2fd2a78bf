"""Pairs of an image that share the masks of its objects: the object-relationship encoder runs once
for them, and nothing else is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.batch import Batch
from model.config import ModelConfig
from model.flops import training_flops
from model.lxmert import Lxmert, init_weights
from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from shards.order.settings import SamplerSettings
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from tests.trainer.test_resume import assert_bitwise, losses
from trainer.config import parse_config
from trainer.data.batch import make_batch, settings_of
from trainer.data.digest import digest
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "set"
    settings = BuildSettings("views", "test", images_per_shard=6)
    build(small_records(30, labels=True), folder, settings)
    return folder


@pytest.fixture
def data(url: Path, tmp_path: Path) -> Dataset:
    return open_dataset(str(url), tmp_path / "cache")


def batches(data: Dataset, settings: SamplerSettings, cuts: list[slice], count: int) -> list[Batch]:
    sampler = data.sampler(settings, 3)
    plan = sampler.plan(sampler.step(sampler.start(), count))
    drawn = settings_of(data, 3, 0.4, 0.4)
    return [make_batch(data, sampler, plan.take(cut), drawn) for cut in cuts]


SHARED = SamplerSettings(sentences_per_visit=4, share_vision=4, lanes=1)


def masks_of(batch: Batch) -> dict[int, set[tuple[str, int]]]:
    """What is done to the objects of each pair, by its place in the step."""
    width = batch.features.shape[1]
    found: dict[int, set[tuple[str, int]]] = {int(i): set() for i in batch.offset}
    for name in ("object_position", "zero_position", "swap_position"):
        for position in getattr(batch, name).tolist():
            found[int(batch.offset[position // width])].add((name, position % width))
    return found


def test_pairs_of_a_view_have_one_image_and_its_masks(data: Dataset) -> None:
    (batch,) = batches(data, SHARED, [slice(0, 60)], 60)
    assert batch.view is not None and batch.view_pair is not None
    assert batch.pairs / 4 <= len(batch.view_pair) < 0.7 * batch.pairs
    masks, first = masks_of(batch), batch.view_pair[batch.view]
    assert torch.equal(batch.image_index, batch.image_index[first])
    for mine, other in zip(batch.offset.tolist(), batch.offset[first].tolist(), strict=True):
        assert masks[mine] == masks[other]
    assert len({frozenset(m) for m in masks.values()}) > 8
    width = batch.features.shape[1]
    found: dict[tuple[int, int], torch.Tensor] = {}
    for position, features in zip(batch.swap_position.tolist(), batch.swap_features, strict=True):
        place = int(batch.view[position // width]), position % width
        assert torch.equal(found.setdefault(place, features), features)
    # Words are masked for each pair by itself.
    assert len(batch.lm_position) > 0.3 * len(batch.tokens) - 2 * batch.pairs


def test_masks_do_not_depend_on_how_a_step_is_cut(data: Dataset) -> None:
    cuts = [slice(0, 11), slice(11, 11), slice(11, 12), slice(12, 40)]
    (whole,) = batches(data, SHARED, [slice(0, 40)], 40)
    parts = batches(data, SHARED, cuts, 40)
    assert masks_of(whole) == {k: v for part in parts for k, v in masks_of(part).items()}
    assert sum(digest(part, 7) for part in parts) % (1 << 64) == digest(whole, 7)


def test_with_one_it_is_what_it_was(data: Dataset) -> None:
    """Bitwise the batches of a sampler that does not share."""
    settings = SamplerSettings(sentences_per_visit=4)
    (plain,) = batches(data, settings, [slice(0, 40)], 40)
    (one,) = batches(data, settings.model_copy(update={"share_vision": 1}), [slice(0, 40)], 40)
    assert plain.view is None and one.view is None
    for name, value in vars(plain).items():
        assert value is None or torch.equal(value, vars(one)[name]), name


def test_the_model_computes_the_same_in_fewer_operations(data: Dataset) -> None:
    (batch,) = batches(data, SHARED, [slice(0, 40)], 40)
    apart = replace(batch, view=None, view_pair=None)
    schema = data.manifest.schema
    config = ModelConfig(
        vocab_size=schema.vocab_size,
        num_answers=200,
        hidden_size=24,
        num_heads=3,
        intermediate_size=40,
        language_layers=1,
        object_layers=2,
        cross_layers=2,
        feature_dim=schema.feature_dim,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = Lxmert(config).double()
    init_weights(model, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    found = []
    for each in (batch, apart):
        model.zero_grad()
        with FlopCounterMode(display=False) as counted:
            out = model(each)
            torch.stack([*out.loss_sum.values()]).sum().backward()
        assert counted.get_total_flops() == training_flops(config, each)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        found.append((out.loss_sum, gradients, counted.get_total_flops()))
    (sums, gradients, fewer), (expected, theirs, more) = found
    assert fewer < more
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-6, atol=0)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.faults
def test_a_run_is_exact_over_faults_and_sizes(url: Path, tmp_path: Path) -> None:
    sampler = {"sentences_per_visit": 4, "share_vision": 2}
    off = {"dropout": 0.0, "attention_dropout": 0.0}

    def tree(name: str, model: dict[str, Any]) -> dict[str, Any]:
        return config_tree(url, tmp_path, name, sampler=sampler, model=model)

    whole, killed = tree("whole", {}), tree("killed", {})
    assert not run_ranks(2, [(whole, None, False), (tree("two", off), None, False)])
    run_ranks(2, [(killed, 5, True)])
    assert not run_ranks(2, [(killed, None, False), (tree("parts", off), 3, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "killed")
    assert not run_ranks(3, [(tree("parts", off), None, False)])
    expected = losses(tree("two", off))
    for step, each in losses(tree("parts", off)).items():
        assert each == pytest.approx(expected[step], rel=1e-5), step


def test_it_needs_pairs_that_come_together(url: Path, tmp_path: Path) -> None:
    for visit in (1, 6):
        sampler = {"sentences_per_visit": visit, "share_vision": 4}
        with pytest.raises(
            ConfigError, match=r"share_vision=4 needs sampler\.sentences_per_visit=4"
        ):
            parse_config(config_tree(url, tmp_path, "run", sampler=sampler), "here")


def test_a_run_of_before_goes_on_and_does_not_change_its_mind(url: Path, tmp_path: Path) -> None:
    run = config_tree(url, tmp_path, "run", sampler={"sentences_per_visit": 4})
    assert not run_ranks(1, [(run, 3, False)])
    shared = config_tree(url, tmp_path, "run", sampler=SHARED.model_dump(mode="json"))
    (error,) = run_ranks(1, [(shared, None, False)])
    assert "sampler.share_vision" in error
    assert np.isfinite([*losses(run)[3].values()]).all()
