"""The commit protocol: a crash anywhere in a save leaves the old generation or the new one."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.order.sampler import SamplerState
from shards.store import create, objects
from trainer.checkpoint.errors import CheckpointError, StaleAttemptError
from trainer.checkpoint.format import KINDS, CheckpointManifest, RunDescription, Span
from trainer.checkpoint.generations import (
    Generation,
    find_generation,
    generations,
    load_weights,
)
from trainer.checkpoint.journal import Journal, StepLine
from trainer.checkpoint.owner import Claimant, Owner, claim
from trainer.checkpoint.saver import Snapshot, write_object

RUN = RunDescription(
    world_size=2,
    zero_stage=1,
    parameters={"a": [4, 3], "b": [5]},
    config={},
    data_state={},
    objectives={},
    vocab_sha256="",
    answers_sha256="",
)
START = SamplerState(0, (0,), (0,), (0,))


def own(run: str) -> Owner:
    """Claim a run, whoever has it."""
    return claim(run, Claimant(take_over=True))


def save(owner: Owner, step: int, value: float, keep: int = 2) -> None:
    """A generation of two ranks' objects, all values equal to `value`, and a segment."""
    run, attempt = owner.run_url, owner.attempt
    entries = []
    for rank, spans in enumerate([(Span("a", 0, 8),), (Span("a", 8, 4), Span("b", 0, 5))]):
        size = sum(span.length for span in spans)
        arrays = {k: np.full(size, value, np.float32) for k in KINDS}
        entries.append(write_object(run, step, attempt, rank, Snapshot(spans, arrays)))
    journal = Journal((), {}, (), START)
    journal.add(StepLine(step, 1, 2, 0), START)
    manifest = CheckpointManifest(
        **vars(RUN),
        sampler=START,
        step=step,
        attempt=attempt,
        objects=tuple(entries),
        journal=journal.write(run, attempt, step),
    )
    owner.commit(manifest, keep)


def newest_whole(run: str) -> float:
    """The value of the newest generation that can be read in full."""
    for g in generations(run):
        if isinstance(g, Generation):
            try:
                weights = load_weights(g)
            except CheckpointError:
                continue
            values = {float(v) for w in weights.values() for v in w.reshape(-1)}
            assert len(values) == 1
            return values.pop()
    raise AssertionError("no generation can be read")


class CrashError(Exception):
    pass


OPERATIONS = {
    "write_bytes": objects,
    "create_bytes": create,
    "delete": objects,
    "list_names": objects,
    "read_bytes": objects,
}


def count_or_crash(monkeypatch: pytest.MonkeyPatch, at: int | None) -> list[str]:
    """Log every operation on the store; raise instead of the `at`-th."""
    log: list[str] = []
    for name, module in OPERATIONS.items():
        real = getattr(module, name)

        def wrapped(
            *args: Any, _real: Callable[..., Any] = real, _name: str = name, **kw: Any
        ) -> Any:
            if at is not None and len(log) == at:
                raise CrashError
            log.append(_name)
            return _real(*args, **kw)

        monkeypatch.setattr(module, name, wrapped)
    return log


