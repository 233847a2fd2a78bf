"""Configuration: every wrong key and value is named; the shipped files are valid."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from model.objectives import OBJECTIVES
from trainer.config import ConfigError, load_config, parse_config, weights_section
from trainer.data.loader import bounds
from trainer.setup import run_length

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL = "data: {train: d}\ntrain: {steps: 5}\n"


def test_there_are_configurations() -> None:
    assert {p.stem for p in CONFIGS} == {"base", "demo", "tiny"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.given(), "again") == config


def test_the_base_recipe_is_the_papers() -> None:
    config = load_config(next(p for p in CONFIGS if p.stem == "base"))
    sizes = (config.model.language_layers, config.model.object_layers, config.model.cross_layers)
    assert sizes == (9, 5, 5)
    assert (config.train.epochs, config.train.global_batch) == (20, 256)
    assert (config.optimizer.lr, config.optimizer.warmup) == (1e-4, 0.05)
    assert config.objectives.qa_from_epoch == 10 and config.sampler.mismatch == 0.5


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.global_batsh=3", r"train\.global_batsh: no such key"),
        ("optimiser.lr=3", r"optimiser: no such key"),
        ("train.global_batch=0", r"train\.global_batch: .*greater than or equal to 1"),
        ("train.zero_stage=4", r"train\.zero_stage: .*0, 1, 2 or 3"),
        ("objectives.masked_lm=-1", r"objectives\.masked_lm: .*greater than or equal to 0"),
        ("objectives.mlm=1", r"objectives\.mlm: no such key"),
        ("sampler.mode=random", r"sampler\.mode: .*natural"),
        ("train.epochs=2", r"exactly one of train\.epochs and train\.steps"),
        ("model.num_heads=7", r"model: .*768 is not a multiple of num_heads 7"),
        ("nonsense", r"write it as section\.key=value"),
        ("run.name.first=x", r"name is not a section"),
        ("run.name=[", r"override 'run\.name=\['"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: x}\n" + MINIMAL)
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    config = load_config(
        path,
        ["optimizer.lr=3e-4", "optimizer.no_decay=[bias]", "train.steps=null", "train.epochs=2"],
    )
    assert config.optimizer.lr == 3e-4 and config.optimizer.no_decay == ("bias",)
    assert config.train.steps is None and config.train.epochs == 2


def test_every_objective_has_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = parse_config({"data": {"train": "d"}, "train": {"steps": 1}}, "test").objectives
    assert objectives.weights() == dict.fromkeys(OBJECTIVES, 1.0)
    # As resolved configurations are stored: the weights come first.
    assert list(objectives.model_dump())[:7] == [*OBJECTIVES, "qa_from_epoch"]
    weights = objectives.weights()
    monkeypatch.setitem(OBJECTIVES, "another", replace(OBJECTIVES["matching"], name="another"))
    section = weights_section().model_validate({"another": 2})
    assert section.model_dump() == {**weights, "another": 2.0}


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "train: {steps: 5}\n"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_the_length_of_a_run_counts_pairs_not_rounds() -> None:
    tree = {"data": {"train": "d"}, "train": {"epochs": 2, "global_batch": 10}}
    config = parse_config(tree, "test")
    assert run_length(config, 33, 0, 0).__dict__ == {"total": 66, "steps": 7}
    # Resumed at step 3 with another batch.
    tree["train"] = {"epochs": 2, "global_batch": 12}
    config = parse_config(tree, "test")
    assert run_length(config, 33, 3, 30).__dict__ == {"total": 66, "steps": 6}
    tree["train"] = {"steps": 5, "global_batch": 12}
    config = parse_config(tree, "test")
    assert run_length(config, 33, 3, 30).__dict__ == {"total": 54, "steps": 5}


@pytest.mark.parametrize("count, parts", [(0, 3), (1, 4), (13, 5), (256, 3)])
def test_slices_cover_everything_and_differ_by_one(count: int, parts: int) -> None:
    cuts = [bounds(count, i, parts) for i in range(parts)]
    assert cuts[0][0] == 0 and cuts[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    sizes = [e - b for b, e in cuts]
    assert max(sizes) - min(sizes) <= 1
