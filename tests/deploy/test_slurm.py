"""deploy/slurm.sbatch on a real Slurm of this machine: what a requeue, a signal and an end cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from shards.format.build import BuildSettings, build
from tests.conftest import small_records, subprocess_environment
from tests.deploy.slurm import Slurm, slurm, submit, why_no_slurm
from tests.ranks import config_tree
from tests.trainer.test_resume import assert_bitwise
from trainer.audit import audit
from trainer.checkpoint.generations import find_generation

pytestmark = pytest.mark.faults

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sbatch"
STEPS = 400


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes with two cores each."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    # What the script takes from PATH: of this environment, and this checkout.
    commands = {"lxscale": " -m cluster.cli", "ray": " -m ray.scripts.scripts", "python": ""}
    for name, module in commands.items():
        command = bin_folder / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        command.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
        patch.setenv("RAY_worker_niceness", "0")
        with slurm(folder) as made:
            yield made


class Job:
    """A run in a folder, submitted."""

    def __init__(self, machine: Slurm, folder: Path, steps: int, *options: str) -> None:
        self.machine, self.folder, self.log = machine, folder, folder / "job.log"
        if not (folder / "set").exists():
            settings = BuildSettings("faults", "test", images_per_shard=10)
            build(small_records(40), folder / "set", settings)
        self.config("run", steps)
        script = (str(SCRIPT), str(folder / "run.yaml"))
        self.number = submit(
            machine, f"--output={self.log}", f"--chdir={folder}", *options, *script
        )

    def config(self, name: str, steps: int) -> Path:
        tree = config_tree(
            self.folder / "set",
            self.folder,
            name,
            train={"steps": steps, "log_every": 1, "global_batch": 24, "accumulation": 1},
            checkpoint={"every": 20, "keep": 2},
            cluster={"workers": 2, "start_timeout_s": 120},
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def step(self) -> int:
        return max([0, *map(int, re.findall(r" step (\d+)/\d+ \|", self.text()))])

    def wait(self, what: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline and (self.state() != "FAILED" or what()), (
                self.machine.job(self.number),
                self.text(),
                *(p.read_text() for p in self.folder.glob("lxscale-ray-*.log")),
            )
            time.sleep(0.2)

    def state(self) -> str:
        return self.machine.job(self.number)["JobState"]

    def wait_until_put_back(self, times: int) -> None:
        """And have it start soon: Slurm lets two minutes pass, as nodes have to have ended it."""
        self.wait(lambda: self.machine.job(self.number)["Restarts"] == str(times), 120)
        self.wait(lambda: self.state() == "PENDING", 60)
        time.sleep(5)
        self.machine.call("scontrol", "update", f"jobid={self.number}", "StartTime=now")


def test_a_requeue_and_a_signal_lose_nothing(machine: Slurm, tmp_path: Path) -> None:
    job = Job(machine, tmp_path, STEPS, "--nodes=2", "--cpus-per-task=1")
    job.wait(lambda: job.step() >= 50)
    machine.call("scontrol", "requeue", str(job.number))
    job.wait_until_put_back(1)
    first = find_generation(str(tmp_path / "run")).step
    job.wait(lambda: job.step() >= first + 50)
    # What Slurm sends before the time limit.
    machine.call("scancel", "--signal=USR1", "--batch", str(job.number))
    job.wait_until_put_back(2)
    second = find_generation(str(tmp_path / "run")).step
    job.wait(lambda: job.state() == "COMPLETED")
    assert machine.job(job.number)["ExitCode"] == "0:0"
    assert f"done: step {STEPS}" in job.text()
    # Both ends were told in time to save: each attempt goes on where the one before ended.
    steps = [int(s) for s in re.findall(r" step (\d+)/\d+ \|", job.text())]
    assert steps == list(range(1, STEPS + 1)), (first, second)
    assert f"stopped at step {first}," in job.text() and f"stopped at step {second}," in job.text()
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", str(job.config("whole", STEPS))],
        env=subprocess_environment(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert_bitwise(tmp_path / "whole", tmp_path / "run")
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems


def test_a_job_that_a_person_ends_saves_and_stays_ended(machine: Slurm, tmp_path: Path) -> None:
    """On one node, too."""
    job = Job(machine, tmp_path, 100_000, "--nodes=1", "--cpus-per-task=2")
    job.wait(lambda: job.step() >= 30)
    machine.call("scancel", str(job.number))
    job.wait(lambda: job.state() == "CANCELLED", 60)
    time.sleep(3)
    assert machine.job(job.number)["Restarts"] == "0" and job.state() == "CANCELLED"
    assert find_generation(str(tmp_path / "run")).step == job.step()


def test_a_run_that_cannot_go_on_is_not_put_back(machine: Slurm, tmp_path: Path) -> None:
    job = Job(machine, tmp_path, 100, "--nodes=1", "--cpus-per-task=2")
    machine.call("scontrol", "hold", str(job.number))
    (tmp_path / "run.yaml").write_text("train: {steps: many}\n")
    machine.call("scontrol", "release", str(job.number))
    job.wait(lambda: job.state() == "FAILED", 120)
    assert machine.job(job.number)["ExitCode"] == "2:0", job.text()
    assert job.text().splitlines()[-1].startswith("error: "), job.text()
    assert machine.job(job.number)["Restarts"] == "0"
