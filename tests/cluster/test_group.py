"""How a group of workers is seated and watched, and when failures are too many: plain functions."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time

import pytest
import ray

from cluster import nodes
from cluster.bounded import StillBusyError, bounded, held
from cluster.budget import Budget
from cluster.errors import AgainError, LaunchError, LostError, exit_status
from cluster.group import _cause, first_line, hang, seats
from cluster.interfaces import interface_of
from cluster.worker import Failure, Placed, Report
from shards.errors import DataError, StoreError
from trainer.errors import ConfigError
from trainer.sections import ClusterSection

CLUSTER = ClusterSection(hang_timeout_s=15, process_group_timeout_s=360)


def reports(*told: tuple[str, float, float | None]) -> list[Report]:
    return [Report((), phase, age, median) for phase, age, median in told]


def test_a_hang_is_when_nobody_is_within_the_time_for_what_he_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "300")
    # Quick steps: 15 s; slow ones: ten times the median.
    assert not hang(reports(("step", 14.0, 0.1), ("step", 14.9, 0.1)), CLUSTER)
    assert "worker 1 at 'step'" in hang(reports(("step", 15.1, 0.1), ("step", 15.2, 0.1)), CLUSTER)
    assert not hang(reports(("step", 19.0, 2.0), ("step", 19.0, 2.0)), CLUSTER)
    assert hang(reports(("step", 20.1, 2.0), ("step", 20.1, 2.0)), CLUSTER)
    # One that waits for the store is waited for, for as long as it may.
    assert not hang(reports(("step", 200.0, 0.1), ("data", 200.0, 0.1)), CLUSTER)
    assert hang(reports(("step", 320.0, 0.1), ("data", 320.0, 0.1)), CLUSTER)
    # A first step, a validation, a save: as long as torch waits for a peer.
    for phase in ("start", "step", "validation", "save", "end"):
        assert not hang(reports((phase, 370.0, None)), CLUSTER)
        assert hang(reports((phase, 376.0, None)), CLUSTER)


def test_the_cause_among_failures_is_not_the_peers_broken_connection() -> None:
    failures = [Failure(kind, kind, "") for kind in ("lost", "code", "again", "user")]
    assert [_cause(failures[: n + 1]).kind for n in range(4)] == [
        "lost",
        "code",
        "again",
        "user",
    ]


def test_seats_number_workers_by_node_and_devices_by_worker() -> None:
    placed = [Placed(node, f"10.0.0.{i}", False) for i, node in enumerate("aab")]
    found = seats(placed, ("10.0.0.1", 5))
    assert [s.rank for s in found] == [0, 1, 2] and {s.world for s in found} == {3}
    assert [s.local_rank for s in found] == [0, 1, 0]
    # Ray shows each worker its own device alone.
    with_gpu = [dataclasses.replace(p, gpu=True) for p in placed]
    assert [s.local_rank for s in seats(with_gpu, ("", 0))] == [0, 0, 0]


def test_only_failures_without_progress_are_counted() -> None:
    """Many of them with a checkpoint between any two end nothing; one more than allowed without
    does."""
    budget = Budget(2, "")
    for generation in range(50):
        budget = budget.after_failure(f"g{generation}")
        assert not budget.spent
    for _ in range(1):
        budget = budget.after_failure("g49")
    assert not budget.spent
    # The store does not tell: that is no progress.
    assert budget.after_failure(None).spent
    assert budget.after_failure("g49").spent
    assert not budget.after_failure("g50").spent
    assert Budget(0, "").after_failure("").spent
    # A snapshot in memory that is newer than what the group before had is progress, too.
    for since in range(20, 400, 20):
        budget = budget.after_failure("g49", since)
        assert not budget.spent
    assert budget.after_failure("g49", 380).after_failure("g49", 0).after_failure("g49", 380).spent
    endless = Budget(-1, "")
    for _ in range(100):
        endless = endless.after_failure("")
    assert not endless.spent


def test_the_exit_status_says_whether_to_run_again() -> None:
    again: list[Exception] = [AgainError(""), LostError(""), StoreError("")]
    never: list[Exception] = [ConfigError(""), DataError(""), LaunchError("")]
    assert [exit_status(e) for e in again] == [75] * 3
    assert [exit_status(e) for e in never] == [2] * 3


def test_loopback_has_an_interface() -> None:
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("203.0.113.7") is None


def test_what_takes_connections_and_does_not_speak_as_ray_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "_CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
        assert not nodes._answers(node)
        server.accept()
        for answer, expected in ((b"\0\0\0\4\0\0\0\0\0", True), (b"HTTP/1.0 4", False)):
            speaks = threading.Thread(target=lambda a=answer: server.accept()[0].sendall(a))
            speaks.start()
            assert nodes._answers(node) == expected
            speaks.join()
    assert not nodes._answers(node)


def test_calls_that_do_not_return_are_left() -> None:
    assert bounded(lambda: 3, 5) == 3
    with pytest.raises(KeyError):
        bounded(lambda: {}["x"], 5)
    with pytest.raises(StillBusyError):
        bounded(lambda: time.sleep(60), 0.1)


def test_one_thread_enters_lives_and_leaves() -> None:
    threads: list[threading.Thread] = []
    looks: list[int] = []

    def note() -> None:
        time.sleep(0.05)
        threads.append(threading.current_thread())

    with held(note, note, 5, 5, lambda: looks.append(1)):
        assert threads[0].is_alive() and looks
    assert threads[0] is threads[1] is not threading.current_thread()
    with pytest.raises(StillBusyError), held(lambda: time.sleep(60), note, 0.1, 0.1, lambda: None):
        pass
    with pytest.raises(ZeroDivisionError), held(lambda: 1 / 0, note, 5, 5, lambda: None):
        pass


def test_a_workers_own_error_is_what_is_told() -> None:
    error = ray.exceptions.RayTaskError("prepare", "where it was raised", TypeError("a bug\nmore"))
    assert first_line(error) == "TypeError: a bug"
