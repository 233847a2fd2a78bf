"""What a configuration asks of a data set that has it not, is an error that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree
from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.setup import resolve_objectives

ALTERNATING = {"mode": "alternating"}
ONLY_QA = dict.fromkeys(("masked_lm", "masked_feature", "matching"), 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Without labels of objects."""
    folder = tmp_path_factory.mktemp("setup")
    build(small_records(12), folder / "set", BuildSettings("setup", "test"))
    return open_dataset(str(folder / "set"), folder / "cache")


def resolve(data: Dataset, tmp_path: Path, **sections: dict[str, Any]) -> dict[str, float]:
    tree = config_tree(Path(data.url), tmp_path, "run", **sections)
    return resolve_objectives(parse_config(tree, "test"), data)


def test_objectives_without_labels_or_weight_are_left_out(data: Dataset, tmp_path: Path) -> None:
    assert [*resolve(data, tmp_path, objectives={"matching": 0})] == [
        "masked_lm",
        "masked_feature",
        "qa",
    ]


@pytest.mark.parametrize(
    ("sampler", "objectives", "message"),
    [
        ({}, {**ONLY_QA, "qa": 0}, "no objective is left"),
        ({}, {**ONLY_QA, "qa_from_epoch": 1}, r"qa_from_epoch=1 .*another objective a weight"),
        (ALTERNATING, {"qa_from_epoch": 0.5}, r"qa_from_epoch=0\.5 .*qa steps before"),
        (ALTERNATING, {"matching": 0}, r"matching steps.*sampler\.families\.matching=0"),
    ],
)
def test_steps_without_an_objective_are_refused(
    data: Dataset,
    tmp_path: Path,
    sampler: dict[str, Any],
    objectives: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(data, tmp_path, sampler=sampler, objectives=objectives)


def test_a_family_of_no_steps_needs_no_objective(data: Dataset, tmp_path: Path) -> None:
    sampler = {**ALTERNATING, "families": {"matching": 0}}
    assert "matching" not in resolve(data, tmp_path, sampler=sampler, objectives={"matching": 0})
