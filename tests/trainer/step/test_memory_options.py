"""Options that trade speed for memory: they change where things are, not what is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from tests.trainer.test_guard import BAD, assert_same_state, leave_out, spoil
from tests.trainer.test_resume import assert_bitwise, losses
from trainer.config import ConfigError, parse_config

OPTIONS: dict[str, dict[str, Any]] = {
    "optimizer-1": {"zero_stage": 1, "offload": "optimizer", "precision": "bf16"},
    "optimizer-2": {"zero_stage": 2, "offload": "optimizer"},
    "parameters-3": {"zero_stage": 3, "offload": "parameters"},
    "checkpointing-1": {"activation_checkpointing": True},
    "checkpointing-3": {"zero_stage": 3, "activation_checkpointing": True, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "set"
    build(
        small_records(31, labels=True), folder, BuildSettings("small", "test", images_per_shard=7)
    )
    return folder


@pytest.mark.parametrize(
    "names",
    [["parameters-3"], pytest.param([*OPTIONS], marks=pytest.mark.faults)],
    ids=["one", "all"],
)
def test_a_killed_run_goes_on_bitwise(data: Path, tmp_path: Path, names: list[str]) -> None:
    def runs(kind: str) -> list[dict[str, Any]]:
        return [config_tree(data, tmp_path, f"{kind}-{n}", train=OPTIONS[n]) for n in names]

    assert not run_ranks(2, [(run, None, False) for run in runs("whole")])
    for run in runs("killed"):
        run_ranks(2, [(run, 5, True)])
    assert not run_ranks(2, [(run, None, False) for run in runs("killed")])
    for name in names:
        assert_bitwise(tmp_path / f"whole-{name}", tmp_path / f"killed-{name}")


@pytest.mark.faults
def test_it_goes_on_at_another_size_with_other_options(data: Path, tmp_path: Path) -> None:
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    low = {"precision": "fp32"}

    def run(name: str, options: dict[str, Any]) -> dict[str, Any]:
        return config_tree(data, tmp_path, name, train=options | low, model=off)

    plain, names = run("plain", {}), [*OPTIONS]
    assert not run_ranks(1, [(plain, None, False)])
    assert not run_ranks(2, [(run(n, OPTIONS[n]), 3, False) for n in names])
    after = zip(names, [*names[1:], names[0]], strict=True)
    assert not run_ranks(1, [(run(a, OPTIONS[b]), None, False) for a, b in after])
    for name in names:
        found = losses(run(name, {}))
        for step, expected in losses(plain).items():
            assert found[step] == pytest.approx(expected, rel=1e-5), (name, step)


def test_checkpointing_is_bitwise_the_same(data: Path, tmp_path: Path) -> None:
    """Dropout on: the backward computes again what the forward drew."""
    for strict in (0, 2):
        runs = [
            config_tree(
                data,
                tmp_path,
                f"{strict}-{kind}",
                train={"activation_checkpointing": kind == "with", "strict": strict}
                | ({"accumulation": 1} if strict else {}),
            )
            for kind in ("with", "without")
        ]
        assert not run_ranks(2, [(run, None, False) for run in runs])
        assert_bitwise(tmp_path / f"{strict}-with", tmp_path / f"{strict}-without")


@pytest.mark.faults
def test_a_bad_step_is_left_out_of_masters_in_host_memory(data: Path, tmp_path: Path) -> None:
    options = [OPTIONS[n] for n in ("optimizer-1", "optimizer-2", "parameters-3")]

    def runs(kind: str) -> list[tuple[dict[str, Any], None, bool]]:
        return [
            (config_tree(data, tmp_path, f"{kind}-{i}", train=train), None, False)
            for i, train in enumerate(options)
        ]

    assert not run_ranks(2, runs("spoiled"), prepare=partial(spoil, BAD, only=1))
    assert not run_ranks(2, runs("reference"), prepare=partial(leave_out, BAD))
    for i in range(len(options)):
        assert_same_state(tmp_path / f"spoiled-{i}", tmp_path / f"reference-{i}")


@pytest.mark.parametrize(
    "train, said",
    [
        ({"offload": "optimizer", "zero_stage": 0}, "offload=optimizer needs train.zero_stage 1"),
        ({"offload": "parameters", "zero_stage": 2}, "offload=parameters needs train.zero_stage 3"),
        ({"compile": True, "zero_stage": 3}, "compile goes with train.zero_stage 0 to 2"),
        ({"compile": True, "strict": 2, "accumulation": 1}, "compile goes with"),
        ({"offload": "optimizer", "strict": 2, "accumulation": 1}, "goes without train.offload"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said(
    data: Path, tmp_path: Path, train: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(config_tree(data, tmp_path, "run", train=train), "here")
