"""Saves stop no step: what waits is bounded, lands in order, and is the same on all ranks."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import trainer.checkpoint.saver as saver
import trainer.loop as loop
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.store import objects
from tests.conftest import small_records
from tests.object_store import Fault, FaultProxy, Request
from tests.ranks import config_tree, run_ranks, step_record
from tests.trainer.test_resume import assert_bitwise, losses
from trainer.audit import audit
from trainer.checkpoint.errors import StaleAttemptError
from trainer.checkpoint.generations import Generation, generations
from trainer.checkpoint.owner import Owner
from trainer.checkpoint.schedule import Schedule
from trainer.run import Run
from trainer.sections import CheckpointSection

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    build(small_records(31), folder, BuildSettings("spool", "test", images_per_shard=7))
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two ranks that nothing happens to: its storage and its configuration."""
    storage = tmp_path_factory.mktemp("whole")
    tree = tree_of(data, storage, "whole")
    assert not run_ranks(2, [(tree, None, False)])
    return storage, tree


def tree_of(
    data: Path, storage: Path, name: str, steps: int = STEPS, **checkpoint: Any
) -> dict[str, Any]:
    settings = {"every": 1, "keep": 100, **checkpoint}
    return config_tree(data, storage, name, train={"steps": steps}, checkpoint=settings)


def saved_steps(run: Path) -> list[int]:
    """Steps of the generations, lowest first."""
    found = list(generations(str(run)))
    assert all(isinstance(g, Generation) for g in found)
    return sorted(g.step for g in found if isinstance(g, Generation))


def assert_same_run(
    whole: tuple[Path, dict[str, Any]], storage: Path, tree: dict[str, Any]
) -> None:
    """A run ended as the whole one, did the same steps, and its journal is proved."""
    name = tree["run"]["name"]
    assert_bitwise(whole[0] / "whole", storage / name)
    assert losses(whole[1]) == losses(tree)
    assert not audit(str(storage / name), cache=str(storage / "cache")).problems


# --- what is done to ranks, in their processes ----------------------------------------------------


def patch_write(before: Callable[[str], None]) -> None:
    """Call `before` with the URL of every object of a checkpoint that is to be written."""
    real = objects.write_bytes

    def write_bytes(url: str, data: bytes, *arguments: Any) -> None:
        if "/checkpoints/" in url:
            before(url)
        real(url, data, *arguments)

    objects.write_bytes = write_bytes  # type: ignore[assignment]


def after_step(action: Callable[[Run, int], None]) -> None:
    """Call `action` with the run and the number of each step that was done."""
    real = loop.step

    def step(run: Run, *arguments: Any) -> Any:
        made = real(run, *arguments)
        action(run, made[0].step)
        return made

    loop.step = step  # type: ignore[assignment]


def settle(run: Run, step: int) -> None:
    """Wait for room in the spool: what a test does at a step does not depend on its speed."""
    while run.saver.full():
        time.sleep(0.01)


def log_to(path: Path, rank: int) -> None:
    """Rank 0's log into a file."""
    if rank == 0:
        logging.getLogger("lxscale").addHandler(logging.FileHandler(path))


def hang_until(step: int, log: Path, rank: int) -> None:
    """The store answers nothing until that step is done. The log has every commit, and how many
    copies were in memory at each save."""
    log_to(log, rank)
    opened = threading.Event()
    patch_write(lambda url: opened.wait(60) or pytest.fail("the store's hang stopped training"))
    after_step(lambda run, done: opened.set() if done == step else None)
    copies: list[weakref.ref[saver.Snapshot]] = []
    real = saver.snapshot

    def snapshot(*arguments: Any) -> saver.Snapshot:
        made = real(*arguments)
        copies.append(weakref.ref(made))
        logging.getLogger("lxscale").info("copies %d", sum(c() is not None for c in copies))
        return made

    saver.snapshot = snapshot  # type: ignore[assignment]


