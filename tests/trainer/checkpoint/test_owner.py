"""Who owns a run: claims, leases, take-overs, and runs that were copied, old, or lack something."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shards.store import objects
from tests.conftest import subprocess_environment
from tests.object_store import Fault, FaultProxy, ObjectStore, Request
from tests.trainer.checkpoint.test_checkpoint import newest_whole, own, save
from trainer.checkpoint import lease, owner
from trainer.checkpoint.errors import CheckpointError, OwnedError, StaleAttemptError
from trainer.checkpoint.evidence import check_never_committed
from trainer.checkpoint.format import manifest_bytes
from trainer.checkpoint.generations import Generation, find_generation, generations
from trainer.checkpoint.owner import Claimant, Owner, check_free, claim
from trainer.checkpoint.process import Process, has_ended, this_process


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a tenth of the time."""
    for name, seconds in (("BEAT_S", 0.1), ("DEAD_S", 1.5), ("_POLL_S", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(urls: list[str], before: list[bytes]) -> list[bytes]:
        raise AssertionError(f"{urls} are watched")

    monkeypatch.setattr(owner, "watch", watch)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Owners are on another machine, and die as soon as they are there."""
    far = Process("far-away", 7, "another boot", "pid:[1]", 5)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "this_process", lambda: far)
        patch.setattr(lease.Heart, "_run", lambda self: self.beat(False))
        yield


def names(run: str, *folder: str) -> list[str]:
    return objects.list_names(objects.join(run, *folder))


def files(run: str) -> list[Path]:
    """Those that are there. A heart that beats at this moment has another, whose name has a dot."""
    return sorted(p for p in Path(run).rglob("*") if p.is_file() and p.name[0] != ".")


# --- one at a time ------------------------------------------------------------------------------


def test_a_live_owner_is_told_and_left_alone(run: str) -> None:
    first = claim(run, Claimant())
    save(first, 1, 1.0)
    before = files(run)
    who = rf"host {socket.gethostname()}, process {os.getpid()}, since 20\d\d-.* UTC; attempt 1\)"
    for action in (check_free, claim):
        with pytest.raises(OwnedError, match=rf"owned by a live job \({who}.*--take-over"):
            action(run, Claimant())
    assert files(run) == before
    assert first.lost() is None
    save(first, 2, 2.0)
    assert newest_whole(run) == 2.0
    first.close()


def test_a_run_is_taken_over_when_that_is_asked_for(run: str) -> None:
    first = claim(run, Claimant())
    save(first, 1, 1.0)
    asked = check_free(run, Claimant(take_over=True))
    second = claim(run, asked)
    assert [g.step for g in second.found if isinstance(g, Generation)] == [1]
    deadline = time.monotonic() + 10
    while first.lost() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "attempt 1" in str(first.lost()) and "attempt 2 (host" in str(first.lost())
    with pytest.raises(StaleAttemptError, match="attempt 2"):
        save(first, 2, 2.0)
    # Whoever asked once does not take it from a third.
    third = claim(run, Claimant(take_over=True))
    with pytest.raises(OwnedError, match="attempt 3"):
        claim(run, asked)
    for each in (first, second, third):
        each.close()


def test_an_owner_that_has_ended_is_followed_at_once(run: str, no_wait: None) -> None:
    claim(run, Claimant()).close()
    job = Claimant()
    claim(run, job)  # lives on, but in the same job
    assert claim(run, job).attempt == 3


def test_a_killed_owner_is_followed_at_once(run: str, no_wait: None) -> None:
    program = f"""
import os, signal
from trainer.checkpoint.owner import Claimant, claim
claim({run!r}, Claimant())
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], env=subprocess_environment())
    assert done.returncode == -signal.SIGKILL
    assert claim(run, Claimant()).attempt == 2


