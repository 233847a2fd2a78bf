"""How many workers a run takes, by the room there is and what it may have."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster import growth, launch, placing
from cluster.growth import Growth, steps_up
from cluster.placing import Freed, number
from trainer.config import RunConfig, parse_config

AVOIDED = frozenset({"leaving"})


def config(workers: str, strict: int = 0, **cluster: float) -> RunConfig:
    tree = {
        "data": {"train": "set"},
        "train": {"steps": 1, "strict": strict},
        "cluster": {"workers": workers, **cluster},
    }
    return parse_config(tree, "test")


@pytest.mark.parametrize(
    ("workers", "strict", "numbers"),
    [
        # By room for 0, 1, … 5.
        ("2", 0, [2, 2, 2, 2, 2, 2]),
        ("1..4", 0, [1, 1, 2, 3, 4, 4]),
        ("2..3", 0, [2, 2, 2, 3, 3, 3]),
        ("1..5", 4, [1, 1, 2, 2, 4, 4]),
        ("2..6", 12, [2, 2, 2, 3, 4, 4]),
    ],
)
def test_a_run_takes_the_room_that_there_is(workers: str, strict: int, numbers: list[int]) -> None:
    assert [number(config(workers, strict), room) for room in range(6)] == numbers


def test_room_counts_by_node_and_not_on_those_to_be_avoided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Halves of two nodes make no worker; the scarcest kind counts."""
    free = {
        "a": {"CPU": 3.0, "GPU": 1.0},
        "b": {"CPU": 7.9},
        "c": {"CPU": 4.0, "GPU": 8.0},
        "leaving": {"CPU": 64.0, "GPU": 8.0},
    }
    monkeypatch.setattr(placing, "available_resources_per_node", lambda: free)
    on_cpus = config("1..99", cpus_per_worker=2).cluster
    assert placing._fitting(on_cpus, AVOIDED) == 1 + 3 + 2
    on_gpus = config("1..99", cpus_per_worker=1.5, gpus_per_worker=1).cluster
    assert placing._fitting(on_gpus, AVOIDED) == 1 + 0 + 2


def test_room_that_was_just_given_back_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers on a, one on b and one on a node that leaves: a's is not free yet by Ray's
    account, b's is. A spare node is taken in the same start."""
    free = {"a": {"CPU": 0.0}, "b": {"CPU": 1.0}, "leaving": {"CPU": 1.0}, "spare": {"CPU": 1.0}}
    monkeypatch.setattr(placing, "available_resources_per_node", lambda: free)
    cluster = config("1..9").cluster
    freed = Freed(("a", "a", "b", "leaving"))
    assert freed.fitting(cluster, AVOIDED) == 2 + 1 + 1
    assert Freed().fitting(cluster, AVOIDED) == 2
    assert Freed(("b",), room=5).fitting(cluster, AVOIDED) == 5


def test_more_is_asked_for_in_the_steps_that_can_be_used() -> None:
    assert steps_up(range(1, 5), 2) == [1, 1]
    assert steps_up([1, 2, 3, 4, 6, 12], 3) == [1, 2, 6]
    assert steps_up(range(1, 5), 4) == []
    assert len(steps_up(range(1, 2**31), 1)) == growth._MOST


class Rooms:
    """Ray's account of what is asked for, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.nodes = 0.0, dict[int, str]()
        self.asked: list[int] = []
        self.closed: list[int] = []
        monkeypatch.setattr(growth, "ask_for_room", self._ask)
        monkeypatch.setattr(growth, "placement_group_table", self._table)
        monkeypatch.setattr(growth, "close", self.closed.append)

    def _ask(self, _cluster: Any, n: int, _avoided: frozenset[str]) -> int:
        self.asked.append(n)
        return len(self.asked) - 1

    def _table(self, room: int) -> dict[str, Any]:
        there = {0: self.nodes[room]} if room in self.nodes else {}
        return {"state": "CREATED" if there else "PENDING", "bundles_to_node_id": there}

    def after(self, seconds: float, run: Growth) -> int:
        self.now += seconds
        return run.due()


def test_a_run_grows_when_the_room_has_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = Rooms(monkeypatch)
    run = Growth(config("1..4", grow_after_s=30), 1, lambda: AVOIDED, lambda: rooms.now)
    assert rooms.asked == [1, 1, 1]
    assert rooms.after(100, run) == 0
    # Two nodes come, one after the other: taken together, after the second has been there so long.
    rooms.nodes[1] = "a"
    assert rooms.after(2, run) == 0 and rooms.after(28, run) == 0
    rooms.nodes[0] = "b"
    assert rooms.after(2, run) == 0 and rooms.after(28, run) == 0
    assert rooms.after(2, run) == 3
    # One goes before it was taken: what is left counts from then.
    del rooms.nodes[1]
    assert rooms.after(2, run) == 0 and rooms.after(28, run) == 0 and rooms.after(2, run) == 2
    # Room on a node that will be taken away is none.
    rooms.nodes[0] = "leaving"
    assert rooms.after(2, run) == 0 and rooms.after(100, run) == 0
    run.close()
    assert rooms.closed == [0, 1, 2]


def test_a_run_does_not_grow_soon_after_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = Rooms(monkeypatch)
    run = Growth(config("1..2", grow_after_s=30), 1, frozenset, lambda: rooms.now)
    rooms.nodes[0] = "a"
    assert rooms.after(0, run) == 0 and rooms.after(29, run) == 0 and rooms.after(1, run) == 2


def test_a_growth_that_is_put_off_waits_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = Rooms(monkeypatch)
    run = Growth(config("1..2", grow_after_s=4), 1, frozenset, lambda: rooms.now)
    rooms.nodes[0] = "a"
    assert rooms.after(0, run) == 0 and rooms.after(4, run) == 2
    run.put_off()
    assert [rooms.after(2, run) for _ in range(7)] == [0] * 6 + [2]


def test_strict_runs_grow_by_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = Rooms(monkeypatch)
    run = Growth(config("1..8", 8, grow_after_s=0), 2, frozenset, lambda: rooms.now)
    assert rooms.asked == [2, 4]
    rooms.nodes[1] = "a"  # room for six: four can be used
    assert rooms.after(0, run) == 4
    rooms.nodes[0] = "b"
    assert rooms.after(2, run) == 8


def test_no_growth_waits_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_STORE_S", 0.05)
    for answer, expected in (("a000001-000002.json", True), ("", True), (None, False)):
        monkeypatch.setattr(launch, "newest_generation", lambda _, a=answer: a)
        assert launch._store_answers("run") is expected
    monkeypatch.setattr(launch, "newest_generation", lambda _: time.sleep(5))
    began = time.monotonic()
    assert not launch._store_answers("run") and time.monotonic() - began < 2
