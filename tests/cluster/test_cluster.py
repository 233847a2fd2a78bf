"""`lxscale train` on a real local Ray: lost workers, a lost driver, Ctrl-C, wrong input."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.format.build import BuildSettings, build
from tests.conftest import small_records, subprocess_environment
from tests.ranks import config_tree, run_ranks, step_record
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.owner import Claimant, claim


class Job:
    """A running `lxscale train` and every process that it started, found by a mark in their
    environment."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self.mark = f"LXSCALE_TEST_JOB={secrets.token_hex(8)}"
        key, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", str(config), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=subprocess_environment(**{key: value}),
            start_new_session=True,
        )
        self.output = ""

    def processes(self) -> dict[int, str]:
        """pid -> command line of every living process of the job."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if self.mark.encode() in (folder / "environ").read_bytes():
                        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                        if command:  # a zombie has none
                            found[int(folder.name)] = command.decode()
                except OSError:
                    pass  # it ended meanwhile
        return found

    def workers(self) -> list[int]:
        return sorted(p for p, c in self.processes().items() if c.startswith("ray::Worker"))

    def listeners(self) -> set[str]:
        """Addresses, in /proc's notation, on which its processes listen."""
        inodes = set()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for file in Path(f"/proc/{pid}/fd").iterdir():
                    inodes.add(os.readlink(file))
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    found.add(fields[1])
        return found

    def ctrl_c(self) -> None:
        """As a terminal does: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for(self, text: str) -> None:
        """Read output until a line has `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    def finish(self, timeout: float = 180) -> int:
        rest, _ = self.process.communicate(timeout=timeout)
        self.output += rest
        return self.process.returncode

    def end(self) -> None:
        self.process.kill()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return condition()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    build(small_records(40), folder, BuildSettings("cluster", "test", images_per_shard=10))
    return folder


Start = Callable[..., Job]


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a job on a run named `run`; keyword arguments are sections of its configuration, the
    address of the Ray cluster to join, and more arguments of the command."""
    jobs: list[Job] = []

    def start(
        address: str | None = None, arguments: Sequence[str] = (), **sections: dict[str, Any]
    ) -> Job:
        tree = config_tree(data, tmp_path, "run", **sections)
        tree.setdefault("cluster", {"workers": 2, "cpus_per_worker": 0.5})
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        jobs.append(Job(path, *(["--ray-address", address] if address else []), *arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def test_a_lost_worker_and_a_lost_job_cost_no_step(
    start: Start, data: Path, tmp_path: Path
) -> None:
    """One run of 120 steps through both; its result is the uninterrupted one's."""
    sizes = {"steps": 120, "log_every": 10, "global_batch": 48}
    steady = {"train": sizes, "checkpoint": {"every": 12}}
    whole = config_tree(data, tmp_path, "whole", **steady)
    assert not run_ranks(2, [(whole, None, False)])

    # kill -9 of a worker: Ray starts the group again, which goes on.
    job = start(**steady)
    job.wait_for("step 20/120")
    # All servers are on loopback (0100007F).
    addresses = job.listeners()
    assert len(addresses) > 1 and all("0100007F" in a for a in addresses), addresses
    os.kill(job.workers()[0], signal.SIGKILL)
    job.wait_for("lost worker")
    job.wait_for("attempt 2")
    job.wait_for("step 50/120")
    # kill -9 of the driver: everything that it started ends too.
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    assert eventually(lambda: not job.processes(), 10), job.processes()

    job = start(**steady)  # the same command again
    assert job.finish() == 0, job.output
    assert eventually(lambda: not job.processes(), 10), job.processes()
    assert step_record(config_tree(data, tmp_path, "run", **steady)) == step_record(whole)
    assert find_generation(str(tmp_path / "run")).step == 120


def test_an_error_of_the_users_in_a_worker_ends_the_run_at_once(start: Start) -> None:
    job = start(data={"train": "nowhere/at/all"})
    assert job.finish() == 2
    errors = [line for line in job.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "nowhere/at/all" in errors[0], job.output
    assert "Traceback" not in job.output and "attempt 2" not in job.output
    assert eventually(lambda: not job.processes(), 10), job.processes()


def test_a_run_with_a_live_owner_is_refused_at_once(start: Start, tmp_path: Path) -> None:
    """Before Ray is started, with a status of its own."""
    with contextlib.closing(claim(str(tmp_path / "run"), Claimant())):
        job = start()
        assert job.finish() == 3, job.output
    (line,) = job.output.splitlines()
    assert re.match(rf"error: the run .* live job \(host .*, process {os.getpid()}, since", line)
    assert "--take-over" in line


@pytest.mark.faults
def test_a_run_is_taken_from_a_live_job(start: Start, tmp_path: Path) -> None:
    sections = {"train": {"steps": 100_000}, "checkpoint": {"every": 20}}
    first = start(**sections)
    first.wait_for("checkpoint of step 20 ")
    second = start(**sections, arguments=["--take-over"])
    second.wait_for("checkpoint of step ")
    assert first.finish() == 3, first.output
    assert "error: attempt 1 of" in first.output and "attempt 2 (host" in first.output
    # Ray starts lost workers again: the take-over is over, but the job is the owner.
    os.kill(second.workers()[0], signal.SIGKILL)
    second.wait_for("attempt 3 |")
    second.wait_for("checkpoint of step ")
    second.ctrl_c()
    assert second.finish() == 75, second.output


@pytest.mark.faults
def test_more_workers_than_cores(start: Start, tmp_path: Path) -> None:
    workers = (os.cpu_count() or 1) + 1
    job = start(
        cluster={"workers": workers, "cpus_per_worker": 1}, train={"steps": 2, "zero_stage": 2}
    )
    assert job.finish() == 0, job.output
    assert find_generation(str(tmp_path / "run")).manifest.world_size == workers


def test_everything_on_object_storage(
    start: Start, data: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards and checkpoints on S3; a second job goes on from there."""
    build(small_records(40), f"{s3}/set", BuildSettings("cluster", "test", images_per_shard=10))
    sections: dict[str, Any] = {
        "run": {
            "name": "run",
            "storage": f"{s3}/runs",
            "tensorboard": str(tmp_path / "board"),
            "seed": 5,
        },
        "data": {"train": f"{s3}/set", "cache": str(tmp_path / "cache")},
        "train": {"steps": 60, "log_every": 10},
        "checkpoint": {"every": 10},
    }
    job = start(**sections)
    job.wait_for("checkpoint of step 10 ")
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 75, job.output
    first = find_generation(f"{s3}/runs/run")
    assert 10 <= first.step < 60
    job = start(**sections)
    assert job.finish() == 0, job.output
    assert find_generation(f"{s3}/runs/run").step == 60
    assert f"step {first.step} of 60" in job.output
