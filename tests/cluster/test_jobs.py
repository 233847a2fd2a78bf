"""Runs as jobs of real Ray heads with a dashboard: submitted, stopped, killed, and brought back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from shards.format.build import BuildSettings, build
from tests.conftest import note_cost, small_records, subprocess_environment
from tests.object_store import free_port
from tests.ranks import config_tree
from tests.trainer.test_resume import assert_bitwise
from trainer.audit import audit
from trainer.run_status import run_status

pytestmark = pytest.mark.faults

STEPS = 600
_MARK = "LXSCALE_TEST_HEAD"


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess_environment(PATH=path, RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")


class Head:
    """A Ray of one node. Its folder is short, as sockets are in it."""

    def __init__(self) -> None:
        self.port, self.dashboard = (self._port() for _ in range(2))
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.start()

    @staticmethod
    def _port() -> int:
        """Not one of those that Ray's workers take."""
        while 10_000 <= (port := free_port()) < 20_000:
            pass
        return port

    def start(self) -> None:
        """At the same address each time."""
        self.folder = tempfile.mkdtemp(prefix="lxj-", dir="/tmp")
        options = {
            "port": self.port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": self.dashboard,
            "dashboard-agent-listen-port": self._port(),
            "ray-client-server-port": self._port(),
            "node-ip-address": "127.0.0.1",
            "temp-dir": self.folder,
            "num-cpus": 2,
            "object-store-memory": 80 << 20,
        }
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += ["--include-dashboard=true", *(f"--{k}={v}" for k, v in options.items())]
        with open(f"{self.folder}/said", "w") as said:
            self._process = subprocess.Popen(
                command, stdout=said, stderr=said, env={**environment(), _MARK: self.folder}
            )
        deadline = time.monotonic() + 60
        while lxscale("logs", "none", "--ray-address", self.address)[1].count("cannot reach"):
            assert time.monotonic() < deadline, Path(self.folder, "said").read_text()
            time.sleep(0.5)

    def kill(self) -> None:
        """The machine is gone, with all that ran on it."""
        for _ in range(2):  # what was just being started, too
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    command = " ".join(process.cmdline())
                    if process.environ().get(_MARK) == self.folder or self.folder in command:
                        process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def head() -> Iterator[Head]:
    head = Head()
    yield head
    head.kill()


def lxscale(*arguments: str) -> tuple[int, str]:
    """The exit status of a command, and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


class Following:
    """A command that is read as it speaks."""

    def __init__(self, *arguments: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines += (line.rstrip("\n") for line in self.process.stdout)

    def finish(self, seconds: float = 240) -> int:
        status = self.process.wait(seconds)
        self._thread.join(10)
        return status

    def text(self) -> str:
        return "\n".join(self.lines)


def run_of(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """A run's configuration, on a data set of the folder."""
    data = folder / "set"
    if not data.exists():
        build(small_records(40), data, BuildSettings("jobs", "test", images_per_shard=10))
    sections = {
        "train": {"steps": STEPS, "log_every": 10, "global_batch": 24, "accumulation": 1},
        "checkpoint": {"every": 20, "keep": 2},
        "cluster": {"workers": 1, "cpus_per_worker": 0.5},
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config_tree(data, folder, name, **sections)))
    return path


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not run.exists() or run_status(str(run)).step < step:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def prove(run: Path) -> None:
    report = audit(str(run), cache=str(run.parent / "cache"))
    assert not report.problems, report.problems


