"""`train.strict` through the command: kill -9 and other numbers of workers leave no trace."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_cluster import Start, data, eventually, start
from tests.ranks import config_tree, run_ranks
from tests.trainer.test_resume import assert_bitwise, losses

pytestmark = pytest.mark.faults

__all__ = ["data", "start"]  # fixtures


def test_killed_at_1_4_2_and_3_workers_is_the_uninterrupted_run(
    start: Start, data: Path, tmp_path: Path
) -> None:
    """Dropout on; each start has other workers, and ends by kill -9 of the command. One worker is
    killed besides."""
    steady: dict[str, Any] = {
        "train": {"steps": 240, "log_every": 10, "strict": 12, "accumulation": 1},
        "checkpoint": {"every": 12},
    }
    whole = config_tree(data, tmp_path, "whole", **steady)
    assert not run_ranks(1, [(whole, None, False)])
    for workers, until in ((1, 40), (4, 90), (2, 140)):
        job = start(**steady, cluster={"workers": workers, "cpus_per_worker": 0.25})
        job.wait_for(f"| {workers} workers")
        job.wait_for(f"step {until}/240")
        if workers == 4:
            os.kill(job.workers()[0], signal.SIGKILL)
            job.wait_for("lost worker")
            job.wait_for(f"step {until + 10}/240")
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait()
        assert eventually(lambda job=job: not job.processes(), 10), job.processes()
    job = start(**steady, cluster={"workers": 3, "cpus_per_worker": 0.25})
    assert job.finish() == 0, job.output
    assert_bitwise(tmp_path / "whole", tmp_path / "run")
    run = config_tree(data, tmp_path, "run", **steady)
    assert losses(run) == losses(whole) and len(losses(run)) == 240
