"""Fixtures of tests on a Ray cluster that runs join."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.cluster.joined import Runs
from tests.cluster.namespaces import ENVIRONMENT, Network, why_no_namespaces
from tests.conftest import subprocess_environment


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


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Two machines with room for a worker each, beside the head's."""
    if reason := why_no_namespaces():
        pytest.skip(reason)
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    with contextlib.closing(Network(tmp_path)) as network:
        network.add()
        network.add()
        yield network
