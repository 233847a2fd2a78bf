"""`train.strict`: bitwise the same training at every number of workers, and the training that it
is without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from shards.order.settings import SamplerSettings
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks, step_record
from tests.trainer.test_guard import BAD, spoil
from tests.trainer.test_resume import assert_bitwise, losses, state_of
from trainer.checkpoint.compare import step_settings
from trainer.config import parse_config
from trainer.data.loader import RankSlice
from trainer.errors import ConfigError
from trainer.step.optimizer import AdamW, BertAdam
from trainer.step.strict import _UNIT, _add, _move

V = 6
CASES = [(1, "fp32"), (0, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strict") / "set"
    build(
        small_records(30, labels=True), folder, BuildSettings("strict", "test", images_per_shard=8)
    )
    return folder


def tree(data: Path, storage: Path, name: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A strict run with dropout, slices of unlike sizes, and gradients that are clipped."""
    train = {"strict": V, "accumulation": 1, "zero_stage": 1, **sections.pop("train", {})}
    optimizer = {"clip_norm": 0.5, **sections.pop("optimizer", {})}
    return config_tree(data, storage, name, train=train, optimizer=optimizer, **sections)


@pytest.mark.parametrize(
    "cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.faults)], ids=["one", "others"]
)
def test_every_number_of_workers_trains_bitwise_the_same(
    data: Path, tmp_path: Path, cases: list[tuple[int, str]]
) -> None:
    """Weights, moments and losses; another ZeRO stage makes no difference either."""
    others = (2, 3, 6) if len(cases) > 1 else (3,)
    for world in (1, *others):
        jobs = [
            tree(data, tmp_path, f"{s}-{p}-{world}", train={"zero_stage": s, "precision": p})
            for s, p in cases
        ]
        assert not run_ranks(world, [(job, None, False) for job in jobs])
    for stage, precision in cases:
        for world in others:
            one, other = f"{stage}-{precision}-1", f"{stage}-{precision}-{world}"
            assert_bitwise(tmp_path / one, tmp_path / other)
            a, b = (losses(tree(data, tmp_path, name)) for name in (one, other))
            assert a == b and len(a) == 8
    if len(cases) > 1:
        assert_bitwise(tmp_path / "0-fp32-1", tmp_path / "2-fp32-3")


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"name": "bert_adam"}},
        {"sampler": {"lanes": 5, "window": 2}},
        {"sampler": {"mode": "alternating"}, "data": {"loader_workers": 2}},
        {"optimizer": {"clip_norm": 0.0}},
    ],
    ids=["bert_adam", "lanes", "alternating", "unclipped"],
)
@pytest.mark.faults
def test_whatever_else_a_run_is(data: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    for world in (1, 3):
        job = tree(data, tmp_path, f"run-{world}", **sections)
        assert not run_ranks(world, [(job, None, False)])
    assert_bitwise(tmp_path / "run-1", tmp_path / "run-3")


def test_a_strict_step_is_the_usual_one_but_for_rounding(data: Path, tmp_path: Path) -> None:
    """Without dropout, against DeepSpeed's own backward, reduction, clipping and step."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    strict = tree(data, tmp_path, "strict", model=off)
    usual = tree(data, tmp_path, "usual", model=off, train={"strict": 0, "accumulation": 2})
    assert not run_ranks(1, [(strict, None, False), (usual, None, False)])
    found, expected = losses(strict), losses(usual)
    for step, values in expected.items():
        for name, value in values.items():
            assert found[step][name] == pytest.approx(value, rel=1e-5), (step, name)
    (_, a), (_, b) = (state_of(tmp_path / name) for name in ("strict", "usual"))
    for name in a:
        assert np.allclose(a[name]["exp_avg"], b[name]["exp_avg"], rtol=1e-3, atol=1e-7), name
        assert np.allclose(a[name]["master"], b[name]["master"], rtol=1e-3, atol=1e-5), name


@pytest.mark.faults
def test_kills_and_other_numbers_of_workers_leave_no_trace(data: Path, tmp_path: Path) -> None:
    """1, 4, 2 and 3 workers, each killed, against one that is let alone."""
    train = {"strict": 12, "steps": 16, "global_batch": 31}
    whole, parts = (tree(data, tmp_path, name, train=train) for name in ("whole", "parts"))
    assert not run_ranks(2, [(whole, None, False)])
    for world, end in ((1, 4), (4, 5), (2, 4), (3, 5)):
        run_ranks(world, [(parts, end, True)])
    assert not run_ranks(1, [(parts, None, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "parts")
    assert losses(whole) == losses(parts)


@pytest.mark.faults
def test_a_step_that_is_not_finite_is_skipped_by_all(data: Path, tmp_path: Path) -> None:
    """A rate that makes weights overflow: the same step ends both runs."""
    wild = {"lr": 1e30, "clip_norm": 0.0}
    said = []
    for world in (1, 3):
        job = tree(
            data, tmp_path, f"wild-{world}", optimizer=wild, train={"max_skipped_updates": 2}
        )
        errors = run_ranks(world, [(job, None, False)])
        assert len(errors) == world and len(set(errors)) == 1, errors
        said.append(errors[0])
    assert "DivergedError" in said[0] and said[0] == said[1]


@pytest.mark.faults
def test_a_bad_step_of_one_rank_is_left_out_by_all(data: Path, tmp_path: Path) -> None:
    """A loss, a gradient, or one beyond fixed point, of the step's first micro-batch: `spoil` sees
    to it that no weight, moment or count changes."""
    for world in (1, 2, 3):
        run = tree(data, tmp_path, f"bad-{world}")
        assert not run_ranks(world, [(run, None, False)], prepare=partial(spoil, BAD, only=0))
        assert state_of(tmp_path / f"bad-{world}")[0].manifest.skipped_updates == len(BAD)
        counts = [e["skipped_updates"] for _, e in sorted(step_record(run).items())]
        assert counts == [1, 1, 2, 3, 3, 4, 4, 4]
        assert_bitwise(tmp_path / "bad-1", tmp_path / f"bad-{world}")


@pytest.mark.parametrize("lanes", [1, 4, 5])
def test_a_rank_looks_ahead_in_the_lanes_of_its_micro_batches(
    data: Path, tmp_path: Path, lanes: int
) -> None:
    """Micro-batches are those of as many ranks. With fewer lanes than micro-batches, a rank's may
    be of other lanes than those of a rank that takes its part of a step in one."""
    opened = open_dataset(str(data), str(tmp_path))
    sampler = opened.sampler(SamplerSettings(lanes=lanes, window=2), 5)
    for step in sampler.steps_ahead(sampler.start(), 13, 100):
        expected = [sampler.slice(step, v, 12).offset.tolist() for v in range(12)]
        assert sorted(at for part in expected for at in part) == list(range(step.count))
        for world in (1, 2, 3, 4, 6, 12):
            made = []
            for rank in range(world):
                part = RankSlice(rank, world, 12 // world, strict=True)
                first, last = part.lanes(sampler)
                for plan in part.micro_batches(sampler, step):
                    made.append(plan.offset.tolist())
                    assert ((plan.lane >= first) & (plan.lane < last)).all(), (world, rank)
            assert made == expected


def test_gradients_are_whole_numbers_or_known_not_to_be() -> None:
    total = torch.zeros(3, dtype=torch.int64)
    parameters = [torch.zeros(2), torch.zeros(1)]
    assert _add(total, [torch.tensor([1.0, -(2.0**-44)]), None], parameters, V)
    assert total.tolist() == [2**44, -1, 0]
    for bad in (float("nan"), float("inf"), 2.0**18 / V):
        assert not _add(total, [torch.tensor([bad, 0.0]), torch.ones(1)], parameters, V)
    assert _UNIT * 2**44 == 1


@pytest.mark.parametrize("kind", [AdamW, BertAdam])
def test_where_a_partition_begins_makes_no_difference(kind: Any) -> None:
    """Bitwise; and against the optimizer itself, but for rounding."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1003, generator=generator)
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
    whole = [first.clone(), torch.zeros(1003), torch.zeros(1003)]
    pieces = [t.clone() for t in whole]
    weight = first.clone().requires_grad_()
    optimizer = kind([weight], **settings)
    for step in range(1, 6):
        grad = torch.randn(1003, generator=generator)
        number = step if kind is AdamW else None
        _move(whole, grad, settings, number)
        for begin, end in ((0, 1), (1, 8), (8, 333), (333, 1003)):
            _move([t[begin:end] for t in pieces], grad[begin:end], settings, number)
        weight.grad = grad
        optimizer.step()
    assert all(a.equal(b) for a, b in zip(whole, pieces, strict=True))
    assert torch.allclose(whole[0], weight.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"zero_stage": 3}, "train.zero_stage 0, 1 and 2"),
        ({"accumulation": 2}, "leave train.accumulation out"),
    ],
)
def test_what_does_not_go_together_is_named(
    data: Path, tmp_path: Path, train: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(tree(data, tmp_path, "wrong", train=train), "test")


@pytest.mark.faults
def test_a_strict_run_does_not_go_on_otherwise(data: Path, tmp_path: Path) -> None:
    first = tree(data, tmp_path, "run")
    assert not run_ranks(1, [(first, 3, False)])
    (error,) = run_ranks(1, [(tree(data, tmp_path, "run", train={"strict": 4}), None, False)])
    assert "train.strict: checkpoint 6, now 4" in error
    # A number of ranks that the configuration does not know of.
    errors = run_ranks(4, [(first, None, False)])
    assert len(errors) == 4 and all("give cluster.workers one of 1, 2, 3, 6" in e for e in errors)


def test_a_run_of_a_version_without_strict_was_not_strict() -> None:
    tree: dict[str, Any] = {"data": {"train": "x"}, "train": {"steps": 1}}
    config = parse_config(tree, "test").model_dump(mode="json")
    del config["train"]["strict"]
    assert step_settings(config, {})["train.strict"] == 0
