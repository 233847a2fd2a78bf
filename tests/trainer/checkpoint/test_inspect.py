"""`lxscale checkpoint ls | verify | rm`: what is told of generations, and what goes and stays."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.cli.main import main
from shards.store import objects
from tests.object_store import ObjectStore
from tests.trainer.checkpoint.test_checkpoint import RUN, START, newest_whole
from trainer.checkpoint import inspect
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import KINDS, CheckpointManifest, ObjectEntry, SegmentEntry, Span
from trainer.checkpoint.generations import Generation, find_generation, generations, load_weights
from trainer.checkpoint.journal import Journal, StepLine
from trainer.checkpoint.line import going_on_from
from trainer.checkpoint.owner import Claimant, Owner, claim
from trainer.checkpoint.saver import Snapshot, write_object


def made(run: str, steps: tuple[int, ...] = (10, 20, 30), value: float = 0.0) -> None:
    """A run with a generation of each of these steps, which go on from each other."""
    with contextlib.closing(claim(run, Claimant())) as owner:
        for step in steps:
            add(owner, step, value or step)


def add(
    owner: Owner, step: int, value: float, keep: int = 9, base: Generation | None = None
) -> Generation:
    """Go on from `base`, or from the owner's newest generation."""
    newest = base or next((g for g in owner.found if isinstance(g, Generation)), None)
    journal = Journal((), {}, newest.manifest.journal if newest else (), START)
    journal.add(StepLine(step, 1, 2, 0), START)
    spans = (Span("a", 0, 12), Span("b", 0, 5))
    arrays = {k: np.full(17, value, np.float32) for k in KINDS}
    entry = write_object(owner.run_url, step, owner.attempt, 0, Snapshot(spans, arrays))
    manifest = CheckpointManifest(
        **vars(RUN),
        sampler=START,
        step=step,
        attempt=owner.attempt,
        objects=(entry,),
        journal=journal.write(owner.run_url, owner.attempt, step),
        saved_at="2026-11-27 10:00:00 UTC",
    )
    return owner.commit(manifest, keep)


def steps_of(run: str) -> list[int]:
    return [g.step for g in generations(run) if isinstance(g, Generation)]


def stored(run: str) -> set[str]:
    """The names of all objects and segments, and that they are those of the generations."""
    found = {n for f in ("objects", "record") for n in names(run, f)}
    known = [g.manifest for g in generations(run) if isinstance(g, Generation)]
    assert found == {e.name for m in known for e in (*m.objects, *m.journal)}
    return found


def names(run: str, *folder: str) -> list[str]:
    return objects.list_names(objects.join(run, "checkpoints", *folder))


@pytest.fixture
def run(tmp_path: Path) -> str:
    made(str(tmp_path / "run"))
    return str(tmp_path / "run")


def damage(run: str, entry: ObjectEntry) -> None:
    path = Path(entry.url(run))
    path.write_bytes(path.read_bytes()[:-1] + b"x")


# --- ls -----------------------------------------------------------------------------------------


