"""What a person sees of long work: bars on a terminal, some lines elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.cli import progress
from cluster.cli.progress import shown_progress
from tests.conftest import subprocess_environment

WORK = """
from cluster.cli.progress import shown_progress
with shown_progress() as show:
    for i in range(1, 51):
        show("images read", i, 50)
        show("images written", i, None)
    show("images written", 50, 50)
print("the result")
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_a_line_now_and_then_and_one_at_the_end_of_a_stage(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with shown_progress() as show:
        for done in range(101):
            clock[0] = done * 0.1
            show("tars read", done, 1000)
            show("images read", done, 100)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "tars read: 50 of 1,000, 10/s, 01:35 left",
        "images read: 50 of 100, 10/s, 00:05 left",
        "tars read: 100 of 1,000, 10/s, 01:30 left",
        "images read: 100 of 100, 10/s",
    ]


def test_slow_work_has_seconds_and_an_unknown_end_none(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with shown_progress() as show:
        show("shards verified", 0, None)
        clock[0] = 30.0
        show("shards verified", 2, None)
    assert capsys.readouterr().err == "shards verified: 2, 15 s each\n"


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(quiet=True) as show:
        show("images read", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_bars_are_for_terminals(tmp_path: object) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", WORK],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=subprocess_environment(COLUMNS="80"),
        text=True,
    )
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            drawn += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert done.communicate()[0] == "the result\n" and done.returncode == 0
    text = drawn.decode()
    assert "images read: 100%" in text and "50.0/50.0" in text and "images written" in text