def wait_and_fail_at_random(seed: int, spared: str, rank: int) -> None:
    """Every write takes a time of its own, and one in six fails unless its URL has `spared`."""
    draw = random.Random(f"{seed} {rank}")

    def before(url: str) -> None:
        time.sleep(draw.choice([0, 0, 0.01, 0.05, 0.2]))
        if draw.random() < 1 / 6 and spared not in url:
            raise DataError("not now")

    patch_write(before)
    after_step(lambda run, step: time.sleep(draw.choice([0, 0, 0.01, 0.05])))


def fail_first(count: int, log: Path, rank: int) -> None:
    """The last of two ranks cannot write its first objects; a step waits for room in the spool."""
    log_to(log, rank)
    left = [count if rank == 1 else 0]

    def before(url: str) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise DataError(f"the disk is full: {url}")

    patch_write(before)
    after_step(settle)


def fail_from(step: int, error: type[Exception], rank: int) -> None:
    """No generation from that step on can be committed; a step waits for room in the spool."""
    real = Owner.commit

    def commit(owner: Owner, manifest: Any, keep: int) -> Any:
        if manifest.step >= step:
            raise error(f"refused at step {manifest.step}")
        return real(owner, manifest, keep)

    Owner.commit = commit  # type: ignore[assignment, method-assign]
    after_step(settle)


def hang_from(step: int, rank: int) -> None:
    """No object of that step or a later one is ever written; those before are waited for."""

    def before(url: str) -> None:
        found = re.search(r"objects/step-(\d+)", url)
        if found and int(found[1]) >= step:
            threading.Event().wait()

    def wait(run: Run, done: int) -> None:
        while done == step and not list(Path(run.url, "checkpoints").glob("*.json")):
            time.sleep(0.01)

    patch_write(before)
    after_step(wait)


def hang_until_the_end(rank: int) -> None:
    """The store answers nothing before the ranks have told each other what they have begun."""
    asked, opened = threading.Event(), threading.Event()

    def before(url: str) -> None:
        asked.set()
        assert opened.wait(60), "the ranks told each other nothing"

    patch_write(before)
    after_step(lambda run, step: asked.wait() if step == 2 else None)
    real = saver.gather_objects

    def gather_objects(value: Any, group: Any = None) -> Any:
        told = real(value, group)
        opened.set()
        return told

    saver.gather_objects = gather_objects


def die_in_an_upload(rank: int) -> None:
    """Rank 1 is killed when it writes its part of a generation."""
    if rank == 1:
        patch_write(lambda url: os.kill(os.getpid(), signal.SIGKILL))


def clock_of_steps(seconds: float, rank: int) -> None:
    """A step takes so many seconds on rank 0's clock, and no time at all on those of the others."""
    now = [0.0]

    def tick(run: Run, step: int) -> None:
        if rank == 0:
            now[0] += seconds

    after_step(tick)
    saver.Schedule = partial(Schedule, clock=lambda: now[0])  # type: ignore[assignment]


# --- tests ----------------------------------------------------------------------------------------


