"""Runs on a Ray cluster that they join, and what may happen to its nodes."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.node import Node
from ray.cluster_utils import Cluster

from shards.format.build import BuildSettings, build
from tests.cluster.faulty import write_plan
from tests.cluster.test_fault_table import Watched
from tests.conftest import small_records
from tests.ranks import config_tree
from tests.trainer.test_resume import assert_bitwise
from trainer.audit import audit

STEPS = 600
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


def begun(
    runs: Runs, cluster: Cluster, name: str, *cpus: int, **settings: Any
) -> tuple[Watched, list[Node]]:
    """A job at step 50, on nodes with so many cores; they come as ranks do."""
    nodes = [cluster.add_node(num_cpus=n) for n in cpus]
    job = runs.start(name, "--ray-address", cluster.address, **settings)
    job.wait_for_step(50)
    return job, sorted(nodes, key=lambda node: node.node_id)


def raylet(node: Node) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def drain(cluster: Cluster, node: Node, notice: float = 60) -> None:
    client = ray._raylet.GcsClient(address=cluster.address)  # type: ignore[attr-defined]
    until = int((time.time() + notice) * 1000)
    accepted, why = client.drain_node(node.node_id, PREEMPTION, "the machine is needed", until)
    assert accepted, why


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
