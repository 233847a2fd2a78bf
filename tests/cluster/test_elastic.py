"""A run with a range of workers, on a cluster that grows and shrinks under it."""

from __future__ import annotations

import re
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.cluster.joined import Runs, begun, drain, raylet
from tests.cluster.test_fault_table import Watched
from tests.conftest import note_cost
from trainer.audit import audit
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.journal import read_segments

pytestmark = pytest.mark.faults

ELASTIC = {"workers": "1..3", "grow_after_s": 3}


def worlds(job: Watched) -> list[int]:
    """Workers of each attempt."""
    return [int(n) for n in re.findall(r", attempt \d+ \| (\d+) workers", job.text())]


def journal(runs: Runs, name: str) -> list[tuple[int, int, int]]:
    """Step, pairs and workers of each step that is kept."""
    newest = find_generation(str(runs.folder / name))
    segments = read_segments(newest.run_url, newest.manifest.journal)
    return [(line.step, line.pairs, line.world) for _, lines in segments for line in lines]


def assert_kept(runs: Runs, name: str, steps: int) -> None:
    """Every step once, of the same batch at every number of workers, and no pair lost."""
    kept = journal(runs, name)
    assert [step for step, _, _ in kept] == list(range(1, steps + 1))
    assert {pairs for _, pairs, _ in kept} == {24}
    report = audit(str(runs.folder / name), cache=str(runs.folder / "cache"))
    assert not report.problems, report.problems


def wait_for_world(job: Watched, world: int, seconds: float = 90) -> None:
    """Until a step is done by so many workers."""
    deadline = time.monotonic() + seconds
    while worlds(job)[-1:] != [world]:
        assert job.process.poll() is None and time.monotonic() < deadline, job.text()
        time.sleep(0.05)
    job.wait_for_step(job.step() + 3)


def test_a_run_grows_with_the_cluster_and_loses_nothing(
    runs: Runs,
    cluster: Cluster,
    name: str,
) -> None:
    job, _ = begun(runs, cluster, name, 1, steps=3000, **ELASTIC)
    assert worlds(job) == [1]
    moment = time.time()
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    wait_for_world(job, 3)
    note_cost("two nodes more, to a step on all", time.time() - moment)
    job.process.terminate()
    assert job.finish() == 75, job.text()
    # Each step was told of once: none was made twice.
    told = [step for _, step in job.steps()]
    assert told == list(range(1, told[-1] + 1))
    assert "there is room for 3 workers" in job.text() and "starting again with more" in job.text()
    assert_kept(runs, name, told[-1])


def test_a_run_goes_on_with_the_nodes_that_are_left_and_takes_one_that_comes_back(
    runs: Runs,
    cluster: Cluster,
    name: str,
) -> None:
    job, nodes = begun(runs, cluster, name, 1, 1, 1, steps=3000, **ELASTIC)
    wait_for_world(job, 3)
    moment = time.time()
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for_world(job, 2)
    note_cost("a lost node of three, with a range", job.next_step_after(moment))
    moment = time.time()
    drain(cluster, nodes[0])
    wait_for_world(job, 1)
    note_cost("a drained node of two, with a range", job.next_step_after(moment))
    cluster.add_node(num_cpus=1)
    wait_for_world(job, 2)
    job.process.terminate()
    assert job.finish() == 75, job.text()
    assert worlds(job) in ([3, 2, 1, 2], [1, 3, 2, 1, 2], [2, 3, 2, 1, 2]), job.text()
    assert_kept(runs, name, find_generation(str(runs.folder / name)).step)


def test_a_killed_worker_is_no_less_room(runs: Runs, cluster: Cluster, name: str) -> None:
    """Ray's account of what is free is behind the time."""
    job, nodes = begun(runs, cluster, name, 1, 1, steps=3000, **ELASTIC)
    wait_for_world(job, 2)
    for _ in range(2):
        attempts = len(worlds(job))
        children = psutil.Process(raylet(nodes[0])).children(recursive=True)
        (worker,) = [p for p in children if "ray::Worker" in " ".join(p.cmdline())]
        worker.kill()
        while len(worlds(job)) == attempts:
            assert job.process.poll() is None, job.text()
            time.sleep(0.05)
        job.wait_for_step(job.step() + 3)
    job.process.terminate()
    assert job.finish() == 75, job.text()
    assert set(worlds(job)[-3:]) == {2}, job.text()