def test_a_store_that_hangs_stops_no_step_and_saves_land_in_order(
    data: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """From step 3 on there is no room; what is put off is made of the newest state."""
    hung = tree_of(data, tmp_path, "hung", spool=2)
    assert not run_ranks(2, [(hung, None, False)], prepare=partial(hang_until, 8, tmp_path / "log"))
    log = (tmp_path / "log").read_text()
    commits = [int(step) for step in re.findall(r"^checkpoint of step (\d+) ", log, re.M)]
    assert commits[:2] == [1, 2] and commits[2] > 8 and commits[-1] == STEPS
    assert commits == sorted(commits) == saved_steps(tmp_path / "hung")
    copies = [int(n) for n in re.findall(r"^copies (\d+)", log, re.M)]
    assert len(copies) == len(commits) and max(copies) == 2
    assert log.count("checkpoint at step 3 is put off: checkpoint.spool=2 ") == 1
    assert not re.search(r"checkpoint at step [4-8] is put off", log)
    assert_same_run(whole, tmp_path, hung)


@pytest.mark.faults
@pytest.mark.parametrize("world, spool", [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 1), (4, 3)])
def test_ranks_of_any_speed_agree_on_every_save(
    data: Path, tmp_path: Path, world: int, spool: int
) -> None:
    """Also when saves fail now and then, and the run is killed twice on its way."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    undisturbed = tree_of(data, tmp_path, "whole")
    assert not run_ranks(world, [(undisturbed, None, False)])
    other = tree_of(data, tmp_path, "other", spool=spool)
    prepare = partial(wait_and_fail_at_random, seed, f"{STEPS:08d}")
    for kill in random.Random(seed).sample(range(1, 8), 2):
        run_ranks(world, [(other, kill, True)], prepare=prepare)
    assert not run_ranks(world, [(other, None, False)], prepare=prepare)
    assert_same_run((tmp_path, undisturbed), tmp_path, other)


def test_killed_with_saves_in_the_spool(
    data: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Three wait behind one that hangs: the run goes on from the newest that landed."""
    killed = tree_of(data, tmp_path, "killed", spool=4)
    run_ranks(2, [(killed, 6, True)], prepare=partial(hang_from, 2))
    assert saved_steps(tmp_path / "killed") == [1]
    assert not run_ranks(2, [(killed, None, False)])
    assert_same_run(whole, tmp_path, killed)


def test_a_stop_waits_for_no_save_that_its_own_replaces(data: Path, tmp_path: Path) -> None:
    """Steps 2 and 3 are in the spool when the run is told to stop after step 5."""
    tree = tree_of(data, tmp_path, "run", spool=3)
    assert not run_ranks(2, [(tree, 5, False)], prepare=hang_until_the_end)
    assert saved_steps(tmp_path / "run") == [1, 5]
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems


def test_a_rank_that_dies_in_the_last_save_is_a_lost_rank(data: Path, tmp_path: Path) -> None:
    """And no checkpoint that cannot be written: the others' error is one that is tried again."""
    tree = tree_of(data, tmp_path, "run", 2, every=1000)
    (error,) = run_ranks(2, [(tree, None, False)], prepare=die_in_an_upload)
    assert error.startswith("RuntimeError: lost the other workers in a save")


def test_a_save_that_failed_is_made_again_at_once(data: Path, tmp_path: Path) -> None:
    tree = tree_of(data, tmp_path, "run", every=5, spool=1)
    prepare = partial(fail_first, 1, tmp_path / "log")
    assert not run_ranks(2, [(tree, None, False)], prepare=prepare)
    assert saved_steps(tmp_path / "run") == [7, 10, STEPS]
    log = (tmp_path / "log").read_text()
    assert re.search(
        r"^checkpoint at step 5 failed: rank 1: the disk is full: .*r00001-", log, re.M
    )
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems


def test_too_many_steps_without_a_checkpoint_end_the_run(data: Path, tmp_path: Path) -> None:
    tree = tree_of(data, tmp_path, "run", 100_000, every=3, spool=1, max_unsaved=4)
    errors = run_ranks(2, [(tree, None, False)], prepare=partial(fail_from, 6, DataError))
    assert len(errors) == 2
    for error in errors:
        assert re.match(
            r"UnsavedError: nothing could be saved since step 6, 5 steps .*max_unsaved=4\): "
            r"refused at step 8; the same command goes on from .*/a000001-000001\.json ",
            error,
        )
    assert max(step_record(tree)) == 11
    assert not run_ranks(2, [(tree_of(data, tmp_path, "run"), None, False)])
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems


def test_too_many_minutes_without_an_answer_end_the_run(data: Path, tmp_path: Path) -> None:
    """On the clock of rank 0, on which a step takes 20 s; the store never answers."""
    tree = tree_of(data, tmp_path, "run", 100_000, every=3, max_unsaved_minutes=2.5)

    errors = run_ranks(2, [(tree, None, False)], prepare=hang_on_the_clock)
    assert len(errors) == 2
    for error in errors:
        assert re.match(r"UnsavedError: nothing .* since step 3, .*the store has not answ", error)
        assert "there is no checkpoint" in error
    # Due at 40 s, before step 3 is made; 200 s is the first time that is 150 s later.
    assert max(step_record(tree)) == 10


