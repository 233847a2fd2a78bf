"""Snapshots in nodes' memory: a crash costs the steps since the newest, whatever is lost with it.

Two nodes are ranks with names of nodes and folders of their own; both folders are in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import trainer.checkpoint.fast as fast
import trainer.checkpoint.fast_folder as fast_folder
import trainer.loop as loop
import trainer.ranks as ranks
import trainer.run as run
from shards.errors import NodeError
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.object_store import FaultProxy
from tests.ranks import config_tree, run_ranks, step_record
from tests.trainer.test_resume import assert_bitwise, losses
from trainer.audit import audit
from trainer.checkpoint.fast_folder import open_folder, prune, sweep
from trainer.checkpoint.fast_format import (
    FastManifest,
    fast_manifest_bytes,
    manifest_name,
    parse_fast_manifest,
)
from trainer.checkpoint.generations import find_generation

STEPS, EVERY, FAST = 16, 6, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    build(small_records(31), folder, BuildSettings("fast", "test", images_per_shard=7))
    return folder


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    with tempfile.TemporaryDirectory(prefix="lxscale-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two ranks that nothing happens to: its folder and its configuration."""
    storage = tmp_path_factory.mktemp("whole")
    tree = config_tree(data, storage, "whole", train={"steps": STEPS}, checkpoint={"every": EVERY})
    assert not run_ranks(2, [(tree, None, False)])
    return storage / "whole", tree


def tree_of(
    data: Path, storage: Path, memory: Path, name: str = "run", /, **sections: Any
) -> dict[str, Any]:
    fast = {"every": EVERY, "fast_every": FAST, "fast_folder": str(memory)}
    sections["checkpoint"] = fast | sections.get("checkpoint", {})
    sections["train"] = {"steps": STEPS, **sections.get("train", {})}
    return config_tree(data, storage, name, **sections)


# --- what is done to ranks, in their processes ----------------------------------------------------


def nodes(of: list[int], log: Path | None, rank: int) -> None:
    """Put rank r on node of[r], and have rank 0 log to a file. Snapshots land before the next step,
    so that none is left out, however slow the machine is."""
    name = f"node-{of[rank]}"
    ranks.this_node = lambda: name
    real_open, real_save = fast.open_folder, loop.save

    def open_folder(place: str, run_url: str) -> Path:
        Path(place, name).mkdir(exist_ok=True)
        return real_open(f"{place}/{name}", run_url)

    def save(run: Any, *arguments: Any) -> None:
        real_save(run, *arguments)
        if run.memory._thread:
            run.memory._thread.join()

    fast.open_folder, loop.save = open_folder, save  # type: ignore[assignment]
    if rank == 0 and log:
        logging.getLogger("lxscale").addHandler(logging.FileHandler(log))


def two_nodes(log: Path | None = None) -> Any:
    return partial(nodes, [0, 1], log)


def in_memory(memory: Path, pattern: str = "*.json") -> list[Path]:
    return sorted(memory.rglob(pattern))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def assert_same_run(whole: tuple[Path, dict[str, Any]], tree: dict[str, Any]) -> None:
    """A run ended as the whole one, did the same steps, and its journal is proved."""
    run = Path(tree["run"]["storage"]) / tree["run"]["name"]
    assert_bitwise(whole[0], run)
    assert losses(whole[1]) == losses(tree)
    assert not audit(str(run), cache=tree["data"]["cache"]).problems


# --- a crash --------------------------------------------------------------------------------------


