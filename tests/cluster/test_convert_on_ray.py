"""Shards made by tasks of a Ray cluster whose nodes are lost."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from shards.convert.convert import convert
from shards.convert.pool import in_processes
from shards.errors import DataError
from shards.format.build import BuildSettings
from tests.conftest import contents, subprocess_environment
from tests.shards.convert.inputs import OPTIONS, make_row, write_inputs
from tests.shards.convert.test_convert import SETTINGS, command

pytestmark = pytest.mark.faults


def test_a_lost_node_costs_its_parts_alone(cluster: Cluster, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", 300)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out = tmp_path / "far"
    process = subprocess.Popen(
        command(tmp_path, "--out", str(out), "--ray-address", cluster.address),
        env=subprocess_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(out.glob("build-*/*.part.json"))) < 10:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    settings = BuildSettings("set", "bottom-up-attention", vocab_size=200, images_per_shard=1)
    convert(inputs, tmp_path / "here", settings, options=OPTIONS, workers=in_processes(2))
    assert contents(out) == contents(tmp_path / "here")


def test_a_bad_record_is_named(cluster: Cluster, tmp_path: Path) -> None:
    from cluster.convert_on_ray import on_ray

    cluster.add_node(num_cpus=1)
    rows = [make_row("img-0000"), make_row("img-0001", boxes="!")]
    inputs = write_inputs(tmp_path / "in", rows=rows, count=2)
    with pytest.raises(DataError, match="line 2, column boxes: damaged base64"):
        convert(
            inputs,
            tmp_path / "out",
            SETTINGS,
            options=OPTIONS,
            workers=on_ray(cluster.address, 1),
        )
