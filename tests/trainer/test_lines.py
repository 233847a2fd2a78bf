"""Runs that went back, or whose snapshots and saves cross: what they go on from afterwards."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import config_tree, run_ranks
from tests.trainer.checkpoint.test_fast import in_memory, memory, nodes, two_nodes
from tests.trainer.test_resume_from import audited, data, steps_of
from trainer.checkpoint import inspect
from trainer.checkpoint.generations import find_generation
from trainer.run_status import run_status

__all__ = ["data", "memory"]  # fixtures


def tree(data: Path, storage: Path, steps: int = 8, **checkpoint: Any) -> dict[str, Any]:
    kept = {"every": 2, "keep": 9, **checkpoint}
    return config_tree(data, storage, "run", checkpoint=kept, train={"steps": steps})


@pytest.mark.parametrize("damaged", [True, pytest.param(False, marks=pytest.mark.faults)])
def test_what_a_run_has_left_is_not_gone_back_to_by_a_removal(
    data: Path, tmp_path: Path, damaged: bool
) -> None:
    run = tmp_path / "run"
    assert not run_ranks(1, [(tree(data, tmp_path), None, False)])
    assert not run_ranks(1, [(tree(data, tmp_path, resume_from=4), 2, False)])
    assert steps_of(run) == [6, 8, 6, 4, 2]
    newest = find_generation(str(run))
    if damaged:
        Path(newest.manifest.objects[0].url(str(run))).write_bytes(b"torn")
    assert inspect.remove(newest.url, force=not damaged)[1] == 4
    assert steps_of(run)[0] == 4 and find_generation(str(run)).manifest.attempt == 3
    assert not run_ranks(1, [(tree(data, tmp_path), 1, False)])
    assert steps_of(run)[0] == 5
    audited(run)


def test_a_run_that_was_told_to_go_back_is_not_done(data: Path, tmp_path: Path) -> None:
    """A watch would end otherwise. One that has no step to make commits what it goes back to."""
    run = tmp_path / "run"
    assert not run_ranks(1, [(tree(data, tmp_path), None, False)])
    assert run_status(str(run)).state == "done"
    run_ranks(1, [(tree(data, tmp_path, resume_from=4), 1, True)])
    assert steps_of(run)[0] == 8 and run_status(str(run)).state == "dead"
    assert not run_ranks(1, [(tree(data, tmp_path, steps=4, resume_from=4), None, False)])
    assert steps_of(run)[0] == 4 and run_status(str(run)).state == "done"
    audited(run)


@pytest.mark.faults
def test_a_second_going_back_takes_no_snapshot_of_the_first(
    data: Path, memory: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    fast = {"fast_folder": str(memory), "fast_every": 1}

    def go(tree: dict[str, Any], end: int | None, kill: bool) -> None:
        errors = run_ranks(2, [(tree, end, kill)], prepare=two_nodes(log))
        assert kill or not errors

    go(tree(data, tmp_path), None, False)
    go(tree(data, tmp_path, resume_from=4, every=100, **fast), 3, True)
    assert in_memory(memory, "a*.json") and steps_of(run)[0] == 8
    go(tree(data, tmp_path, steps=12, fast_folder=str(memory)), None, False)
    log.unlink()
    go(tree(data, tmp_path, steps=12, resume_from=4, **fast), None, False)
    assert "step 4 of 12" in log.read_text() and "in memory is" not in log.read_text()
    audited(run)


def _late_save(log: Path, rank: int) -> None:
    """The save of step 12 lands when the snapshot of step 14 has been made of the journal."""
    import trainer.checkpoint.saver as saver
    import trainer.loop as loop

    nodes([0, 1], log, rank)
    go_on, landed = threading.Event(), threading.Event()
    commit, step = saver.Saver._commit, loop.step

    def late(self: Any, save: Any, parts: Any) -> Any:
        if save.step == 12:
            go_on.wait(60)
        outcome = commit(self, save, parts)
        if save.step == 12:
            landed.set()
        return outcome

    def waiting(run: Any, state: Any, *arguments: Any) -> Any:
        if state.step == 14 and rank == 0:
            go_on.set()
            landed.wait(60)
        return step(run, state, *arguments)

    saver.Saver._commit = late  # type: ignore[method-assign]
    vars(loop)["step"] = waiting


@pytest.mark.faults
def test_a_save_that_lands_after_a_snapshot_is_of_its_line(
    data: Path, memory: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    settings = {"every": 6, "fast_every": 2, "keep": 2, "fast_folder": str(memory)}
    own = tree(data, tmp_path, steps=20, **settings)
    run_ranks(1, [(own, 15, True)], prepare=partial(_late_save, log))
    assert steps_of(run) == [12, 6]
    run_ranks(1, [(own, 5, True)], prepare=partial(nodes, [0, 1], log))
    assert "in memory is 2 steps newer" in log.read_text()
    assert steps_of(run) == [18, 12]
    segments = find_generation(str(run)).manifest.journal
    assert [(s.first, s.last) for s in segments] == [(1, 6), (7, 12), (13, 18)]
    audited(run)


def _without_folder(memory: Path, log: Path, rank: int) -> None:
    """The tier's folder goes after step 4."""
    import trainer.loop as loop

    nodes([0, 1], log, rank)
    save = loop.save

    def removing(run: Any, state: Any, *arguments: Any) -> None:
        if state.step == 4 and rank == 0:
            for path in memory.glob("*/*"):
                shutil.rmtree(path)
        save(run, state, *arguments)

    vars(loop)["save"] = removing


@pytest.mark.faults
def test_a_folder_in_memory_that_is_removed_is_made_again(
    data: Path, memory: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    own = tree(data, tmp_path, steps=12, every=1000, fast_every=1, fast_folder=str(memory))
    run_ranks(1, [(own, 10, True)], prepare=partial(_without_folder, memory, log))
    (home,) = memory.glob("*/lxscale-fast-*")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (home, *home.rglob("*")))
    assert not run_ranks(1, [(own, None, False)], prepare=partial(nodes, [0, 1], log))
    assert "steps newer than the store" in log.read_text()