def test_a_lost_node_costs_the_steps_since_the_newest_snapshot(
    data: Path, memory: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """kill -9 after 11 steps, the store's newest being of 6, and one node's memory is lost."""
    tree, log = tree_of(data, tmp_path, memory), tmp_path / "log"
    assert run_ranks(2, [(tree, 11, True)], prepare=two_nodes())
    kept = [p.name for p in in_memory(memory / "node-0")]
    assert kept == [manifest_name(1, 8), manifest_name(1, 10)]
    # Each node has what both ranks wrote, and nobody else can read it.
    files = [p for p in in_memory(memory, "*") if p.is_file()]
    assert len(files) == 2 * (2 + 2 * 2) and {p.stat().st_mode & 0o777 for p in files} == {0o600}
    shutil.rmtree(memory / "node-1")
    assert not run_ranks(2, [(tree, None, False)], prepare=two_nodes(log))
    assert "the snapshot of step 10 (attempt 1) in memory is 4 steps newer" in log.read_text()
    assert_same_run(whole, tree)
    # Done: the store has all.
    assert not [p for p in in_memory(memory, "*") if p.is_file()]


@pytest.mark.faults
def test_a_store_is_asked_for_each_object_once_per_node(
    data: Path, tmp_path: Path, s3: str, proxy: FaultProxy
) -> None:
    """Three ranks on two nodes go on from two objects, under ZeRO 0, where each rank needs all."""
    where = {"storage": f"{s3}/once", "name": "run", "tensorboard": str(tmp_path / "board")}
    tree = config_tree(data, tmp_path, "run", run=where, train={"zero_stage": 0})
    assert not run_ranks(2, [(tree, 3, False)])
    names = [e.name for e in find_generation(f"{s3}/once/run").manifest.objects]
    proxy.begin()
    assert not run_ranks(3, [(tree, None, False)], prepare=partial(nodes, [0, 0, 1], None))
    assert [proxy.count("GET", name) for name in names] == [2, 2]
    assert find_generation(f"{s3}/once/run").step == 8
    assert not list((tmp_path / "cache").glob("restore-*"))


# --- the folder -----------------------------------------------------------------------------------


def test_a_folder_of_somebody_elses_is_not_used(memory: Path, tmp_path: Path) -> None:
    home = memory / f"lxscale-fast-{os.getuid()}"
    (memory / "elsewhere").mkdir()
    home.symlink_to(memory / "elsewhere")
    with pytest.raises(NodeError, match="not a folder of this user's alone"):
        open_folder(str(memory), "runs/a")
    home.unlink()
    home.mkdir(mode=0o755)
    with pytest.raises(NodeError, match="not a folder of this user's alone"):
        open_folder(str(memory), "runs/a")
    home.rmdir()
    folder = open_folder(str(memory), "runs/a")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder != open_folder(str(memory), "runs/b")
    with pytest.raises(NodeError, match="not in memory"):
        open_folder(str(tmp_path), "runs/a")
    with pytest.raises(NodeError, match="no folder of this machine"):
        open_folder("s3://bucket/key", "runs/a")


def test_what_nobody_has_touched_for_a_day_is_removed(memory: Path) -> None:
    mine, old, new = (open_folder(str(memory), name) for name in ("mine", "old", "new"))
    for folder, hours in ((mine, 25), (old, 25), (new, 23)):
        at = time.time() - hours * 3600
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (at, at))
    sweep(str(memory), mine)
    assert mine.is_dir() and new.is_dir() and not old.exists()


def test_pruning_keeps_two_and_what_is_of_a_later_attempt(memory: Path) -> None:
    folder = open_folder(str(memory), "run")
    places = [(1, 2), (1, 4), (1, 6), (2, 2)]
    for attempt, step in places:
        (folder / "checkpoints" / manifest_name(attempt, step)).touch()
        name = f"step-{step:08d}-a{attempt:06d}-r00000-0a.safetensors"
        (fast_folder.objects_folder(folder) / name).touch()
    torn = fast_folder.objects_folder(folder) / ".step-00000002-a000001-r00001-0b.safetensors.tmp"
    torn.touch()
    prune(folder, (1, 6), 2)
    assert [place for place, _ in fast_folder.manifests(folder)] == [(2, 2), (1, 6), (1, 4)]
    assert len(list(fast_folder.objects_folder(folder).iterdir())) == 3 and not torn.exists()


# --- long cases -----------------------------------------------------------------------------------


def killed(
    data: Path, storage: Path, memory: Path, name: str, at: int = 11, **sections: Any
) -> dict[str, Any]:
    """A run on two nodes that was killed."""
    tree = tree_of(data, storage, memory, name, **sections)
    assert run_ranks(2, [(tree, at, True)], prepare=two_nodes())
    return tree


