"""What a person sees of long work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.cli import progress
from cluster.cli.progress import shown_progress
from shards.format.build import BuildSettings, build
from shards.format.verify import verify
from tests.conftest import MakeRecords


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_lines_come_every_five_seconds_and_at_the_end_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    with shown_progress() as show:
        for second in range(12):
            clock.now = 100.0 + second
            show("bytes read", 1000 * second, 20_000)
            show("images written", second, None)
        show("images written", 12, 12)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split(",")[0].split(":")[0] for line in lines] == [
        *["bytes read", "images written"] * 2,
        "images written",
    ]
    assert lines[0] == "bytes read: 5,000 of 20,000, 1,000/s, 00:15 left"
    assert lines[-1].startswith("images written: 12 of 12")


def test_a_terminal_gets_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown_progress() as show:
        for i in range(5):
            show("shards verified", i + 1, 5)
    captured = capsys.readouterr()
    assert captured.out == "" and "shards verified: 100%" in captured.err
    assert "5.00/5.00" in captured.err


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(quiet=True) as show:
        show("images written", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_every_stage_of_a_build_and_of_a_check_ends(
    tmp_path: Path, make_records: MakeRecords
) -> None:
    calls: dict[str, list[tuple[int, int | None]]] = {}

    def show(what: str, done: int, total: int | None) -> None:
        calls.setdefault(what, []).append((done, total))

    settings = BuildSettings("x", "y", vocab_size=200, images_per_shard=4)
    build(make_records(9), tmp_path, settings, progress=show)
    assert verify(tmp_path, show) == []
    assert {what: seen[-1] for what, seen in calls.items()} == {
        "images written": (9, 9),
        "vocabulary trained": (1, 1),
        "tables written": (3, 3),
        "files published": (9, 9),
        "shards verified": (3, 3),
    }
