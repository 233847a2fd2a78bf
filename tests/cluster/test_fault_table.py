"""One run through every fault of workers, nodes and drivers: its result is the uninterrupted one's.

Notes what each fault cost: seconds from it to the next step's line.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from shards.format.build import BuildSettings, build
from tests.cluster.faulty import FOLDER, PLACES, Fault, write_plan
from tests.conftest import note_cost, small_records, subprocess_environment
from tests.ranks import config_tree
from tests.trainer.test_resume import assert_bitwise
from trainer.audit import audit
from trainer.checkpoint.generations import find_generation

pytestmark = pytest.mark.faults

STEPS = 900


class Watched:
    """A job whose lines are noted with their times."""

    def __init__(
        self, config: Path, faults: Path, *arguments: str, within: Sequence[str] = ()
    ) -> None:
        """within: a command that runs the job's."""
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", "tests.cluster.faulty", str(config), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=subprocess_environment(**{FOLDER: str(faults)}),
            start_new_session=True,
        )
        self.me = psutil.Process(self.process.pid)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip("\n")))

    def step(self) -> int:
        """The last step that was told of."""
        return ([0] + [step for _, step in self.steps()])[-1]

    def steps(self) -> list[tuple[float, int]]:
        """Each step that was told of, and when."""
        told = [(t, re.search(r" step (\d+)/\d+ \|", line)) for t, line in list(self.lines)]
        return [(t, int(found[1])) for t, found in told if found]

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while self.step() < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def children(self, part: str) -> list[psutil.Process]:
        found = []
        for child in self.me.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if part in child.name() or part in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def finish(self, seconds: float = 240) -> int:
        status = self.process.wait(seconds)
        self._thread.join(10)
        return status

    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def next_step_after(self, moment: float) -> float | None:
        """Seconds from `moment` to the first step of a later attempt."""
        told = [t for t, line in self.lines if t > moment and ", attempt " in line]
        steps = [t for t, _ in self.steps() if told and t > told[0]]
        return steps[0] - moment if steps else None


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "set"
    build(small_records(40), folder, BuildSettings("faults", "test", images_per_shard=10))

    def tree(name: str) -> dict[str, Any]:
        return config_tree(
            folder,
            tmp_path,
            name,
            train={"steps": STEPS, "log_every": 1, "global_batch": 24, "accumulation": 1},
            checkpoint={"every": 10, "keep": 2},
            data={
                "train": str(folder),
                "cache": str(tmp_path / "cache"),
                "loader_workers": 1,
            },
            cluster={"workers": 2, "cpus_per_worker": 0.5, "hang_timeout_s": 15},
        )

    for name in ("run", "whole"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree(name)))
    yield tmp_path / "run.yaml"


def expressions() -> dict[str, str]:
    """Those that docs/cluster.md gives to who watches the log."""
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    part = text.partition("## Lines to watch for")[2].partition("\nNo line of")[0]
    lines = [line[4:] for line in part.splitlines() if line.startswith("    ")]
    found = {line[:20].strip(): line[20:] for line in lines}
    assert len(found) == 8
    return found


def leftovers(temporary: Path) -> set[str]:
    """What a run may leave on this machine: temporary folders, shared memory, listening ports,
    processes of this project or of Ray."""
    found = {str(p) for folder in (temporary, Path("/dev/shm")) for p in folder.iterdir()}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "ray" in command or "multiprocessing" in command or "lxscale" in command:
                found.add(f"{process.pid} {command[:80]}")
    ports = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found | {f"port {p}" for p in ports}