def goes_on(tree: dict[str, Any], log: Path, world: int = 2, of: tuple[int, ...] = (0, 1)) -> str:
    """Go on with a run to its end; what rank 0 logged."""
    assert not run_ranks(world, [(tree, None, False)], prepare=partial(nodes, list(of), log))
    return log.read_text()


@pytest.mark.faults
def test_what_is_lost_or_damaged_is_had_elsewhere(
    data: Path, memory: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Beside a lost node: both lost, and bits that flip in one copy and in all."""
    newest, older = "snapshot of step 10 (", "snapshot of step 8 ("
    of_10 = "step-00000010-*"
    cases = {
        "both": ([], "*", "step 6 of"),
        "object": (["node-0"], of_10, newest),
        "objects": (["node-0", "node-1"], of_10, older),
        "one-object": (["node-0", "node-1"], "step-00000010-*-r00001-*", older),
        "manifest": (["node-1"], manifest_name(1, 10), newest),
        "manifests": (["node-0", "node-1"], manifest_name(1, 10), older),
        "all": (["node-0", "node-1"], "step-*", "step 6 of"),
    }
    for name, (where, what, expected) in cases.items():
        place = memory / name
        place.mkdir()
        tree = killed(data, tmp_path, place, name)
        if not where:
            shutil.rmtree(place)
            place.mkdir()
        for node in where:
            found = [p for p in in_memory(place / node, what) if p.is_file()]
            assert found
            for path in found:
                flip(path)
        said = goes_on(tree, tmp_path / f"{name}.log")
        assert f"{expected}" in said, (name, said)
        assert_same_run(whole, tree)


@pytest.mark.faults
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_number_of_ranks_and_nodes_goes_on(
    data: Path, memory: Path, tmp_path: Path, stage: int
) -> None:
    """Of three nodes one is lost for good; two go on, each with objects that the other has."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    sections = {"train": {"zero_stage": stage}, "model": off}
    plain = config_tree(data, tmp_path, "plain", **sections)
    plain["train"]["steps"] = STEPS
    assert not run_ranks(1, [(plain, None, False)])
    tree = tree_of(data, tmp_path, memory, "run", **sections)
    three = partial(nodes, [0, 1, 1, 2], None)
    assert run_ranks(4, [(tree, 11, True)], prepare=three)
    shutil.rmtree(memory / "node-2")
    said = goes_on(tree, tmp_path / "log", 3, (0, 0, 1))
    assert "snapshot of step 10 (" in said
    expected, found = losses(plain), losses(tree)
    for step, entry in expected.items():
        assert found[step] == pytest.approx(entry, rel=1e-5), step
    assert not audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).problems


# Where a rank is killed in a snapshot, by the function before or after which that is.
POINTS = [
    ("write_object", True),
    ("exchange", False),
    ("exchange", True),
    ("fast_manifest_bytes", True),
    ("Snapshots._write_manifest", False),
    ("Snapshots._write_manifest", True),
    ("prune", False),
    ("fast_folder.Path.unlink", True),
    ("prune", True),
]


def die_at(function: str, after: bool, at: int, victim: int, rank: int) -> None:
    """Have a rank killed at a point of the snapshot of step `at`."""
    nodes([0, 1], None, rank)
    if rank != victim:
        return
    armed = False
    holder: Any = fast
    *path, name = function.split(".")
    if path[:1] == ["fast_folder"]:
        holder, path = fast_folder, path[1:]
    for part in path:
        holder = getattr(holder, part)
    real, real_make = getattr(holder, name), fast.Snapshots.make

    def make(self: Any, snap: Any, step: int, *arguments: Any) -> None:
        nonlocal armed
        armed = step == at
        real_make(self, snap, step, *arguments)

    def dying(*arguments: Any, **named: Any) -> Any:
        if armed and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        out = real(*arguments, **named)
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    fast.Snapshots.make = make  # type: ignore[assignment, method-assign]
    setattr(holder, name, dying)


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("function, after", POINTS)
def test_killed_at_every_point_of_a_snapshot(
    data: Path,
    memory: Path,
    tmp_path: Path,
    whole: tuple[Path, dict[str, Any]],
    function: str,
    after: bool,
    victim: int,
) -> None:
    """There is the one of step 10 or the one before, and nothing of a torn one is left behind."""
    if function == "fast_manifest_bytes" and victim:
        pytest.skip("rank 0 makes it")
    tree = tree_of(data, tmp_path, memory)
    dies = partial(die_at, function, after, 10, victim)
    assert run_ranks(2, [(tree, None, False)], prepare=dies)
    said = goes_on(tree, tmp_path / "log")
    assert any(f"snapshot of step {step} (" in said for step in (8, 10)), said
    assert_same_run(whole, tree)
    assert not [p for p in in_memory(memory, "*") if p.is_file()]


