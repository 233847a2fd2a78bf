"""What a person sees of long work: bars on a terminal, some lines elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import progress
from cluster.cli.progress import shown_progress
from shards.format.build import BuildSettings, build
from shards.format.verify import verify
from tests.conftest import MakeRecords, files_of, subprocess_environment

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


@pytest.mark.parametrize(
    ("redirected", "status"),
    [
        ("2>&-", 0),
        ("2>/dev/full", 0),
        ("2> >(head -0)", 0),
        (">&-", 0),
        (">&- 2>&-", 0),
        ("| head -0", 0),
        (">/dev/full", 2),
    ],
)
def test_a_build_goes_on_whoever_looks_on(
    tmp_path: Path, make_records: MakeRecords, redirected: str, status: int
) -> None:
    build(make_records(9), tmp_path / "given", BuildSettings("own", "test"))
    out, tar = tmp_path / "out", files_of(tmp_path / "given") / "shard-000000.tar"
    command = (
        f"{sys.executable} -m cluster.cli shards build --feature-dim 8 --out {out} "
        f"--features {tar} {redirected}; exit ${{PIPESTATUS[0]}}"
    )
    environment = subprocess_environment(PYTHONUNBUFFERED="")
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("error: cannot write to stdout: No space left" in done.stderr) == (status == 2)
    assert verify(out) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_one_error(unbuffered: str) -> None:
    code = (
        "import sys\nfrom cluster.cli import main as cli\n"
        "cli.parse = lambda _: type('Arguments', (), {'func': lambda _: print('x', flush=True)})\n"
        "sys.exit(cli.main([]))"
    )
    command = f'{sys.executable} -c "$CODE" >/dev/full'
    environment = subprocess_environment(CODE=code, PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    message = "error: cannot write to stdout: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_an_error_that_cannot_be_printed_is_in_the_status() -> None:
    command = f"{sys.executable} -m cluster.cli shards info /nowhere/at/all 2>/dev/full"
    done = subprocess.run(["bash", "-c", command], env=subprocess_environment())
    assert done.returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_ends_with_its_reader(unbuffered: str) -> None:
    code = (
        "import sys\nfrom cluster.cli import main as cli\n"
        "def long(_):\n    while True:\n        print('a line')\n"
        "cli.parse = lambda _: type('Arguments', (), {'func': long})\n"
        "sys.exit(cli.main([]))"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    environment = subprocess_environment(CODE=code, PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "a line\n", "")


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
