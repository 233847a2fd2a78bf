"""Every weight partitioned, as in a model of the base size under ZeRO 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from tests.trainer.test_resume import losses, state_of


def partition_everything(_rank: int) -> None:
    """DeepSpeed leaves weights under 100,000 elements whole, so all of a small model's."""
    from trainer.step import engine

    real = engine.engine_settings

    def settings(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    engine.engine_settings = settings  # type: ignore[assignment]


@pytest.mark.parametrize("world", [1, 2])
def test_partitioned_weights_train_as_whole_ones(tmp_path: Path, world: int) -> None:
    settings = BuildSettings("small", "test", images_per_shard=2)
    build(small_records(31, labels=True), tmp_path / "set", settings)
    runs = [
        config_tree(
            tmp_path / "set", tmp_path, f"zero-{stage}", train={"zero_stage": stage, "log_every": 1}
        )
        for stage in (1, 3)
    ]
    assert not run_ranks(world, [(run, None, False) for run in runs], prepare=partition_everything)
    whole, partitioned = (losses(run) for run in runs)
    assert sorted(whole) == sorted(partitioned) == list(range(1, 9))
    for step in whole:
        assert partitioned[step] == pytest.approx(whole[step], rel=1e-5), step
    (_, a), (_, b) = (state_of(tmp_path / f"zero-{stage}") for stage in (1, 3))
    for name, kinds in a.items():
        np.testing.assert_allclose(kinds["master"], b[name]["master"], 0, 1e-5, err_msg=name)