def slow(log: Path, rank: int) -> None:
    """Rank 1 is at the snapshot of step 2 until step 9 is done."""
    nodes([0, 1], log, rank)
    real_step, real_exchange, done = loop.step, fast.exchange, threading.Event()
    loop.save = run.save  # which does not wait for it

    def step(*arguments: Any) -> Any:
        made = real_step(*arguments)
        if made[0].step == 9:
            done.set()
            arguments[0].memory._thread.join()
        return made

    def exchange(*arguments: Any) -> str:
        if rank == 1:
            assert done.wait(60), "training waits for a snapshot"
        return real_exchange(*arguments)

    loop.step, fast.exchange = step, exchange  # type: ignore[assignment]


@pytest.mark.faults
def test_a_slow_snapshot_holds_up_no_step(
    data: Path, memory: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Those that are due meanwhile are left out on all ranks."""
    tree, log = tree_of(data, tmp_path, memory), tmp_path / "log"
    assert run_ranks(2, [(tree, 11, True)], prepare=partial(slow, log))
    steps = {int(p.stem.partition("-s")[2]) for p in in_memory(memory, "a*.json")}
    assert 2 in steps and steps <= {2, 10}
    goes_on(tree, log)
    assert_same_run(whole, tree)


def kill_after(seconds: float, log: Path, rank: int) -> None:
    """Every rank is killed at the same moment."""
    nodes([0, 1], log, rank)
    loop.save = run.save  # which does not wait for snapshots
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


@pytest.mark.faults
def test_killed_at_random_moments(data: Path, memory: Path, tmp_path: Path) -> None:
    """All ranks, several times; the store is given nothing before the end."""
    sections = {"train": {"steps": 150, "global_batch": 48}}
    plain = config_tree(data, tmp_path, "plain", **sections, checkpoint={"every": 1000})
    assert not run_ranks(2, [(plain, None, False)])
    often = {"every": 1000, "fast_every": 5}
    tree = tree_of(data, tmp_path, memory, **sections, checkpoint=often)
    choice, log, done = random.Random(3), tmp_path / "log", [0]
    for _ in range(4):
        kills = partial(kill_after, choice.uniform(2, 4), log)
        run_ranks(2, [(tree, None, False)], prepare=kills)
        done.append(max(step_record(tree), default=0))
    goes_on(tree, log)
    begun = [int(n) for n in re.findall(r"attempt \d+ \|.*step (\d+) of 150", log.read_text())]
    # Beside the newest that had landed there may have been one under way, and steps beyond it.
    assert max(begun) > 0
    assert all(at % 5 == 0 and at >= last - 15 for at, last in zip(begun, done, strict=True))
    assert_same_run((tmp_path / "plain", plain), tree)


@pytest.mark.faults
def test_snapshots_of_a_stale_attempt_and_of_another_life_are_not_taken(
    data: Path, memory: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    # Attempt 1 seems to have gone on to step 15 while attempt 2 committed step 12.
    tree = killed(data, tmp_path, memory, "run")
    aside = tmp_path / "aside"
    shutil.copytree(memory, aside)
    shutil.rmtree(memory)
    memory.mkdir()
    assert run_ranks(2, [(tree, 7, True)], prepare=two_nodes())
    assert find_generation(str(tmp_path / "run")).step == 12
    shutil.rmtree(memory)
    shutil.copytree(aside, memory)
    for path in in_memory(memory, manifest_name(1, 10)):
        stale = parse_fast_manifest(path.read_bytes(), path.name)
        stale = FastManifest(replace(stale.manifest, step=15), *list(vars(stale).values())[1:])
        (path.parent / stale.name).write_bytes(fast_manifest_bytes(stale))
    said = goes_on(tree, tmp_path / "stale.log")
    assert "step 12 of" in said and "in memory" not in said
    assert_same_run(whole, tree)
    # The run is removed, and made anew under its name.
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(memory)
    memory.mkdir()
    assert run_ranks(2, [(tree, 5, True)], prepare=two_nodes())
    shutil.rmtree(memory)
    shutil.copytree(aside, memory)
    said = goes_on(tree, tmp_path / "life.log")
    assert "step 0 of" in said and "in memory" not in said
    assert_same_run(whole, tree)


@pytest.mark.faults
def test_without_room_or_memory_the_run_goes_on(
    data: Path, memory: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """No tmpfs; one that is too small; one that fills up on the way."""
    for name, place, room, said in (
        ("disk", tmp_path, None, "is not in memory (tmpfs)"),
        ("small", memory, 1000, "of the"),
        ("full", memory, 0, "are left of its node's memory"),
    ):
        log = tmp_path / f"{name}.log"
        tree = tree_of(data, tmp_path, place, name)
        assert not run_ranks(2, [(tree, None, False)], prepare=partial(no_room, room, log))
        warned = [line for line in log.read_text().splitlines() if "snapshot" in line]
        assert len(warned) == 1 and said in warned[0], warned
        assert_same_run(whole, tree)
        assert not [p for p in in_memory(memory, "*") if p.is_file()]


def no_room(free: int | None, log: Path, rank: int) -> None:
    """free: bytes from the start on; 0: from the second snapshot on, on rank 1's node."""
    nodes([0, 1], log, rank)
    asked = 0

    def room(folder: Path) -> int:
        nonlocal asked
        asked += 1
        return 10**9 if asked < 3 or rank == 0 else 0

    if free is not None:
        fast.room = room if free == 0 else lambda folder: free


@pytest.mark.faults
@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to mount a file system")
def test_a_full_tmpfs(data: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    """A real one, which something else fills for some steps: of what is torn nothing stays, and the
    snapshots before it do."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    try:
        tree, log = tree_of(data, tmp_path, place), tmp_path / "log"
        assert run_ranks(2, [(tree, 11, True)], prepare=partial(fill, place, 99, log))
        assert log.read_text().count("no snapshot of step 8 in memory: rank") == 1
        assert log.read_text().count("no snapshot") == 1
        names = [p.name for p in in_memory(place, "a*.json")]
        assert names == [manifest_name(1, 4), manifest_name(1, 6)] * 2
        assert not in_memory(place, "*.tmp") and len(in_memory(place, "*.safetensors")) == 8
        (place / "ballast").unlink()
        assert run_ranks(2, [(tree, 9, True)], prepare=partial(fill, place, 12, log))
        said = goes_on(tree, log)
        assert "snapshot of step 14 (attempt 2) in memory is 2 steps newer" in said
        assert_same_run(whole, tree)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, until: int, log: Path, rank: int) -> None:
    """The memory is full from the snapshot of step 8 on, though there seems to be room."""
    nodes([0, 1], log, rank)
    real = fast.Snapshots.make
    fast.room = lambda folder: 10**9

    def make(self: Any, snap: Any, step: int, *arguments: Any) -> None:
        ballast = place / "ballast"
        if rank == 0 and 8 <= step < until and not ballast.exists():
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as f:
                while f.write(bytes(4096)):
                    pass
        elif rank == 0 and step >= until:
            ballast.unlink(missing_ok=True)
        real(self, snap, step, *arguments)

    fast.Snapshots.make = make  # type: ignore[assignment, method-assign]