@pytest.mark.parametrize("ended", [False, True])
def test_a_job_without_workers_keeps_its_run_while_its_driver_lives(
    ended: bool, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were lost, or ended by themselves, and the next group of them is on its way. All of it
    on another machine."""
    far = Process("far-away", 7, "another boot", "pid:[1]", 5)
    monkeypatch.setattr(owner, "this_process", lambda: far)
    job = Claimant("job", driver=replace(far, pid=6))
    with lease.keep_job_lease(run, job.job):
        time.sleep(0.3)
        assert not Path(run).exists()  # nothing before the claim
        workers = claim(run, job)
        if not ended:
            workers._heart.beat = lambda ended: None
        workers.close()
        with pytest.raises(OwnedError, match="far-away, process 6, since"):
            check_free(run, Claimant())
        second = claim(run, job)
        assert second.attempt == 2
        second.close()
    assert claim(run, Claimant()).attempt == 3  # free at once
    assert not list(Path(run).rglob("job-*"))


def test_a_job_whose_driver_is_dead_is_followed_in_time(run: str, elsewhere: None) -> None:
    driver = Process("far-away", 6, "another boot", "pid:[1]", 5)
    save(claim(run, Claimant("job", driver=driver)), 1, 1.0)
    assert names(run, "attempts")[-1] == "job-job.json"
    began = time.monotonic()
    check_free(run, Claimant())
    assert 1.5 <= time.monotonic() - began < 5


def test_a_dead_owner_on_another_machine_is_followed_in_time(run: str, elsewhere: None) -> None:
    save(claim(run, Claimant()), 1, 1.0)
    began = time.monotonic()
    free = check_free(run, Claimant())
    assert time.monotonic() - began >= 1.5
    # Nobody watches it a second time.
    began = time.monotonic()
    second = claim(run, free)
    assert second.attempt == 2 and time.monotonic() - began < 1.5
    # A claim without a lease is of a dead owner, too.
    second.close()
    shutil.rmtree(Path(run) / "attempts")
    third = claim(run, Claimant())
    assert third.attempt == 3
    third.close()


def test_a_process_is_told_from_its_successor_of_the_same_number() -> None:
    me = this_process()
    assert not has_ended(me)
    assert has_ended(replace(me, started=me.started - 1))
    assert not has_ended(replace(me, boot="another", started=1))
    with subprocess.Popen(["sleep", "60"]) as child:
        started = owner_started(child.pid)
        process = replace(me, pid=child.pid, started=started)
        assert not has_ended(process)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process)  # though not yet reaped
    assert has_ended(process)


def owner_started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize("races", [10, pytest.param(200, marks=pytest.mark.faults)])
def test_one_of_many_claimants_wins(
    races: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through a proxy that delays each PUT by 5 to 30 ms; a real gateway in `make test-faults`."""
    server: ObjectStore = request.getfixturevalue("moto" if races == 10 else "gateway")
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    proxy = FaultProxy(server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    claimants = 4
    start = threading.Barrier(claimants)

    def delay(request: Request) -> Fault | None:
        seconds = 0.005 + (request.number * 7919 % 26) / 1000
        return Fault("delay", seconds=seconds) if request.method == "PUT" else None

    def compete(run: str) -> Owner | None:
        start.wait()
        try:
            return claim(run, Claimant())
        except OwnedError:
            return None

    proxy.begin(delay)
    with ThreadPoolExecutor(claimants) as pool:
        for race in range(races):
            run = f"{server.bucket}/{tmp_path.name}-{race}"
            won = [o for o in pool.map(compete, [run] * claimants) if o]
            assert len(won) == 1
            assert names(run, "checkpoints") == ["a000000-000001.json"]
            won[0].close()
    proxy.down()


def test_a_lease_outlives_an_outage(proxy: FaultProxy, s3: str, tmp_path: Path) -> None:
    first = claim(f"{s3}/{tmp_path.name}", Claimant())
    proxy.down()
    time.sleep(0.5)
    proxy.up()
    with pytest.raises(OwnedError):
        check_free(first.run_url, Claimant())
    first.close()


# --- copies, old and new runs ---------------------------------------------------------------------


def test_a_copy_goes_on_right(run: str, tmp_path: Path, elsewhere: None) -> None:
    """With all, without leases, without claims, without both."""
    for step in (10, 20, 30):
        save(own(run), step, float(step), keep=9)
    for what in ("all", "no leases", "no claims", "neither"):
        copy = tmp_path / what
        shutil.copytree(run, copy)
        if what in ("no leases", "neither"):
            shutil.rmtree(copy / "attempts")
        for attempt in (0, 1, 2) if what in ("no claims", "neither") else ():
            last = max((copy / "checkpoints").glob(f"a{attempt:06d}-*.json"))
            assert b"lxscale-claim" in last.read_bytes()
            last.unlink()
        with contextlib.closing(claim(str(copy), Claimant())) as mine:
            assert mine.attempt == 4
            found = mine.found[0]
            assert isinstance(found, Generation) and found.step == 30
            save(mine, 40, 40.0, keep=1)
        assert newest_whole(str(copy)) == 40.0, what
        assert len(names(str(copy), "checkpoints", "objects")) == 2


def test_a_run_of_the_first_version_goes_on(run: str, no_wait: None) -> None:
    """Its claims say nothing, its manifests are named by step and attempt."""
    for attempt, steps in ((1, (10, 50)), (2, (40,))):
        folder = Path(run) / "checkpoints"
        with contextlib.closing(own(run)) as old:
            for step in steps:
                save(old, step, float(step), keep=9)
                (path,) = folder.glob(f"a{attempt:06d}-*.json")
                path.rename(folder / f"step-{step:08d}-a{attempt:06d}.json")
                old._next = replace(old._next, index=1)
    for path in (Path(run) / "checkpoints").glob("a*"):
        path.unlink()
    for path in (Path(run) / "attempts").iterdir():
        path.write_bytes(b"{}")
    assert newest_whole(run) == 40.0
    new = claim(run, Claimant())
    assert new.attempt == 3 and names(run, "checkpoints")[0] == "a000002-000001.json"
    save(new, 41, 41.0, keep=2)
    assert names(run, "checkpoints")[1:] == ["a000003-000001.json", "step-00000040-a000002.json"]
    save(new, 42, 42.0, keep=2)
    assert [g.step for g in generations(run) if isinstance(g, Generation)] == [42, 41]
    new.close()


def test_an_attempt_is_above_all_that_left_anything(run: str) -> None:
    first = own(run)
    save(first, 1, 1.0)
    place = Path(run) / "checkpoints"
    for path in (
        place / "objects" / "step-00000003-a000006-r00000-abcd.safetensors",
        place / "record" / "step-00000002-00000003-a000007-abcd.jsonl",
        Path(run) / "attempts" / "000008-abcd.json",
    ):
        path.touch()
        second = own(run)
        assert f"a{second.attempt - 1:06d}" in path.name or path.parent.name == "attempts"
    assert second.attempt == 9
    save(second, 2, 2.0)
    assert newest_whole(run) == 2.0


def test_what_a_newer_version_wrote_is_not_passed_over(run: str) -> None:
    with contextlib.closing(own(run)) as first:
        save(first, 1, 1.0)
        save(first, 2, 2.0)
    newest = Path(find_generation(run).url)
    whole = newest.read_bytes()
    newest.write_bytes(whole.replace(b"lxscale-checkpoint-2", b"lxscale-checkpoint-3"))
    for action in (find_generation, own, lambda run: list(generations(run))):
        with pytest.raises(CheckpointError, match=rf"{newest.name} was written by a newer lxscale"):
            action(run)
    newest.write_bytes(whole)
    own(run).close()
    claims = sorted(Path(run, "checkpoints").glob("*.json"))
    claims[-1].write_bytes(claims[-1].read_bytes().replace(b"lxscale-claim-1", b"lxscale-claim-2"))
    with pytest.raises(CheckpointError, match=r"newer lxscale \(format lxscale-claim-2\): upgrade"):
        check_free(run, Claimant())


def test_a_damaged_link_keeps_its_name(run: str) -> None:
    """It may be a claim, and the owner before it may be asleep."""
    asleep = own(run)
    save(asleep, 1, 1.0)
    own(run)
    claims = sorted(Path(run, "checkpoints").glob("*.json"))
    claims[-1].write_bytes(b"torn")
    last = own(run)
    for step in (2, 3, 4):
        save(last, step, float(step), keep=1)
    with pytest.raises(StaleAttemptError):
        save(asleep, 5, 5.0)
    assert newest_whole(run) == 4.0


# --- from scratch? --------------------------------------------------------------------------------


def test_missing_manifests_are_an_error_and_no_new_start(run: str) -> None:
    check_never_committed(run)
    with contextlib.closing(own(run)) as first:
        save(first, 1, 1.0)
        save(first, 2, 2.0)
    own(run).close()
    folder = Path(run) / "checkpoints"
    for path in folder.glob("a000001-00000[12].json"):
        path.unlink()
    assert not list(generations(run))
    with pytest.raises(CheckpointError, match=r"goes on from one.*restore them, or give"):
        check_never_committed(run)
    for path in (folder / "record").glob("*-00000002-a*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"claim a000001-000003.json follows on one"):
        check_never_committed(run)
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"attempts/.* says that step 2 was committed"):
        check_never_committed(run)
    shutil.rmtree(Path(run) / "attempts")
    with pytest.raises(CheckpointError, match="no lease or claim says that it was not committed"):
        check_never_committed(run)


def test_a_first_save_that_was_not_committed_is_no_obstacle(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = own(run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        save(first, 1, 5.0)
    first.close()
    with caplog.at_level(logging.WARNING, "lxscale"):
        logging.getLogger("lxscale").addHandler(caplog.handler)
        check_never_committed(run)
        logging.getLogger("lxscale").removeHandler(caplog.handler)
    assert "2 objects of a first save that was never committed" in caplog.text
    with contextlib.closing(own(run)) as second:
        save(second, 1, 6.0)
    assert newest_whole(run) == 6.0
    assert len(names(run, "checkpoints", "objects")) == 2


def test_a_commit_whose_answer_was_lost_for_good_is_gone_on_from(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own(run)
    real = owner.create.create_bytes

    def lost(url: str, data: bytes) -> bool:
        real(url, data)
        raise owner.DataError("no answer")

    with monkeypatch.context() as patch, pytest.raises(owner.DataError):
        patch.setattr(owner.create, "create_bytes", lost)
        save(first, 1, 1.0)
    save(first, 2, 2.0)
    found = [g for g in generations(run) if isinstance(g, Generation)]
    assert [g.step for g in found] == [2, 1]
    assert manifest_bytes(found[0].manifest) == Path(found[0].url).read_bytes()
    first.close()
