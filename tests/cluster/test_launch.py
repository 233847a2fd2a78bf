"""Starting and ending a Ray of our own: what is left behind, what is said, who can reach it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import local_ray, reaper
from cluster.errors import LaunchError, LostError, exit_status
from cluster.launch import launch
from cluster.ray_session import ray_session
from cluster.stopping import Stop
from cluster.worker_output import Printed
from shards.store.folders import sweep
from tests.conftest import subprocess_environment
from tests.ranks import config_tree
from trainer.config import RunConfig, parse_config
from trainer.loop import Control
from trainer.sections import ClusterSection


def config(tmp_path: Path, **cluster: Any) -> RunConfig:
    return parse_config(config_tree(tmp_path, tmp_path, "run", cluster=cluster), "test")


def printing_loop(config: RunConfig, control: Control) -> dict[str, Any]:
    """Prints, leaves a process behind, and has a bug."""
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid)
    print("from a library", file=sys.stderr)
    raise KeyError("a bug in the loop")


def test_a_bug_is_shown_and_the_logs_are_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in subprocess_environment().items():
        monkeypatch.setenv(key, value)
    with pytest.raises(LaunchError) as caught:
        launch(config(tmp_path, workers=1, max_failures=0), loop=printing_loop)
    message = str(caught.value)
    assert "printing_loop" in message and "KeyError: 'a bug in the loop'" in message
    kept = Path(message.rpartition(" ")[2])
    assert list(kept.glob("ray/session_*/logs/worker-*")), message
    shutil.rmtree(kept)
    output = capfd.readouterr().out
    assert output.count("[worker 0] from a library\n") == 1
    assert output.count("[worker 0] child ") == 1
    child = output.partition("[worker 0] child ")[2].split()[0]
    deadline = time.monotonic() + 10
    while _alive(Path("/proc", child)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(Path("/proc", child))
    assert local_ray.ray_constants.ENABLE_RAY_CLUSTER


def test_rays_folder_is_its_owners_alone_and_may_lie_deep() -> None:
    """Ray opens it to everybody; its sockets' paths fit below the longest place that is taken."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        root = Path(place, "x" * 40)
        root = Path(str(root)[: local_ray._LONGEST_ROOT])
        script = f"""
import os, stat, tempfile
from pathlib import Path
os.umask(0)
tempfile.tempdir = {str(root)!r}
Path(tempfile.tempdir).mkdir()
from cluster.local_ray import scratch
from cluster.ray_session import ray_session
from cluster.stopping import Stop
from trainer.config import ClusterSection
with scratch() as folder, ray_session(ClusterSection(), None, folder, Stop(60)):
    assert str(folder).startswith(tempfile.tempdir + "/"), folder
    sockets = [p for p in folder.rglob("*") if p.is_socket()]
    print(max(len(str(p)) for p in sockets), oct(stat.S_IMODE(folder.stat().st_mode)))
print(os.listdir(tempfile.tempdir))
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=subprocess_environment(HOME=place),
            capture_output=True,
            text=True,
            timeout=120,
        )
        longest, mode, left = done.stdout.split()
        assert int(longest) <= 107 and (mode, left) == ("0o700", "[]"), done
        # A token there would have every cluster that this user starts ask for it.
        assert not Path(place, ".ray").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_gpus_that_are_not_there_are_an_error_and_no_wait(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="more than the 0 GPUs") as caught:
        launch(config(tmp_path, workers=2, gpus_per_worker=1))
    assert "Logs" not in str(caught.value)


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_ray_that_does_not_start_on_a_busy_machine_is_worth_another_try(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        if how == "hangs":
            time.sleep(60)
        raise Exception("The current node timed out during startup\nand more")

    monkeypatch.setattr("ray.init", init)
    cluster = ClusterSection(start_timeout_s=0.3 if how == "hangs" else 60)
    with (
        pytest.raises(LostError, match=r"cannot start Ray: [^\n]*$") as caught,
        ray_session(cluster, None, tmp_path, Stop(60)),
    ):
        pass
    assert exit_status(caught.value) == 75


def test_what_a_killed_driver_leaves_is_ended_and_removed(tmp_path: Path) -> None:
    session = tmp_path / "session"
    session.mkdir()
    driver = f"""
import os, pathlib, signal, subprocess
from cluster import reaper
folder = pathlib.Path({str(session)!r})
reaper.start(folder)
env = {{**os.environ, reaper.MARK: str(folder)}}
print(subprocess.Popen(["sleep", "600"], env=env, stdout=subprocess.DEVNULL).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", driver],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    child = Path("/proc", done.stdout.strip())
    deadline = time.monotonic() + 20
    while (session.exists() or _alive(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session.exists() and not _alive(child)


def _alive(process: Path) -> bool:
    try:
        return bool((process / "cmdline").read_bytes())  # a zombie has none
    except OSError:
        return False


def test_a_process_that_wrote_its_title_over_its_environment_is_found(tmp_path: Path) -> None:
    """Ray's agents do, as far as their environment lies in one piece: the first of it is gone."""
    session = tmp_path / "session"
    session.mkdir()
    script = "import ray, time; ray._raylet.setproctitle('ray::Agent'); print(1); time.sleep(600)"
    with open(session / "agent.out", "w+") as log:
        agent = subprocess.Popen(
            [sys.executable, "-u", "-c", script],
            env={reaper.MARK: str(session), **os.environ},
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 60
            while not (session / "agent.out").read_text():
                assert agent.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            assert reaper.MARK.encode() not in Path(f"/proc/{agent.pid}/environ").read_bytes()
            reaper.reap(str(session))
            assert agent.wait(10) == -signal.SIGKILL
        finally:
            agent.kill()


def test_a_reaper_that_is_told_to_stop_ends_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, reaper.MARK: str(tmp_path)}
    with subprocess.Popen(["sleep", "600"], env=environment) as child:
        reaper.stop(reaper.start(tmp_path))
        assert child.poll() is None and tmp_path.exists()
        reaper.reap(str(tmp_path))
        assert child.wait(10) == -9


def test_folders_of_killed_drivers_are_removed_and_used_ones_are_not(tmp_path: Path) -> None:
    hour, week = 3600, 7 * 86400
    names = {"lxscale-used": hour, "lxscale-dead": hour, "lxscale-dead-failed": hour, "other": hour}
    for name, age in {**names, "lxscale-old-failed": week + hour}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name, (0, time.time() - age))
    with (tmp_path / "lxscale-used" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(tmp_path, local_ray._PREFIX, local_ray._is_kept)
    assert {p.name for p in tmp_path.iterdir()} == {"lxscale-used", "lxscale-dead-failed", "other"}


def test_printed_text_is_passed_on_in_lines() -> None:
    lines: list[str] = []
    stream = Printed(lines.append)
    print("a", "b", end="", file=stream)
    print("c\n\n 10 %\r 20 %\nrest", end="", file=stream)
    assert lines == ["a bc", " 10 %", " 20 %"]