def test_a_list_is_of_manifests_alone_and_names_the_newest(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = find_generation(run)
    for folder in ("objects", "record"):
        for path in (Path(run) / "checkpoints" / folder).iterdir():
            path.unlink()
    damaged = Path(run) / "checkpoints" / "a000001-000002.json"
    damaged.write_bytes(damaged.read_bytes().replace(b'"step": 20', b'"step": 21'))
    assert main(["checkpoint", "ls", run, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["manifest"] for row in rows] == [f"a000001-00000{i}.json" for i in (3, 2, 1)]
    entries = (*newest.manifest.objects, *newest.manifest.journal)
    assert rows[0] == {
        "manifest": newest.name,
        "step": 30,
        "attempt": 1,
        "saved_at": "2026-11-27 10:00:00 UTC",
        "world_size": 2,
        "zero_stage": 1,
        "bytes": sum(e.size for e in entries),
        "newest": True,
        "problem": None,
    }
    assert rows[1]["step"] is None and "its own hash does not match" in rows[1]["problem"]
    assert not rows[1]["newest"] and not rows[2]["newest"]
    assert main(["checkpoint", "ls", run]) == 0
    _, first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r" +30 +1  2026-\S+ 10:00:00 UTC +2 +1 +0\.0  a000001-000003.*newest", first
    )
    assert "damaged  a000001-000002.json: " in second and "newest" not in second + third
    assert main(["checkpoint", "ls", str(Path(run) / "none")]) == 2
    assert "no checkpoint under" in capsys.readouterr().err


# --- verify -------------------------------------------------------------------------------------


def test_a_verify_reads_each_object_once_and_names_each_problem(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = objects.read_bytes

    def counted(url: str, *a: object, **k: object) -> bytes:
        read.append(url)
        return real(url)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "read_bytes", counted)
        assert main(["checkpoint", "verify", run]) == 0
    told = capsys.readouterr()
    assert told.out == f"{run}: 3 generations, whole\n"
    assert "objects verified: 6 of 6" in told.err
    below = [url for url in read if "/objects/" in url or "/record/" in url]
    assert sorted(Path(url).name for url in below) == sorted(stored(run))
    _, second, first = generations(run)
    assert isinstance(first, Generation) and isinstance(second, Generation)
    damage(run, second.manifest.objects[0])
    Path(first.manifest.journal[0].url(run)).unlink()  # which all have
    assert main(["checkpoint", "verify", run]) == 1
    one, two, last = capsys.readouterr().out.splitlines()
    lines = sorted((one, two), key=lambda line: "/record/" in line)
    assert lines[0].endswith("differ from the manifest's (of a000001-000002.json)")
    assert "does not exist" in lines[1] and lines[1].count("a000001-0000") == 3
    assert last == f"{run}: 2 problems"
    assert main(["checkpoint", "verify", second.url]) == 1
    assert main(["checkpoint", "verify", str(Path(run) / "checkpoints/a000000-000001.json")]) == 2
    assert "is the claim of an attempt" in capsys.readouterr().err


def test_what_an_owner_removes_meanwhile_is_no_problem(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = claim(run, Claimant())
    real = inspect.read_entry
    begun: list[Generation] = []

    def read_late(url: str, entry: ObjectEntry) -> bytes:
        if not begun:
            begun.append(add(owner, 40, 40.0, keep=1))
        return real(url, entry)

    monkeypatch.setattr(inspect, "read_entry", read_late)
    count, problems = inspect.verify(run)
    owner.close()
    assert begun and (count, problems) == (3, []) and steps_of(run) == [40]


def test_a_generation_without_all_of_the_model_is_none(run: str) -> None:
    with contextlib.closing(claim(run, Claimant())) as owner:
        manifest = find_generation(run).manifest
        (entry,) = manifest.objects
        short = ObjectEntry(entry.name, entry.size, entry.sha256, entry.fragments[:1])
        fields = {**vars(manifest), "objects": (short,), "attempt": owner.attempt}
        owner.commit(CheckpointManifest(**fields), 9)
    _, problems = inspect.verify(run)
    assert len(problems) == 1 and "do not hold b once and whole" in problems[0]


# --- rm -----------------------------------------------------------------------------------------


def test_older_generations_go_with_what_no_other_names(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "rm", run, "--step", "10", "--step", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "removed a000001-000001.json",
        "removed a000001-000002.json",
        "the run goes on from step 30",
    ]
    assert steps_of(run) == [30] and newest_whole(run) == 30.0
    # The journal leads through all three.
    assert len(stored(run)) == 1 + 3 and not inspect.verify(run)[1]
    assert names(run) == ["a000000-000001.json", "a000001-000003.json", "a000001-000004.json"]
    made(run, (40,))
    assert steps_of(run) == [40, 30] and len(stored(run)) == 2 + 4


def test_what_may_not_go_stays(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)

    def refused(*arguments: str, status: int = 2) -> str:
        assert main(["checkpoint", "rm", *arguments]) == status
        assert names(run) == before and steps_of(run) == [30, 20, 10]
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    assert "is the newest whole generation" in refused(run, "--step", "30")
    assert "there is no generation of step 11, 12" in refused(run, "--step", "12", "--step", "11")
    everything = ["--step", "10", "--step", "20", "--step", "30", "--force"]
    assert "no whole generation would be left" in refused(run, *everything)
    assert "--step, or one manifest" in refused(run)
    assert "no generation a000000-000001.json" in refused(f"{run}/checkpoints/a000000-000001.json")
    owner = claim(run, Claimant())
    before = names(run)
    said = refused(run, "--step", "10", status=3)
    assert "owned by a live job" in said and "stop that job first" in said
    owner.close()


def test_the_newest_goes_by_force_and_the_run_goes_on_before_it(run: str) -> None:
    manifest = objects.join(run, "checkpoints", "a000001-000003.json")
    assert inspect.remove(manifest, force=True)[0] == ["a000001-000003.json"]
    # That of step 20 is this attempt's now, of the same objects.
    assert names(run)[-1] == "a000002-000001.json" and steps_of(run) == [20, 10]
    assert newest_whole(run) == 20.0 and len(stored(run)) == 2 + 2
    made(run, (30,), 31.0)
    assert steps_of(run) == [30, 20, 10] and newest_whole(run) == 31.0 and stored(run)


def test_a_damaged_newest_goes_without_force_and_the_whole_one_stays(run: str) -> None:
    damage(run, find_generation(run).manifest.objects[0])
    with pytest.raises(CheckpointError, match=r"step 20\) is the newest whole generation"):
        inspect.remove(run, [20])
    inspect.remove(run, [30])
    assert steps_of(run) == [20, 10] and newest_whole(run) == 20.0 and stored(run)


def test_a_damaged_manifest_stays_and_with_it_all_that_it_might_name(run: str) -> None:
    path = Path(run) / "checkpoints" / "a000001-000002.json"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="may be a claim and stays"):
        inspect.remove(str(path))
    before = names(run, "objects")
    inspect.remove(run, [10])
    assert steps_of(run) == [30] and names(run, "objects") == before


def test_generations_on_a_store_are_listed_verified_and_removed(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    run = f"{server.bucket}/{tmp_path.name}"
    made(run)
    assert [row.step for row in inspect.listing(run)] == [30, 20, 10]
    assert inspect.verify(run) == (3, [])
    inspect.remove(run, [10, 30], force=True)
    assert steps_of(run) == [20] and newest_whole(run) == 20.0 and len(stored(run)) == 1 + 2
    assert inspect.verify(f"{run}/checkpoints/{find_generation(run).name}") == (1, [])
    assert load_weights(find_generation(run))["b"].tolist() == [20.0] * 5


# --- a run that goes back -------------------------------------------------------------------------


def test_what_a_run_has_left_is_kept_last_and_gone_on_from_last(run: str) -> None:
    """From step 10 of 30: the one it went back to is kept before those that it has left."""
    with contextlib.closing(claim(run, Claimant())) as owner:
        _, _, first = owner.found
        assert isinstance(first, Generation)
        add(owner, 15, 15.0, keep=3, base=first)
        assert steps_of(run) == [15, 30, 10]
        assert [g.step for g in going_on_from(owner.found, None)] == [15, 10, 30]
        add(owner, 17, 17.0, keep=3)
    assert steps_of(run) == [17, 15, 10] and stored(run)


def wished(step: int, index: int, journal: int, resume_from: int | None) -> Generation:
    """A generation of a first attempt (step 10 and above) or a second one (below)."""
    segments = tuple(SegmentEntry(f"{i}", 1, "", i, i) for i in range(journal))
    config = {"checkpoint": {"resume_from": resume_from}}
    manifest = CheckpointManifest(
        **{**vars(RUN), "config": config},
        sampler=START,
        step=step,
        attempt=1,
        objects=(),
        journal=segments,
    )
    return Generation("run", f"a000001-{index:06d}.json", manifest)


def test_a_run_goes_back_once() -> None:
    old = [wished(30, 3, 3, None), wished(20, 2, 2, None), wished(10, 1, 1, None)]
    assert going_on_from(old, None) == old and going_on_from(old, 30) == old[:1]
    assert going_on_from(old, 20) == [old[1]]
    # Until something is committed, it goes back again; then it goes on, and not to what it left.
    fork = replace(wished(25, 4, 2, 20).manifest, journal=(*old[1].manifest.journal, FORK))
    after = [Generation("run", "a000002-000001.json", fork), *old]
    assert going_on_from(after, 20) == [after[0], old[1], old[2]]
    assert going_on_from(after, None) == [after[0], old[1], old[2], old[0]]
    assert going_on_from(["damaged", *after], 20) == ["damaged", after[0], old[1], old[2]]
    assert going_on_from(["damaged", *old], 20) == [old[1]]
    # Another wish is one more way back.
    assert going_on_from(after, 30) == [old[0]] and going_on_from(after, 10) == [old[2]]
    for found in (after, []):
        with pytest.raises(CheckpointError, match="no generation of that step, it has those of"):
            going_on_from(found, 21)


FORK = SegmentEntry("fork", 1, "", 3, 3)