@pytest.mark.timeout(1200)
def test_every_fault_of_workers_and_drivers_costs_seconds_and_no_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of this run alone; not below tmp_path, which is too long for Ray.
    home = tempfile.TemporaryDirectory(prefix="faults-")
    monkeypatch.setenv("TMPDIR", home.name)
    temporary = Path(home.name)
    before = leftovers(temporary)
    faults = tmp_path / "faults"
    write_plan(faults, [])
    whole = Watched(tmp_path / "whole.yaml", faults)
    assert whole.finish() == 0, whole.text()

    kinds = [(f"kill -9 in {place}", place, "kill") for place in PLACES]
    kinds += [("SIGSTOP of a worker", "forward", "stop"), ("a frozen thread", "backward", "freeze")]
    # The commit is rank 0's; otherwise rank 0 and the other in turn.
    plan = [
        Fault(name, 40 * (i + 1), place, 0 if place == "commit" else i % 2, how)
        for i, (name, place, how) in enumerate(kinds)
    ]
    write_plan(faults, plan)
    costs: dict[str, float | None] = {}
    job = Watched(config, faults)
    job.wait_for_step(40 * (len(plan) + 1), 400)
    for fault in plan:
        happened = float((faults / fault.name).read_text())
        costs[fault.name] = job.next_step_after(happened)

    def inject(name: str, victims: list[psutil.Process], more: int = 30) -> None:
        assert victims, f"nothing to kill for {name}"
        at = job.step()
        moment = time.time()
        for victim in victims[:1]:
            victim.kill()
        job.wait_for_step(at + more)
        costs[name] = job.next_step_after(moment)

    inject("kill -9 of a loader process", _loaders(job))
    inject("kill -9 of the raylet", job.children("raylet"))

    said: list[str] = []

    def rerun(name: str, end: Any, status: int | None) -> None:
        """The job ends by a fault; the same command again goes on."""
        nonlocal job
        moment = time.time()
        end()
        found = job.finish(120)
        took = time.time() - moment
        if status is not None:
            assert found == status, (name, job.text())
            errors = [line for _, line in job.lines if line.startswith("error:")]
            assert len(errors) <= 1 and "Traceback" not in job.text(), job.text()
        said.extend(line for _, line in job.lines)
        job = Watched(config, faults)
        job.wait_for_step(job.step() + 1)
        costs[name] = (job.next_step_after(moment) or 0) - (0 if status is None else took)
        if status is not None:
            costs[f"  (until {name} had ended the command)"] = took

    rerun("kill -9 of the driver", job.process.kill, None)
    rerun("kill -9 of the GCS", lambda: job.children("gcs_server")[0].kill(), 75)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        rerun(number.name, lambda n=number: job.process.send_signal(n), 75)

    def everywhere(number: signal.Signals) -> None:
        """As schedulers do, to all processes of a job."""
        for process in (*job.me.children(recursive=True), job.me):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        rerun(f"{number.name} to all processes", lambda n=number: everywhere(n), 75)
        assert "stopped at step" in said[-1], said[-9:]
    assert job.finish() == 0, job.text()
    said += [line for _, line in job.lines]
    for what, expression in expressions().items():
        assert any(re.search(expression, line) for line in said), (what, expression)

    for what, cost in costs.items():
        note_cost(what, cost)
    assert_bitwise(tmp_path / "whole", tmp_path / "run")
    assert find_generation(str(tmp_path / "run")).step == STEPS
    report = audit(str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    assert not report.problems, report.problems
    deadline = time.monotonic() + 20
    while (left := leftovers(temporary) - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    # The logs of the Ray that was lost, which its error names.
    kept = {path for path in left if path.endswith("-failed")}
    assert left == kept and len(kept) == 1, left
    shutil.rmtree(kept.pop())


def _loaders(job: Watched) -> list[psutil.Process]:
    """Loader processes: children of the servers that workers fork them from."""
    servers = job.children("multiprocessing.forkserver")
    return [child for p in servers for child in p.children()]


@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_worker_that_fails_at_the_same_step_again_and_again_ends_the_run(
    kind: str, config: Path, tmp_path: Path
) -> None:
    """An error of the code is not tried again; a worker that dies is, three times. The run goes on
    from a checkpoint and makes none: one that landed between two deaths would count anew."""
    faults = tmp_path / "faults"
    plan = [Fault(f"{kind} {i}", 25, "optimizer step", 1, kind) for i in range(9)]
    write_plan(faults, plan)
    before = Watched(config, faults, "train.steps=20")
    assert before.finish() == 0, before.text()
    job = Watched(config, faults, "checkpoint.every=1000")
    status = job.finish()
    text = job.text()
    happened = [f for f in plan if (faults / f.name).exists()]
    (error,) = [line for _, line in job.lines if line.startswith("error:")]
    if kind == "raise":
        assert status == 2 and len(happened) == 1, text
        assert "KeyError" in error and "injected" in error
    else:
        assert status == 75 and len(happened) == 4, text
        assert "cluster.max_failures=3" in error and "without a new checkpoint" in error
    assert find_generation(str(tmp_path / "run")).step == 20
    for folder in Path(tempfile.gettempdir()).glob("lxscale-*-failed"):
        if str(folder) in error:
            assert os.listdir(folder)


@pytest.mark.parametrize("place", ["commit", "end"])
def test_a_raylet_that_dies_as_a_run_ends(place: str, config: Path, tmp_path: Path) -> None:
    """At its last commit, or when all is done: the run is done all the same."""
    faults = tmp_path / "faults"
    write_plan(faults, [Fault("raylet", STEPS, place, 0, "raylet")])
    job = Watched(config, faults)
    assert job.finish() == 0, job.text()
    assert (faults / "raylet").exists() and "error:" not in job.text(), job.text()
    assert find_generation(str(tmp_path / "run")).step == STEPS
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems
