"""What a trainer with loader processes leaves behind when it is killed."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.order.settings import SamplerSettings
from shards.processes import make_home, sweep_homes
from tests.conftest import small_records
from tests.trainer.data.test_batches import drawn
from trainer.data.loader import RankSlice, load_steps
from trainer.sections import LoaderSettings


def _trainer(folder: Path, start: Any, queue: Any) -> None:
    tempfile.tempdir = str(folder / "tmp")
    data = open_dataset(str(folder / "set"), folder / "cache")
    sampler = data.sampler(SamplerSettings(), 1)
    part, loader = RankSlice(0, 1, 1), LoaderSettings(loader_workers=2, loader_start=start)
    steps = load_steps(data, sampler, drawn(data), part, sampler.start(), 4, 10**6, loader)
    for step, _ in zip(range(8), steps, strict=False):
        assert step >= 0
    queue.put(None)
    multiprocessing.Event().wait()


@pytest.mark.parametrize(
    ("start", "tree"),
    [
        ("forkserver", True),
        pytest.param("forkserver", False, marks=pytest.mark.faults),
        pytest.param("spawn", True, marks=pytest.mark.faults),
    ],
)
def test_a_killed_trainer_leaves_nothing(tmp_path: Path, start: str, tree: bool) -> None:
    """tree: its loader processes and their server are killed with it."""
    build(small_records(9), tmp_path / "set", BuildSettings("x", "y"))
    (tmp_path / "tmp").mkdir()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    trainer = context.Process(target=_trainer, args=(tmp_path, start, queue))
    trainer.start()
    queue.get(timeout=120)
    assert trainer.pid
    process = psutil.Process(trainer.pid)
    children = process.children(recursive=True)
    maps = [m.path for p in (process, *children) for m in p.memory_maps()]
    queues = "sem.{}-".format(vars(multiprocessing.current_process())["_config"]["semprefix"][1:])
    used = {path for path in maps if "lxscale-mp-" in path and queues not in path}
    assert len(children) >= 2 and used
    for victim in (process, *children) if tree else (process,):
        victim.kill()
    trainer.join()
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    sweep_homes()  # as the next one does, and the end of a run
    assert [path for path in used if os.path.exists(path)] == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not any(Path("/dev/shm", Path(path).name.split(".")[1][:19]).exists() for path in used)


def _hold(queue: Any) -> None:
    make_home()
    lock = multiprocessing.get_context("spawn").Lock()
    queue.put(vars(lock)["_semlock"].name)
    queue.get()


def test_what_a_living_process_uses_is_not_swept() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    holder = context.Process(target=_hold, args=(queue,))
    holder.start()
    semaphore = Path("/dev/shm", f"sem.{queue.get()[1:]}")
    sweep_homes()
    assert semaphore.exists() and semaphore.name.startswith("sem.lxscale-mp-")
    queue.put(None)
    holder.join(30)
    assert not semaphore.exists()


def _failing(folder: Path, start: Any) -> None:
    data = open_dataset(str(folder / "set"), folder / "cache")
    sampler = data.sampler(SamplerSettings(), 1)
    part, loader = RankSlice(0, 1, 1), LoaderSettings(loader_workers=1, loader_start=start)
    steps = load_steps(data, sampler, drawn(data), part, sampler.start(), 4, 10**6, loader)
    next(steps)
    try:
        held = steps  # as the frames of a traceback hold it
        raise RuntimeError(held)
    except RuntimeError:
        raise SystemExit(1) from None


@pytest.mark.parametrize("start", ["forkserver", pytest.param("fork", marks=pytest.mark.faults)])
def test_a_process_that_fails_beside_living_workers_ends(tmp_path: Path, start: str) -> None:
    build(small_records(9), tmp_path / "set", BuildSettings("x", "y"))
    process = multiprocessing.get_context("spawn").Process(target=_failing, args=(tmp_path, start))
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        pytest.fail("it waits for its workers")
    assert process.exitcode == 1


def test_an_error_of_the_data_in_a_loader_process_is_one_line(tmp_path: Path) -> None:
    build(small_records(1), tmp_path / "set", BuildSettings("alone", "y"))
    data = open_dataset(str(tmp_path / "set"), tmp_path / "cache")
    sampler = data.sampler(SamplerSettings(mismatch=1.0), 1)
    part, loader = RankSlice(0, 1, 1), LoaderSettings(loader_workers=1)
    steps = load_steps(data, sampler, drawn(data), part, sampler.start(), 4, 10**6, loader)
    with pytest.raises(DataError, match=r"^matching needs sentences of two images, .* has one$"):
        next(steps)
