"""`lxscale doctor`, and what workers of other nodes know of the driver's environment."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.cli.main import main
from cluster.doctor import Finding, Machine, examine, findings
from cluster.environment import take
from shards.format.build import BuildSettings, build
from tests.cluster.namespaces import HUB, HUB_IP, Network
from tests.conftest import small_records, subprocess_environment
from tests.object_store import ObjectStore, radosgw, why_no_radosgw
from tests.ranks import config_tree

# --- one machine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Machine:
    here = examine("127.0.0.1")
    assert here.interface == "lo" and set(here.room) == {"cache", "/dev/shm", "memory"}
    plenty = dict.fromkeys(here.room, 1 << 40)
    return replace(here, address="10.0.0.1", interface="eth0", gloo="", clock=0.0, room=plenty)


def worst(*machines: Machine) -> Finding:
    """The finding that is not ok, of which there is one."""
    (found,) = [f for f in findings(machines, joined=True) if f.kind != "ok"]
    return found


def test_what_differs_between_nodes_is_found(machine: Machine) -> None:
    assert {f.kind for f in findings([machine, machine, machine], joined=True)} == {"ok"}
    other = {**machine.versions, "torch": "1.0"}
    found = worst(machine, machine, replace(machine, name="b", versions=other))
    assert found.kind == "problem" and re.search(r"torch is .* 1\.0 on b$", found.text), found
    found = worst(machine, machine, replace(machine, name="b", address="127.0.0.1", interface="lo"))
    assert found.kind == "problem" and "--node-ip-address" in found.remedy
    found = worst(machine, replace(machine, name="b", gloo="docker0"))
    assert found.kind == "warning" and "docker0" in found.text
    found = worst(machine, replace(machine, name="b", clock=-40.0))
    assert "b is 40 s behind" in found.text
    found = worst(machine, replace(machine, name="b", room={**machine.room, "/dev/shm": 64 << 20}))
    assert "/dev/shm of b has 0.1 GiB" in found.text and "--shm-size" in found.remedy
    assert "b allows a process 1024" in worst(machine, replace(machine, name="b", files=1024)).text
    here = replace(machine, variables={"LXSCALE_STORE_DEADLINE": "x", "AWS_REGION": "x"})
    there = replace(machine, variables={"LXSCALE_STORE_DEADLINE": "y", "AWS_REGION": "y"})
    assert worst(here, there).text.startswith("LXSCALE_STORE_DEADLINE have other values")


def run_file(tmp_path: Path, data: str, storage: str) -> Path:
    tree = config_tree(
        Path("unused"),
        tmp_path,
        "run",
        run={"storage": storage},
        data={"train": data},
        cluster={"workers": 2, "start_timeout_s": 60},
        train={"steps": 20, "log_every": 1},
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def tree_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_doctor_leaves_nothing_and_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("LXSCALE_CACHE", str(tmp_path / "cache"))
    build(small_records(4), tmp_path / "set", BuildSettings("x", "y"))
    config = run_file(tmp_path, str(tmp_path / "set"), str(tmp_path / "deep" / "runs"))
    before = tree_of(tmp_path)
    assert main(["doctor", str(config)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^ok +storage .*takes and gives", told, re.M), told
    assert "AWS_SECRET_ACCESS_KEY" in told and "hush" not in told
    assert tree_of(tmp_path) == before
    assert main(["doctor", str(config), f"data.train={tmp_path}/absent"]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^problem +storage .*absent", told, re.M), told
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "store"])
def test_workers_see_s3_as_the_driver_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [k for k in os.environ if k.startswith(("AWS_", "LXSCALE_"))]:
        monkeypatch.delenv(key)
    node = {
        "AWS_ACCESS_KEY_ID": "node",
        "AWS_SECRET_ACCESS_KEY": "node's",
        "AWS_SESSION_TOKEN": "node's",
        "LXSCALE_CACHE": "/node",
    }
    driver = {"LXSCALE_CACHE": "/driver", "LXSCALE_STORE_DEADLINE": "5"}
    driver |= (
        {"AWS_CA_BUNDLE": "/absent/here"}
        if kind == "file"
        else {"AWS_ACCESS_KEY_ID": "driver", "AWS_SECRET_ACCESS_KEY": "driver's"}
    )
    for key, value in node.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "")  # so that it is taken away afterwards
    del os.environ["LXSCALE_STORE_DEADLINE"]
    take(driver)
    found = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "LXSCALE_"))}
    wanted = {"LXSCALE_CACHE": "/node", "LXSCALE_STORE_DEADLINE": "5"}
    if kind == "file":
        assert found == node | wanted
    else:
        assert found == {k: v for k, v in driver.items() if k.startswith("AWS_")} | wanted


# --- a cluster ----------------------------------------------------------------------------------


@pytest.fixture
def without_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [k for k in os.environ if k.startswith("AWS_")]:
        monkeypatch.delenv(key)


@pytest.fixture
def network(without_aws: None, network: Network) -> Network:
    """None of whose machines knows of AWS."""
    return network


@pytest.fixture
def store(network: Network, tmp_path: Path) -> Iterator[ObjectStore]:
    """A gateway that all machines reach, and of whose keys none knows."""
    if reason := why_no_radosgw():
        pytest.skip(reason)
    with radosgw(tmp_path, network.on(HUB), HUB_IP) as store:
        yield store


def lxscale(network: Network, *arguments: str, **environment: str) -> tuple[int, str]:
    """A command on the head's machine: its status, and all that it says."""
    done = subprocess.run(
        [*network.on(0), sys.executable, "-m", "cluster.cli", *arguments],
        env=subprocess_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.faults
def test_the_doctor_sees_every_node(network: Network, tmp_path: Path) -> None:
    build(small_records(4), tmp_path / "set", BuildSettings("x", "y"))
    config = run_file(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    doctor = ("doctor", str(config), "--ray-address", network.address)
    status, told = lxscale(network, *doctor)
    assert status == 0, told
    for line in (
        "nodes .*3 answer",
        "ports .*4 connections",
        "storage .*3 nodes see",
        "network .*workers talk over eth0",
        "versions .*on all",
        "clock .*all within 1 s",
    ):
        assert re.search(f"^ok +{line}", told, re.M), (line, told)
    # Neighbours that do not reach each other.
    block = ["route", "add", "blackhole", f"{network.address_of(2)}/32"]
    subprocess.run([*network.on(1), "ip", *block], check=True)
    status, told = lxscale(network, *doctor)
    assert status == 1 and re.search("^problem +ports .*10.77.0.[23]", told, re.M), told


@pytest.mark.faults
def test_workers_of_other_nodes_read_s3_with_the_drivers_credentials(
    network: Network, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no secret is in anything that is written or shown, Ray's own logs included."""
    folder = tmp_path / "set"
    build(small_records(12), folder, BuildSettings("x", "y", images_per_shard=4))
    upload = (
        "import sys, pathlib; from tests.conftest import upload_set; "
        "upload_set(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    subprocess.run(
        [*network.on(0), sys.executable, "-c", upload, str(folder), f"{store.bucket}/set"],
        env=subprocess_environment(**store.environment),
        check=True,
    )
    config = run_file(tmp_path, f"{store.bucket}/set", f"{store.bucket}/runs")
    address = ("--ray-address", network.address)
    status, told = lxscale(network, "doctor", str(config), *address, **store.environment)
    assert status == 0 and "3 nodes see s3://" in told, told
    status, trained = lxscale(network, "train", str(config), *address, **store.environment)
    assert status == 0 and "done: step 20" in trained, trained
    run = f"{store.bucket}/runs/run"
    status, audited = lxscale(network, "shards", "audit", run, **store.environment)
    assert status == 0, audited
    secret = store.environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in told + trained + audited
    copy = (
        "import sys; from shards.store import objects; "
        "from shards.store.objects import list_tree, read_bytes; "
        "found = list_tree(sys.argv[1]); assert found; "
        "sys.exit(sum(sys.argv[2].encode() in read_bytes(objects.join(sys.argv[1], f.name)) "
        "for f in found))"
    )
    done = subprocess.run(
        [*network.on(0), sys.executable, "-c", copy, f"{store.bucket}/runs", secret],
        env=subprocess_environment(**store.environment),
    )
    assert done.returncode == 0
    # Ray's logs and what its processes were called with.
    found = subprocess.run(
        ["grep", "-rlF", "--", secret, "/tmp/ray/session_latest/logs", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
    )
    assert found.stdout == "", found.stdout
    lines = [Path(f"/proc/{p}/cmdline") for p in os.listdir("/proc") if p.isdigit()]
    for line in lines:
        with contextlib.suppress(OSError):
            assert secret.encode() not in line.read_bytes() or "grep" in line.read_text()
