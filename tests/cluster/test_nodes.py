"""Faults of nodes, links and of Ray's head, on a cluster that a run has joined.

Each prints what it cost: seconds from the fault to the next step's line, or to the run's end.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.node import Node
from ray.cluster_utils import Cluster

from shards.format.build import BuildSettings, build
from tests.cluster.faulty import write_plan
from tests.cluster.test_fault_table import Watched
from tests.conftest import small_records, subprocess_environment
from tests.ranks import config_tree
from tests.trainer.test_resume import assert_bitwise
from trainer.audit import audit
from trainer.checkpoint.generations import find_generation

pytestmark = pytest.mark.faults

STEPS = 300
# More than are made before the fault is seen.
MANY = 100_000
# DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto.
PREEMPTION = 2


class Runs:
    """Runs of one configuration in a folder, one of them undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "set"
        build(small_records(40), self.data, BuildSettings("faults", "test", images_per_shard=10))
        write_plan(folder / "faults", [])
        whole = self.start("whole", cpus_per_worker=0.5)
        assert whole.finish() == 0, whole.text()

    def start(
        self,
        name: str,
        *arguments: str,
        steps: int = STEPS,
        within: Sequence[str] = (),
        **cluster: float,
    ) -> Watched:
        """A job of `lxscale train` with these arguments, steps and settings of its cluster."""
        tree = config_tree(
            self.data,
            self.folder,
            name,
            train={"steps": steps, "log_every": 1, "global_batch": 24, "accumulation": 1},
            checkpoint={"every": 20, "keep": 2},
            data={"train": str(self.data), "cache": str(self.folder / "cache")},
            cluster={"workers": 2, "cpus_per_worker": 1, **cluster},
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return Watched(path, self.folder / "faults", *arguments, within=within)

    def check(self, name: str) -> None:
        """The run's end is the undisturbed one's, and no pair was lost or repeated."""
        assert_bitwise(self.folder / "whole", self.folder / name)
        report = audit(str(self.folder / name), cache=str(self.folder / "cache"))
        assert not report.problems, report.problems


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("nodes"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without room for workers."""
    for key, value in subprocess_environment(RAY_worker_niceness="0").items():
        monkeypatch.setenv(key, value)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


def raylet(node: Node) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def drain(cluster: Cluster, node: Node, notice: float = 60) -> None:
    client = ray._raylet.GcsClient(address=cluster.address)
    until = int((time.time() + notice) * 1000)
    accepted, why = client.drain_node(node.node_id, PREEMPTION, "the machine is needed", until)
    assert accepted, why


def say(what: str, seconds: float | None) -> None:
    print(f"\n{what}: ", "not seen" if seconds is None else f"{seconds:.1f} s", flush=True)


def errors(job: Watched) -> list[str]:
    return [line for _, line in job.lines if line.startswith("error:")]


def assert_ended(job: Watched, status: int, text: str) -> None:
    """With one line that says why, and nothing of Ray's own words."""
    (error,) = errors(job)
    assert re.search(text, error), job.text()
    assert job.lines[-1][1] == error, job.text()
    for noise in ("Traceback", "[20", "C++", "(raylet)", "*** SIG", "StackTrace"):
        assert noise not in job.text(), (noise, job.text())
    assert job.process.returncode == status, job.text()


# --- lost nodes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["rank 0", "the other"])
def test_a_lost_node_of_two_costs_seconds_and_no_step(
    victim: str, runs: Runs, cluster: Cluster, name: str
) -> None:
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    job = runs.start(name, "--ray-address", cluster.address)
    job.wait_for_step(50)
    cluster.add_node(num_cpus=1)
    nodes.sort(key=lambda n: n.node_id)  # as ranks are
    moment = time.time()
    cluster.remove_node(nodes[victim != "rank 0"], allow_graceful=False)
    assert job.finish() == 0, job.text()
    say(f"a lost node, of {victim}", job.next_step_after(moment))
    assert job.text().count("lost worker") == 1, job.text()
    runs.check(name)


def test_a_lost_node_of_all_workers_costs_seconds_and_no_step(
    runs: Runs, cluster: Cluster, name: str
) -> None:
    node = cluster.add_node(num_cpus=2)
    job = runs.start(name, "--ray-address", cluster.address)
    job.wait_for_step(50)
    cluster.add_node(num_cpus=2)
    moment = time.time()
    cluster.remove_node(node, allow_graceful=False)
    assert job.finish() == 0, job.text()
    say("a lost node, of all workers", job.next_step_after(moment))
    runs.check(name)


def test_a_stopped_raylet_costs_seconds_and_no_step(
    runs: Runs, cluster: Cluster, name: str
) -> None:
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    job = runs.start(name, "--ray-address", cluster.address)
    job.wait_for_step(50)
    cluster.add_node(num_cpus=1)
    moment = time.time()
    os.kill(raylet(nodes[0]), signal.SIGSTOP)
    try:
        status = job.finish()
    finally:
        os.kill(raylet(nodes[0]), signal.SIGCONT)
    assert status == 0, job.text()
    print(job.text()[-3000:])
    say("a stopped raylet", job.next_step_after(moment))
    runs.check(name)


# --- drained nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["rank 0", "the other"])
def test_a_drained_node_is_left_without_a_lost_step(
    victim: str, runs: Runs, cluster: Cluster, name: str
) -> None:
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    job = runs.start(name, "--ray-address", cluster.address)
    job.wait_for_step(50)
    cluster.add_node(num_cpus=1)
    nodes.sort(key=lambda n: n.node_id)
    moment = time.time()
    drain(cluster, nodes[victim != "rank 0"])
    assert job.finish() == 0, job.text()
    say(f"a drained node, of {victim}", job.next_step_after(moment))
    assert "starting again elsewhere" in job.text() and "attempt 2 |" in job.text()
    assert [step for _, step in job.steps()] == list(range(1, STEPS + 1))
    runs.check(name)


def test_a_drained_node_without_room_elsewhere_ends_the_run(
    runs: Runs, cluster: Cluster, name: str
) -> None:
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    job = runs.start(name, "--ray-address", cluster.address, start_timeout_s=20)
    job.wait_for_step(50)
    moment = time.time()
    drain(cluster, nodes[0])
    job.finish()
    say("a drained node without room elsewhere, to the end", time.time() - moment)
    assert_ended(job, 75, "no room for 2 workers within cluster.start_timeout_s=20")
    assert find_generation(str(runs.folder / name)).step == job.step()


# --- the head -----------------------------------------------------------------------------------


def _kill_gcs(cluster: Cluster) -> None:
    cluster.head_node.kill_gcs_server()


def _lose_head(cluster: Cluster) -> None:
    cluster.remove_node(cluster.head_node, allow_graceful=False)


@pytest.mark.parametrize("lose", [_kill_gcs, _lose_head])
def test_a_run_whose_cluster_lost_its_head_saves_and_ends(
    lose: Callable[[Cluster], None], runs: Runs, cluster: Cluster, name: str
) -> None:
    cluster.add_node(num_cpus=2)
    job = runs.start(name, "--ray-address", cluster.address, steps=MANY)
    job.wait_for_step(50)
    moment = time.time()
    lose(cluster)
    job.finish()
    print(job.text()[-3000:])
    say(f"the head is gone ({lose.__name__}), to the end", time.time() - moment)
    assert_ended(job, 75, "head has not answered")
    assert find_generation(str(runs.folder / name)).step == job.step()


def test_no_room_and_no_cluster_are_one_line(runs: Runs, cluster: Cluster, name: str) -> None:
    began = time.time()
    job = runs.start(name, "--ray-address", cluster.address, start_timeout_s=5)
    job.finish()
    say("no room, to the end", time.time() - began)
    assert_ended(job, 75, "no room for 2 workers within cluster.start_timeout_s=5")
    for address in ("127.0.0.1:1", "198.51.100.1:6379"):
        began = time.time()
        job = runs.start(name, "--ray-address", address)
        job.finish()
        say(f"no cluster at {address}, to the end", time.time() - began)
        assert_ended(job, 2, f"cannot join Ray at {address}")