def hang_on_the_clock(rank: int) -> None:
    hang_from(0, rank)
    clock_of_steps(20, rank)


@pytest.mark.faults
def test_saves_by_the_clock_of_rank_0(data: Path, tmp_path: Path) -> None:
    """Of 20 s a step, a minute is over after 3, when the next is about to be made."""
    tree = tree_of(data, tmp_path, "run", every=1000, every_minutes=1, spool=3)
    assert not run_ranks(3, [(tree, None, False)], prepare=partial(clock_of_steps, 20))
    assert saved_steps(tmp_path / "run") == [4, 8, STEPS]


@pytest.mark.faults
def test_a_stale_attempt_ends_on_all_ranks(data: Path, tmp_path: Path) -> None:
    """Though nothing waits for its saves."""
    tree = tree_of(data, tmp_path, "run", 100_000, spool=3)
    prepare = partial(fail_from, 4, StaleAttemptError)
    errors = run_ranks(3, [(tree, None, False)], prepare=prepare)
    assert len(errors) == 3 and len(set(errors)) == 1
    assert re.fullmatch(r"StaleAttemptError: refused at step \d+", errors[0])
    assert saved_steps(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("end", [3, None])
def test_the_last_save_of_a_run_must_land(data: Path, tmp_path: Path, end: int | None) -> None:
    tree = tree_of(data, tmp_path, "run", 5, every=1000)
    errors = run_ranks(2, [(tree, end, False)], prepare=partial(fail_from, 1, DataError))
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(
            f"UnsavedError: checkpoint at step {end or 5} failed: refused at step"
        )


def test_an_outage_of_object_storage_costs_no_step(
    data: Path, tmp_path: Path, s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of the first save are never answered until the run's end; the store's deadline
    passes, and a later save lands."""
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "2")
    tree = tree_of(data, tmp_path, "run", every=2)
    tree["run"] |= {"storage": f"{s3}/spool", "tensorboard": str(tmp_path / "run" / "tensorboard")}

    def plan(request: Request) -> Fault | None:
        first = request.method == "PUT" and "step-00000002-a000001-r" in request.name
        return Fault("hang") if first else None

    proxy.begin(plan)
    assert not run_ranks(2, [(tree, None, False)])
    found = [g.step for g in generations(f"{s3}/spool/run") if isinstance(g, Generation)]
    assert found[0] == STEPS and 2 not in found


# --- rank 0's account -----------------------------------------------------------------------------


def schedule(**settings: Any) -> tuple[Schedule, list[float]]:
    now = [0.0]
    return Schedule(CheckpointSection(**settings), None, lambda: now[0]), now


def test_failures_in_a_row_are_followed_by_growing_pauses() -> None:
    """A store that refuses at once must not have a copy made at every step."""
    account, now = schedule(every=10)
    assert not account.due(9) and account.due(10)
    tried = []
    for step in range(10, 400):
        if account.due(step):
            account.begun()
            account.failed("refused")
            tried.append(now[0])
        now[0] += 1
    pauses = [b - a for a, b in itertools.pairwise(tried)]
    assert pauses == [1, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert account.due(400) is False
    account.landed(400, "url")
    account.failed("refused")
    assert account.due(401)


def test_a_save_that_lands_settles_what_was_due_before_it_and_nothing_after() -> None:
    account, now = schedule(every=10, max_unsaved=15, max_unsaved_minutes=5)
    for step in (10, 20):
        assert account.due(step)
        account.begun()
    assert account.due(30)  # put off
    account.landed(10, "first")
    assert account.unsaved(35) is None
    error = account.unsaved(36)
    assert error and "since step 20" in str(error) and "goes on from first" in str(error)
    account.landed(20, "second")
    assert account.unsaved(45) is None and account.unsaved(46)
    now[0] = 300
    assert account.unsaved(45) is None
    now[0] = 301
    assert "max_unsaved_minutes=5" in str(account.unsaved(45))
    account.begun()
    account.landed(46, "third")
    assert account.unsaved(10_000) is None