def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "folder":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.faults)])
def test_a_crash_at_any_operation_leaves_a_whole_generation(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = place(kind, tmp_path, request)

    def prepared(name: str) -> Owner:
        owner = own(f"{base}-{name}")
        for step in (10, 20):
            save(owner, step, float(step))
        owner.close()  # its lease would be written at any moment
        return owner

    owner = prepared("count")
    with pytest.MonkeyPatch.context() as patch:
        log = count_or_crash(patch, None)
        save(owner, 30, 30.0)
    assert newest_whole(owner.run_url) == 30.0
    # Two objects and a segment, then the manifest, and a look whether it is the last link.
    commit_point = log.index("create_bytes")
    assert log.count("write_bytes") == 3 == commit_point and log.count("read_bytes") == 1
    for at in range(len(log)):
        owner = prepared(str(at))
        run = owner.run_url
        with pytest.MonkeyPatch.context() as patch:
            count_or_crash(patch, at)
            with pytest.raises(CrashError):
                save(owner, 30, 30.0)
        assert newest_whole(run) == (30.0 if at > commit_point else 20.0), log[at]
        # The next attempt saves and cleans up whatever was left.
        with contextlib.closing(own(run)) as owner:
            save(owner, 40, 40.0)
        assert newest_whole(run) == 40.0
        kept = [g.manifest for g in generations(run) if isinstance(g, Generation)]
        assert len(kept) == 2
        names = objects.list_names(objects.join(run, "checkpoints", "objects"))
        assert set(names) == {o.name for m in kept for o in m.objects}
        names = objects.list_names(objects.join(run, "checkpoints", "record"))
        assert set(names) == {s.name for m in kept for s in m.journal}


def test_a_torn_or_altered_manifest_is_not_a_generation(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    owner = own(run)
    save(owner, 1, 1.0)
    save(owner, 2, 2.0)
    path = Path(find_generation(run).url)
    whole = path.read_bytes()
    for damaged in (whole[:-40], whole.replace(b'"step": 2', b'"step": 3'), b"", b"[]"):
        path.write_bytes(damaged)
        assert newest_whole(run) == 1.0
        assert find_generation(run).step == 1


def test_any_damage_to_an_object_is_found_and_named(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    save(own(run), 1, 1.0)
    generation = find_generation(run)
    entry = generation.manifest.objects[1]
    path = Path(run) / "checkpoints" / "objects" / entry.name
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:60] + b"\0" + whole[61:], b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=entry.name):
            load_weights(generation)
    path.unlink()
    with pytest.raises(CheckpointError, match=entry.name):
        load_weights(generation)


def test_a_stale_attempt_commits_nothing(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    old = own(run)
    save(old, 1, 1.0)
    new = own(run)
    assert new.attempt == old.attempt + 1
    who = f"host {socket.gethostname()}, process {os.getpid()}, since 20"
    with pytest.raises(
        StaleAttemptError, match=rf"attempt 1 of .* is stale: attempt 2 \({who}.* has started"
    ):
        save(old, 2, 2.0)
    assert newest_whole(run) == 1.0
    save(new, 2, 5.0)
    assert newest_whole(run) == 5.0


def test_a_later_attempt_counts_before_a_higher_step(tmp_path: Path) -> None:
    """It descends from an older generation because the higher one was given up."""
    run = str(tmp_path / "run")
    save(own(run), 50, 50.0)
    save(own(run), 40, 40.0)
    assert newest_whole(run) == 40.0


def test_a_missing_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint under .*nothing"):
        find_generation(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="not in a run's folder"):
        find_generation("stray.json")


def test_a_manifest_may_be_named_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "run"
    save(own(str(run)), 1, 1.0)
    name = find_generation(str(run)).name
    for place, given in (
        (tmp_path, f"runs/run/checkpoints/{name}"),
        (run, f"checkpoints/{name}"),
        (run, f"./checkpoints/{name}"),
        (run / "checkpoints", name),
        (run / "checkpoints" / "objects", f"../{name}"),
        (tmp_path, f"file://{run}/checkpoints/{name}"),
    ):
        monkeypatch.chdir(place)
        generation = find_generation(given)
        assert generation.step == 1 and load_weights(generation)
    (tmp_path / "checkpoints" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkpoints" / "other")
    with pytest.raises(CheckpointError, match=r"stray\.json is not in a run's folder"):
        find_generation("stray.json")


def test_keeping_removes_the_oldest_with_their_objects(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    owner = own(run)
    for step in range(1, 6):
        save(owner, step, float(step), keep=3)
    steps = [g.step for g in generations(run) if isinstance(g, Generation)]
    assert steps == [5, 4, 3]
    assert len(list((Path(run) / "checkpoints" / "objects").iterdir())) == 6
