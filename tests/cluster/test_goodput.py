"""What a real run says of its time when workers and whole jobs are killed, and its curves then."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from cluster.cli.main import main
from shards.format.build import BuildSettings, build
from shards.store import objects
from tests.cluster.faulty import write_plan
from tests.cluster.test_fault_table import Watched
from tests.conftest import small_records
from tests.ranks import config_tree
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.lease import BEAT_S
from trainer.goodput import Goodput, goodput_of

pytestmark = pytest.mark.faults

STEPS, EVERY = 240, 40

Start = Callable[..., Watched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts, or goes on with, the run `run` of a storage."""
    data = tmp_path / "set"
    build(small_records(40), data, BuildSettings("goodput", "test", images_per_shard=10))
    write_plan(tmp_path / "faults", [])
    jobs: list[Watched] = []

    def start(storage: str) -> Watched:
        tree: dict[str, Any] = config_tree(
            data,
            tmp_path,
            "run",
            train={"steps": STEPS, "log_every": 1, "global_batch": 48},
            checkpoint={"every": EVERY},
            cluster={"workers": 2, "cpus_per_worker": 0.5},
        )
        tree["run"]["storage"] = storage
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        jobs.append(Watched(path, tmp_path / "faults"))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            kill_all(job)


def kill_all(job: Watched) -> None:
    """As a machine that loses its power does."""
    family = [*job.me.children(recursive=True), job.me]
    for process in family:
        process.suspend()
    for process in family:
        process.kill()
    psutil.wait_procs(family, 20)
    job.finish()


def times_of(folder: Path, attempt: int) -> list[tuple[float, int]]:
    """When an attempt made each of its steps, by its curves."""
    found = []
    for path in sorted(folder.glob(f"*tfevents.a{attempt:06d}-*")):
        for event in EventFileLoader(str(path)).Load():
            if any(value.tag == "train/loss" for value in event.summary.value):
                found.append((event.wall_time, event.step))
    return found


def test_the_parts_of_the_time_are_those_of_the_log(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of a worker, then of everything."""
    run, began = tmp_path / "run", time.time()
    job = start(str(tmp_path))
    job.wait_for_step(EVERY + 25)
    (worker, *_) = job.children("ray::Worker")
    killed_at = time.time()
    os.kill(worker.pid, signal.SIGKILL)
    while job.next_step_after(killed_at) is None:  # it goes on from the checkpoint
        assert job.process.poll() is None, job.text()
        time.sleep(0.02)
    job.wait_for_step(2 * EVERY + 25)
    alive = goodput_of(str(run))
    kill_all(job)
    job = start(str(tmp_path))
    assert job.finish() == 0, job.text()
    ended = next(t for t, line in job.lines if f"checkpoint of step {STEPS}" in line)

    found = goodput_of(str(run))
    one, two, three = (times_of(run / "tensorboard", attempt) for attempt in (1, 2, 3))
    lost, killed, away, last = found.parts
    assert [p.attempt for p in (lost, killed, last)] == [1, 2, 3]
    assert (lost.kind, killed.kind, last.kind) == ("lost", "killed", "done")
    # The wall, and that all of it is somewhere.
    assert began < lost.began < one[0][0] and found.wall == pytest.approx(ended - lost.began, abs=1)
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-3)
    assert found.seconds["other"] < 1
    # From the last step before a fault to the first one after it; a driver that was killed is last
    # heard of by its lease.
    gap = two[0][0] - one[-1][0]
    parts = lost.seconds["detect"] + lost.seconds["tear down"]
    parts += killed.seconds["re-form"] + killed.seconds["restore"]
    assert parts == pytest.approx(gap, abs=1)
    gap = three[0][0] - two[-1][0]
    parts = away.seconds["away"] + last.seconds["re-form"] + last.seconds["restore"]
    assert parts == pytest.approx(gap, abs=1 + BEAT_S)
    # Steps, in seconds of them.
    step_s = (three[-1][0] - three[0][0]) / (len(three) - 1)
    assert abs(lost.lost_steps - (one[-1][1] - two[0][1] + 1)) * step_s < 1
    assert abs(killed.lost_steps - (two[-1][1] - three[0][1] + 1)) * step_s < 1 + BEAT_S
    assert found.unsaved_steps == 0 and found.faults == 2 and found.unknown_steps == 0
    assert last.seconds["kept"] == pytest.approx(three[-1][0] - three[0][0] + step_s, abs=1)
    assert found.replay == pytest.approx(
        two[one[-1][1] - two[0][1]][0]
        - two[0][0]
        + three[two[-1][1] - three[0][1]][0]
        - three[0][0],
        abs=1 + BEAT_S,
    )
    check_alive(alive)

    assert main(["goodput", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["share"] == pytest.approx(found.share)
    assert main(["goodput", str(run)]) == 0
    output = capsys.readouterr().out
    assert "lost worker" in output and f"goodput {found.share:.1%}" in output
    # Live, in the curves.
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    live = events.Scalars("goodput/kept_share")[-1].value
    assert found.share is not None and live == pytest.approx(found.share, abs=0.05)
    assert events.Scalars("goodput/lost_steps")[-1].value == found.lost_steps
    (restart,) = {e.value for e in events.Scalars("goodput/start_seconds") if e.step >= three[0][1]}
    assert restart == pytest.approx(gap, abs=1 + BEAT_S)


def check_alive(found: Goodput) -> None:
    """What was said while it trained."""
    assert found.parts[-1].kind == "open" and found.parts[-1].attempt == 2
    assert found.faults == 1 and found.seconds["unsaved"] > 0
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-3)


def test_curves_on_object_storage_outlive_the_machine(
    start: Start, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of everything between two uploads; gone on with elsewhere."""
    for place in ("here", "elsewhere"):
        (tmp_path / place).mkdir()
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "30")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "here"))
    job = start(f"{s3}/outlive")
    job.wait_for_step(EVERY + 25)
    kill_all(job)
    url = f"{s3}/outlive/run/tensorboard"
    saved = find_generation(f"{s3}/outlive/run").step
    assert saved >= EVERY and steps_of(url)[:saved] == list(range(1, saved + 1))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    job = start(f"{s3}/outlive")
    assert job.finish() == 0, job.text()
    assert steps_of(url) == list(range(1, STEPS + 1))
    assert any(name.startswith("steps-a000002") for name in objects.list_names(url))
    assert not list(tmp_path.glob("elsewhere/lxscale-curves-*"))
    assert not (Path("runs") / "run").exists()


def steps_of(url: str) -> list[int]:
    events = EventAccumulator(url, size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
