"""`lxscale train` with snapshots in memory goes on from the newest without a worker or a driver."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_cluster import Start, data, eventually, start
from tests.ranks import config_tree, step_record
from trainer.audit import audit

pytestmark = pytest.mark.faults

__all__ = ["data", "start"]  # fixtures

EVERY = 10


@pytest.fixture
def memory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="lxscale-test-", dir="/dev/shm") as folder:
        yield folder


def test_a_lost_worker_and_a_lost_driver_cost_the_steps_since_a_snapshot(
    start: Start, data: Path, memory: str, tmp_path: Path
) -> None:
    """The store is given nothing before the end: all that there is, is in memory."""
    steady = {"train": {"steps": 200, "log_every": 5, "global_batch": 48}}
    named = {"name": "whole", "storage": str(tmp_path), "seed": 5}
    whole = start(**steady, run=named, checkpoint={"every": 1000})
    assert whole.finish() == 0, whole.output
    snapshots = {"every": 1000, "fast_every": EVERY, "fast_folder": memory}
    sections = {**steady, "checkpoint": snapshots}

    job = start(**sections)
    job.wait_for("step 50/200")
    os.kill(job.workers()[0], signal.SIGKILL)
    job.wait_for("attempt 2 |")
    # At most one was under way.
    assert resumed_at(job.output) >= 50 - 2 * EVERY
    job.wait_for("step 120/200")
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    assert eventually(lambda: not job.processes(), 10), job.processes()

    job = start(**sections)
    assert job.finish() == 0, job.output
    assert resumed_at(job.output) >= 120 - 2 * EVERY
    records = [step_record(config_tree(data, tmp_path, name)) for name in ("run", "whole")]
    assert len(records[0]) == 200 and records[0] == records[1]
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems
    assert not [p for p in Path(memory).rglob("*") if p.is_file()]


def resumed_at(output: str) -> int:
    """The step of the last snapshot that an attempt went on from."""
    return int(re.findall(r"snapshot of step (\d+) \(attempt \d+\) in memory is", output)[-1])
