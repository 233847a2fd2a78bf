"""Sums of made-up runs whose times are known: every kind of end, and what is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shards.store import objects
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import document_bytes, lease_url
from trainer.checkpoint.lease import Lease, Made, lease_bytes
from trainer.checkpoint.process import this_process
from trainer.goodput import Goodput, goodput_of, goodput_share, sum_up
from trainer.timeline import FORMAT, Group, Timeline, read_timeline, timeline_url

T = 1_700_000_000.0
SECONDS = dict.fromkeys(range(1, 101), 2.0)
"""A step takes two seconds."""


def group(
    began: float, attempt: int, since: int, step: int, kind: str = "lost", job: str = "a"
) -> Group:
    """Placed after 3 s, its loop begun 1 s later, its model there after 4 more, restored in 2; two
    seconds a step, a save of 1 s, one second of a step that was not finished; the fault found
    after 6 s, all torn down half a second later."""
    spent = {"start": 4.0, "restore": 2.0, "data": 0.5 * (step - since), "save": 1.0}
    spent["step"] = 1.5 * (step - since) + 1.0
    quiet = began + 4 + sum(spent.values())
    return Group(
        job,
        began,
        began + 3,
        4,
        quiet,
        quiet + 6,
        quiet + 6.5,
        kind,
        "a fault",
        Made(attempt, since, step, began + 4, spent),
    )


def check(found: Goodput, **expected: float) -> None:
    """The parts that are not 0; they sum to the wall, and so do those of every group."""
    parts = {name.replace("_", " "): value for name, value in expected.items()}
    parts = {{"startup": "start-up", "reform": "re-form"}.get(n, n): v for n, v in parts.items()}
    assert {n: s for n, s in found.seconds.items() if s > 1e-6} == pytest.approx(parts)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)
    for part in found.parts:
        assert sum(part.seconds.values()) == pytest.approx(part.ended - part.began)


@pytest.mark.parametrize("kind", ["lost", "hung", "failed"])
def test_a_fault_undoes_steps_and_is_recovered_from(kind: str) -> None:
    """Steps 1-30, of which 20 are saved; then 21-60, to the end."""
    first = group(T, 1, 0, 30, kind)
    assert first.gone
    second = group(first.gone, 2, 20, 60, "done")
    found = sum_up([first, second], SECONDS, 60)
    check(
        found,
        kept=120,
        lost=21,  # ten steps, and the one that was cut short
        checkpoint=2,
        startup=8,
        detect=12,
        tear_down=1,
        reform=8,
        restore=4,
        other=1,  # at the end no step was cut short
    )
    assert (found.lost_steps, found.unsaved_steps, found.faults) == (10, 0, 1)
    assert found.replay == 20  # steps 21-30
    assert found.share == pytest.approx(120 / found.wall)
    assert found.share == found.share_of_jobs


def test_a_stop_loses_nothing_and_time_without_a_job_is_apart() -> None:
    first = group(T, 1, 0, 30, "stopped")
    assert first.gone
    second = group(first.gone + 100, 2, 30, 60, "done", job="b")
    found = sum_up([first, second], SECONDS, 60)
    assert found.seconds["away"] == pytest.approx(100)
    assert (found.lost_steps, found.faults, found.replay) == (0, 0, 0)
    assert found.seconds["kept"] == 120 and found.seconds["lost"] == 0
    assert found.share_of_jobs == pytest.approx(120 / (found.wall - 100))
    check(found, **{n.replace(" ", "_").replace("-", ""): s for n, s in found.seconds.items() if s})


def test_no_room_counts_as_waiting_for_it() -> None:
    waited = Group("a", T, None, 0, T + 60, T + 60, T + 60, "no room")
    found = sum_up([waited, group(T + 500, 1, 0, 20, "done", job="b")], SECONDS, 20)
    assert found.seconds["start-up"] == pytest.approx(68)
    assert found.seconds["away"] == pytest.approx(440)
    assert found.faults == 0


def test_the_same_steps_may_be_lost_twice_and_a_generation_may_be_damaged() -> None:
    """Steps 1-50 with 40 saved; 41-50 again; then from 10, as what is later is damaged."""
    one = group(T, 1, 0, 50)
    two = group(one.gone or 0, 2, 40, 50)
    three = group(two.gone or 0, 3, 10, 100, "done")
    found = sum_up([one, two, three], SECONDS, 100)
    assert found.lost_steps == 40 + 10 and found.seconds["lost"] == pytest.approx(100 + 2)
    assert found.seconds["kept"] == 200 and found.replay == 80
    assert [p.lost_steps for p in found.parts] == [40, 10, 0]


def test_a_group_that_works_has_steps_that_are_not_saved_yet() -> None:
    """Without an end: as of its last sign of life."""
    open_ = replace(group(T, 1, 0, 30), found=None, gone=None, kind="", text="")
    found = sum_up([open_], SECONDS, 20)
    check(found, kept=40, unsaved=21, checkpoint=1, startup=8, restore=2)
    assert (found.lost_steps, found.unsaved_steps, found.faults) == (0, 10, 0)


def test_a_killed_driver_writes_no_end(tmp_path: Path) -> None:
    """The attempt's lease bounds it. Then nobody was there."""
    run = str(tmp_path / "run")
    killed = replace(group(T, 1, 0, 30), found=None, gone=None, kind="", text="")
    after = group(T + 200, 2, 20, 40, "done", job="b")
    assert killed.quiet is not None
    write(run, "begin", replace(killed, made=Made(), quiet=None))
    write(run, "end", after)
    lease = Lease(1, "a", this_process(), "", 7, 20, "running", killed.made, killed.quiet)
    objects.write_bytes(lease_url(run, "000001-ab.json"), lease_bytes(lease))
    damaged = timeline_url(run, "group-20231114T221320.000-ff-end.json")
    objects.write_bytes(damaged, b"{")
    found = goodput_of(run)
    killed_part, away, _ = found.parts
    assert (killed_part.kind, killed_part.attempt, killed_part.step) == ("killed", 1, 30)
    assert away.kind == "away" and away.seconds["away"] == pytest.approx(200 - 72)
    # No generation is there, so nothing is kept: but where the next attempt began says what was.
    assert found.step == 0 and found.faults == 1 and found.unknown_steps == 0
    assert killed_part.lost_steps == 10
    assert sum(found.seconds.values()) == pytest.approx(found.wall)


