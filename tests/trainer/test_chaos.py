"""Long and chaotic cases, run by `make test-faults`."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from shards.format.build import BuildSettings, build
from tests.cluster.test_cluster import Start, data, start
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from tests.trainer.test_resume import assert_bitwise, losses
from trainer.audit import audit
from trainer.checkpoint.generations import find_generation

pytestmark = pytest.mark.faults

__all__ = ["data", "start"]  # fixtures


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_at_every_step_in_turn(stage: int, tmp_path: Path) -> None:
    """Each attempt gets one step further before kill -9, with a checkpoint at every step."""
    folder = tmp_path / "set"
    build(small_records(31), folder, BuildSettings("faults", "test", images_per_shard=7))

    def tree(name: str) -> dict:
        return config_tree(
            folder, tmp_path, name, train={"zero_stage": stage}, checkpoint={"every": 1, "keep": 2}
        )

    assert not run_ranks(2, [(tree("whole"), None, False)])
    for _ in range(12):
        run_ranks(2, [(tree("killed"), 2, True)])
    assert not run_ranks(2, [(tree("killed"), None, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "killed")
    assert losses(tree("whole")) == losses(tree("killed"))


def test_a_chain_of_world_sizes_sees_every_pair_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    build(small_records(31), folder, BuildSettings("faults", "test", images_per_shard=7))

    def tree(stage: int) -> dict:
        off = {"dropout": 0.0, "attention_dropout": 0.0}
        settings = {"zero_stage": stage, "steps": 12}
        return config_tree(folder, tmp_path, "chain", train=settings, model=off)

    for world, stage in ((3, 2), (1, 0), (4, 3), (2, 1)):
        assert not run_ranks(world, [(tree(stage), 2, False)])
    assert not run_ranks(5, [(tree(3), None, False)])
    last = find_generation(str(tmp_path / "chain")).manifest
    assert last.step == 12
    assert last.sampler.consumed == 156 and last.sampler.cursors == (156,)
    assert not audit(str(tmp_path / "chain"), cache=str(tmp_path / "cache")).problems
    whole = config_tree(
        folder,
        tmp_path,
        "whole",
        train={"steps": 12},
        model={"dropout": 0.0, "attention_dropout": 0.0},
    )
    assert not run_ranks(1, [(whole, None, False)])
    expected, found = losses(whole), losses(tree(3))
    for step, entry in expected.items():
        assert found[step] == pytest.approx(entry, rel=1e-5), step


def test_random_kills_of_workers_cost_no_step(start: Start, tmp_path: Path) -> None:
    """Five workers die at random moments; Ray places new groups; the losses are the same."""
    sections = {
        "train": {"steps": 600, "log_every": 10, "global_batch": 48},
        "checkpoint": {"every": 20},
    }
    whole = start(**sections, run={"name": "whole", "storage": str(tmp_path), "seed": 5})
    assert whole.finish() == 0, whole.output
    cluster = {"workers": 2, "cpus_per_worker": 0.5, "max_failures": 10}
    job = start(**sections, cluster=cluster)
    choice = random.Random(7)
    for kill in range(5):
        job.wait_for(f"attempt {kill + 1} |")
        for _ in range(choice.randint(2, 9)):
            job.wait_for("step ")
        os.kill(choice.choice(job.workers()), signal.SIGKILL)
    assert job.finish(300) == 0, job.output
    ends = [
        output.rsplit("step 600/600 |", 1)[1].split("| lr")[0]
        for output in (whole.output, job.output)
    ]
    assert ends[0] == ends[1]
