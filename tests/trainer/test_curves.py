"""Curves on object storage: they outlive the machine that wrote them, and are read from there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.store import objects
from tests.object_store import FaultProxy, ObjectStore
from trainer import curves
from trainer.curves import Curves


@pytest.fixture
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real gateway's in `make test-faults`."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # TensorBoard's, which keeps credentials
    return server.bucket


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def train(board: Curves, steps: range, value: float = 1.0) -> None:
    for step in steps:
        board.step(f'{{"step": {step}}}')
        board.scalars({"train/loss": value, "lr": 0.1}, step)


def read(events: EventAccumulator, tag: str = "train/loss") -> list[tuple[int, float]]:
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_curves_of_a_killed_run_go_on_elsewhere_without_a_gap_or_a_step_twice(
    s3: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several files; TensorBoard reads them from the store, and follows them."""
    monkeypatch.setattr(curves, "_FULL", 1500)
    url = f"{s3}/curves/tensorboard"
    killed = Curves(url, 1, 0)
    train(killed, range(1, 101))
    killed.publish()  # a generation of step 100 is committed
    train(killed, range(101, 131))
    killed.publish()
    train(killed, range(131, 141))  # and these nobody sees any more
    follower = EventAccumulator(url, size_guidance={"scalars": 0})
    assert [step for step, _ in read(follower)] == list(range(1, 131))
    elsewhere = Curves(url, 2, 100)
    train(elsewhere, range(101, 161), 2.0)
    elsewhere.close()
    expected = [(s, 1.0 if s <= 100 else 2.0) for s in range(1, 161)]
    fresh = EventAccumulator(url, size_guidance={"scalars": 0})
    assert read(fresh) == read(follower) == expected
    assert [step for step, _ in read(fresh, "lr")] == list(range(1, 161))
    names = objects.list_names(url)
    for kind in ("events.out.tfevents.a000001-", "steps-a000001-"):
        assert sum(name.startswith(kind) for name in names) > 1
    # The record of an attempt is whole, and of a step that was made again there are two lines.
    lines = [objects.read_bytes(objects.join(url, n)).splitlines() for n in names if "steps-" in n]
    assert sum(map(len, lines)) == 130 + 60
    assert not list(machine.glob("lxscale-curves-*/events*a000002*"))


def test_an_upload_does_not_grow_with_the_run(
    s3: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "_FULL", 4000)
    sent: list[int] = []
    upload = objects.upload

    def counted(path: Path, url: str, *more: object) -> None:
        sent.append(path.stat().st_size)
        upload(path, url, *more)

    monkeypatch.setattr(objects, "upload", counted)
    board, most = Curves(f"{s3}/bounded", 1, 0), []
    for first in range(1, 1001, 20):
        train(board, range(first, first + 20))
        sent.clear()
        board.publish()
        most.append(sum(sent))
        assert len(sent) <= 4
    # A file and what was closed since, of each kind; and as much is left on this machine.
    assert max(most[25:]) <= 2 * 2 * 4200 and max(most[25:]) <= 1.2 * max(most[5:25])
    assert len(list(machine.glob("lxscale-curves-*/*a000001*"))) == 2
    sent.clear()
    board.publish()
    assert not sent
    board.close()


def test_a_store_that_is_away_costs_one_warning_and_no_curve(
    proxy: FaultProxy,
    s3: str,
    machine: Path,
    said: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curves, "_PATIENCE_S", 1.0)
    board = Curves(f"{s3}/away", 1, 0)
    train(board, range(1, 11))
    proxy.down()
    board.publish()
    board.publish()
    proxy.up()
    train(board, range(11, 21))
    board.close()
    (warning,) = [r.getMessage() for r in said if r.levelno == logging.WARNING]
    assert "tried again later" in warning
    assert [step for step, _ in read(EventAccumulator(f"{s3}/away"))] == list(range(1, 21))