def write(run: str, what: str, group: Group) -> None:
    from dataclasses import asdict

    url = timeline_url(run, f"group-{int(group.began)}.000-ab-{what}.json")
    objects.write_bytes(url, document_bytes(FORMAT, asdict(group)))


def test_two_jobs_at_a_time_are_counted_once() -> None:
    """A second one takes the run over while the first one's workers still end."""
    first = group(T, 1, 0, 30, "failed")
    assert first.gone
    second = group(first.gone - 5, 2, 30, 60, "done", job="b")
    refused = Group("c", T + 10, T + 13, 4, T + 20, T + 20, T + 21, "failed", "owned")
    found = sum_up([first, refused, second], SECONDS, 60)
    assert found.wall == pytest.approx(second.gone - T if second.gone else 0)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)
    assert found.seconds["away"] == 0 and len(found.parts) == 2


def test_what_an_older_lxscale_did_not_write_is_said() -> None:
    found = sum_up([], SECONDS, 100)
    assert found.share is None and found.wall == 0 and found.unknown_steps == 100
    # Steps 1-40 are of a time before timelines, 41-50 without seconds.
    lines = {s: None if s <= 50 else 2.0 for s in range(1, 61)}
    found = sum_up([group(T, 3, 40, 60, "done")], lines, 60)
    assert found.seconds["kept"] == 20 and found.unknown_steps == 50
    assert found.seconds["lost"] == 0 and found.seconds["other"] == pytest.approx(21)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)


def test_a_place_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run under"):
        goodput_of(str(tmp_path))
    assert goodput_share(str(tmp_path)) is None


def test_a_driver_writes_its_groups_when_the_store_is_there_again(tmp_path: Path) -> None:
    """Not when it is away, and without an error or a wait."""
    run = tmp_path / "run"
    run.write_text("in the way")
    with Timeline(str(run), "a", T) as timeline:
        timeline.began()
        timeline.placed(2)
        timeline.ended("lost", "lost worker 1", Made(1, 0, 7), 3.0)
        timeline.gone()
        run.unlink()
        timeline.began()
        timeline.placed(2)
    lost, after = read_timeline(str(run))
    assert (lost.kind, lost.workers, lost.made.step) == ("lost", 2, 7)
    assert lost.found and lost.quiet and lost.found - lost.quiet == pytest.approx(3.0)
    assert after.began == lost.gone and after.gone is None
