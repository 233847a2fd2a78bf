"""Settings that are changed on resume: refused with the difference shown where a step would train
otherwise, told where they may change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from model.config import ModelConfig
from model.objectives import OBJECTIVES
from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from trainer.checkpoint.compare import check_settings, step_settings
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.restore import parameter_shapes
from trainer.config import parse_config
from trainer.model import build_model
from trainer.sections import ObjectiveSection, OptimizerSection


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "set"
    build(small_records(20, labels=True), folder, BuildSettings("settings", "test"))
    return folder


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("optimizer", {"lr": 1e-3}, "optimizer.lr: checkpoint 0.005, now 0.001"),
    ("optimizer", {"name": "bert_adam"}, "optimizer.name: checkpoint 'adamw', now 'bert_adam'"),
    ("optimizer", {"betas": [0.8, 0.99]}, "optimizer.betas: checkpoint [0.9, 0.999], now [0.8, "),
    ("optimizer", {"no_decay": ["bias"]}, "optimizer.no_decay: checkpoint ['bias', 'LayerNorm'], "),
    ("model", {"dropout": 0.2}, "model.dropout: checkpoint 0.1, now 0.2"),
    ("model", {"num_heads": 4}, "model.num_heads: checkpoint 2, now 4"),
    ("objectives", {"qa": 0}, "objectives.qa: checkpoint 1.0, now 0.0"),
    (
        "objectives",
        {"label_scope": "all"},
        "objectives.label_scope: checkpoint 'masked', now 'all'",
    ),
]


def test_a_changed_step_is_refused_before_anything_is_read(data: Path, tmp_path: Path) -> None:
    assert not run_ranks(1, [(config_tree(data, tmp_path, "run"), 2, False)])
    for path in (tmp_path / "run/checkpoints/objects").iterdir():
        path.write_bytes(b"torn")
    for section, change, text in CHANGES:
        tree = config_tree(data, tmp_path, "run", **{section: change})
        (error,) = run_ranks(1, [(tree, None, False)])
        assert error.startswith(
            f"ConfigError: the checkpoint was trained with other settings: {text}"
        )
        assert "checkpoint.override_settings=true" in error and error.count("now ") == 1


def test_an_override_goes_on_and_is_the_new_norm(data: Path, tmp_path: Path) -> None:
    change: dict[str, Any] = {"optimizer": {"lr": 1e-3}, "objectives": {"qa": 0.5}}
    first, new = (config_tree(data, tmp_path, "run", **c) for c in ({}, change))
    assert not run_ranks(1, [(first, 2, False)])
    override = {"override_settings": True}
    forced = config_tree(data, tmp_path, "run", **change, checkpoint=override)
    assert not run_ranks(1, [(forced, 2, False), (new, 1, False)])
    (error,) = run_ranks(1, [(first, None, False)])
    assert "objectives.qa: checkpoint 0.5, now 1.0; optimizer.lr: checkpoint 0.001, now" in error
    assert find_generation(str(tmp_path / "run")).step == 5


def test_what_may_change_freely(data: Path, tmp_path: Path) -> None:
    trains: list[dict[str, Any]] = [
        {"steps": 3, "zero_stage": 1},
        {"steps": 4, "zero_stage": 2, "accumulation": 1, "global_batch": 7},
        {"steps": None, "epochs": 2, "precision": "bf16", "max_skipped_updates": 0},
    ]
    jobs = [
        (config_tree(data, tmp_path, "run", train=t, model={"initializer_range": 0.01 * i}), None)
        for i, t in enumerate(trains, 1)
    ]
    assert not run_ranks(1, [(tree, end, False) for tree, end in jobs])
    manifest = find_generation(str(tmp_path / "run")).manifest
    assert (
        manifest.sampler.consumed
        == 2 * open_dataset(str(data), str(tmp_path / "cache")).manifest.pairs
    )


def test_what_changed_is_logged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    assert not run_ranks(1, [(config_tree(data, tmp_path, "run"), 1, False)])
    found = [find_generation(str(tmp_path / "run"))]
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    changed = {"checkpoint": {"override_settings": True}, "model": {"dropout": 0.2}}
    tree = config_tree(data, tmp_path, "run", **changed, train={"steps": 40, "global_batch": 7})
    check_settings(found, parse_config(tree, "test"), found[0].manifest.objectives)
    assert [record.getMessage() for record in said] == [
        "changed since the checkpoint: train.global_batch: checkpoint 13, now 7; "
        "train.steps: checkpoint 8, now 40",
        "the checkpoint was trained with other settings: model.dropout: checkpoint 0.1, now 0.2; "
        "going on as checkpoint.override_settings is set",
    ]


def test_every_setting_has_been_thought_of() -> None:
    """A new key of these sections is compared, fixed by the parameters' shapes, or named here."""
    config = parse_config({"data": {"train": "x"}, "train": {"steps": 1}}, "test")
    compared = step_settings(config.model_dump(mode="json"), {}).keys()
    small = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "language_layers": 1}
    small |= {"object_layers": 1, "vocab_size": 50, "num_answers": 5, "feature_dim": 8}
    base = ModelConfig.model_validate(small | {"cross_layers": 1, "max_positions": 20})
    shapes = parameter_shapes(build_model(base, 0))
    for key in ModelConfig.model_fields:
        if f"model.{key}" in compared or key == "initializer_range":
            continue
        value = getattr(base, key)
        other = not value if isinstance(value, bool) else value * 2
        changed = base.model_copy(update={key: other})
        assert parameter_shapes(build_model(changed, 0)) != shapes, key
    masks = {"token_mask", "object_mask"}  # of the data state
    assert {f"objectives.{k}" for k in ObjectiveSection.model_fields if k not in masks} <= compared
    assert {f"optimizer.{k}" for k in OptimizerSection.model_fields} <= compared
    assert {f"objectives.{name}" for name in OBJECTIVES} <= compared