def drivers(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "cluster.cli" in command and f"run.name={name}" in command:
                found.append(process)
    return found


def test_a_job_is_submitted_stopped_and_resubmitted_with_another_size(
    head: Head, tmp_path: Path
) -> None:
    config, run = run_of(tmp_path, "job"), tmp_path / "job"
    at = ("--ray-address", head.address)
    status, said = lxscale("submit", str(config), *at)
    assert status == 0, said
    (job,) = re.findall(r"submitted (lxscale-job-\S+) to", said)
    log = Following("logs", "-f", str(run), *at)
    wait_for_step(run, 40)
    status, said = lxscale("submit", str(config), *at)
    assert status == 3 and f"has a job that is RUNNING, {job}" in said, said
    status, said = lxscale("status", str(run), "--json", *at)
    told = json.loads(said)
    assert told["state"] == "running" and told["job"]["status"] == "RUNNING", said
    assert told["total"] == STEPS and told["job"]["id"] == job

    moment = time.time()
    status, said = lxscale("stop", "job", *at)
    note_cost("lxscale stop, to its end", time.time() - moment)
    (saved,) = map(int, re.findall(r"step (\d+) is saved", said))
    assert status == 0 and f"{job} stopped" in said, said
    assert log.finish(30) == 75
    (last,) = map(int, re.findall(r"^stopped at step (\d+), saved in", log.text(), re.MULTILINE))
    assert last == saved < STEPS and log.lines[-1] == f"job {job} stopped", log.text()
    assert run_status(str(run)).state == "stopped"
    status, said = lxscale("stop", job, *at)
    assert status == 0 and "no job of it is running" in said, said
    status, said = lxscale("watch", str(run), *at)
    assert status == 3 and "was stopped by a person" in said, said

    # Nothing is left of the machine that submitted it.
    config.unlink()
    status, said = lxscale("resubmit", str(run), "cluster.workers=2", *at)
    assert status == 0, said
    watch = Following("watch", str(run), *at)
    assert watch.finish() == 0, watch.text()
    assert watch.lines[-1] == f"done: step {STEPS}, saved in {run}"
    assert re.search(r"attempt 2 \| 2 workers.*step \d+", lxscale("logs", "job", *at)[1])
    prove(run)
    status, said = lxscale("runs", str(tmp_path))
    assert status == 0 and re.search(rf"^job +done +{STEPS} of {STEPS} +2 ", said, re.M), said
    # Not the dashboard, but another port of the head.
    status, said = lxscale("status", str(run), "--ray-address", f"127.0.0.1:{head.port}")
    assert status == 2 and "cannot reach the job server" in said and said.count("\n") == 1, said


def test_watches_bring_a_run_through_a_lost_driver_and_a_lost_head(
    head: Head, tmp_path: Path
) -> None:
    """Two of them, and the run's end is the undisturbed one's."""
    at = ("--ray-address", head.address)
    assert lxscale("submit", str(run_of(tmp_path, "whole")), *at)[0] == 0
    whole = Following("watch", str(tmp_path / "whole"), *at)
    assert whole.finish() == 0, whole.text()
    run = tmp_path / "run"
    assert lxscale("submit", str(run_of(tmp_path, "run")), *at)[0] == 0
    watches = [Following("watch", str(run), *at) for _ in range(2)]
    wait_for_step(run, 60)
    (driver,) = drivers("run")
    moment = time.time()
    driver.kill()
    time.sleep(3)  # for what its workers were committing
    before = run_status(str(run)).step
    wait_for_step(run, before + 40)
    note_cost("kill -9 of a job's driver, to 40 steps more", time.time() - moment)
    said = lxscale("status", str(run), "--json", *at)[1]
    assert json.loads(said)["job"]["tries"] == 1 and json.loads(said)["attempt"] == 2, said
    assert re.search(r"-a000002-1$", json.loads(said)["job"]["id"]), said

    head.kill()
    time.sleep(10)
    before, moment = run_status(str(run)).step, time.time()
    head.start()
    wait_for_step(run, before + 40)
    note_cost("a new head at the address, to 40 steps more", time.time() - moment)
    for watch in watches:
        assert watch.finish() == 0, watch.text()
        assert watch.lines[-1] == f"done: step {STEPS}, saved in {run}"
        assert "cannot reach" in watch.text()
    # The one that looks later finds the other's job there already.
    told = "\n".join(watch.text() for watch in watches)
    assert "ended by signal 9" in told
    assert len(set(re.findall(r"submitted (\S+),", told))) == 2, told
    assert run_status(str(run)).attempt == 3, told
    assert_bitwise(tmp_path / "whole", run)
    prove(run)


def test_a_run_that_gets_no_further_is_given_up(head: Head, tmp_path: Path) -> None:
    at = ("--ray-address", head.address)
    assert lxscale("submit", str(run_of(tmp_path, "broken")), "--python", "false", *at)[0] == 0
    again = ("--python", "false", "--max-crashes", "2")
    status, said = lxscale("watch", str(tmp_path / "broken"), *again, *at)
    assert status == 1 and said.count("submitted lxscale-broken-") == 2, said
    assert re.search("^error: 2 jobs in a row .*ended with 1", said, re.M), said

    # A cluster that is full may have room some day.
    large = {"workers": 64, "cpus_per_worker": 0.5, "start_timeout_s": 1}
    assert lxscale("submit", str(run_of(tmp_path, "large", cluster=large)), *at)[0] == 0
    watch = Following("watch", str(tmp_path / "large"), "--max-crashes", "1", *at)
    deadline = time.monotonic() + 180
    while watch.text().count("submitted lxscale-large-") < 2:
        assert watch.process.poll() is None and time.monotonic() < deadline, watch.text()
        time.sleep(0.5)
    watch.process.terminate()
    assert watch.finish(20) == 143 and "ended with 75" in watch.text(), watch.text()

    path = run_of(tmp_path, "wrong", data={"train": str(tmp_path / "none")})
    assert lxscale("submit", str(path), *at)[0] == 0
    status, said = lxscale("watch", str(tmp_path / "wrong"), *at)
    assert status == 2 and said.splitlines()[-1].startswith("error: job lxscale-wrong-"), said
    assert "none" in said and "submitted" not in said, said


def test_a_watch_that_is_ended_goes_on_when_it_is_started_again(head: Head, tmp_path: Path) -> None:
    at = ("--ray-address", head.address)
    run = tmp_path / "run"
    assert lxscale("submit", str(run_of(tmp_path, "run")), *at)[0] == 0
    watch = Following("watch", str(run), *at)
    wait_for_step(run, 20)
    watch.process.send_signal(signal.SIGTERM)
    assert watch.finish(20) == 143, watch.text()
    for driver in drivers("run"):
        driver.kill()
    watch = Following("watch", str(run), *at)
    assert watch.finish() == 0, watch.text()
    assert watch.text().count("submitted lxscale-run-") == 1
    prove(run)
