"""Ctrl-C and SIGTERM at any moment: one line and the signal's status, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import subprocess_environment

# What comes before is the interpreter's own start, whose end is the first moment tried.
_MAIN = """
import sys
from cluster.cli.main import main
print("up", flush=True)
sys.exit(main())
"""
# A command that does what `sys.argv[2]` says.
_PROBE = """
import atexit, sys, time, types
import cluster.cli.main as cli
from shards.format.build import BuildSettings, build
from shards.errors import DataError
from tests.conftest import small_records

def records():
    yield from small_records(3)
    up()
    time.sleep(20)

class Slow:
    def __del__(self):
        up()
        time.sleep(20)

def up():
    print("up", flush=True)

def work(arguments):
    kind = arguments.kind
    if kind == "ending":
        atexit.register(lambda: (up(), time.sleep(20)))
        return 0
    try:
        if kind == "fails":
            atexit.register(time.sleep, 20)
            up()
            time.sleep(0.3)
            raise DataError("what is wrong")
        if kind == "finalizer":
            Slow()
        elif kind == "builds":
            build(records(), arguments.out, BuildSettings("x", "y"))
        else:
            up()
        time.sleep(20)
    except KeyboardInterrupt as error:
        if kind == "library":
            raise ImportError("cannot be initialised") from error
        if kind == "hangs":
            time.sleep(20)
        time.sleep(0.5)
        raise
    finally:
        print("clean", flush=True)

probe = types.ModuleType("probe")
def add_arguments(parser):
    parser.add_argument("kind")
    parser.add_argument("out", nargs="?")
    parser.set_defaults(func=work)
probe.add_arguments = add_arguments
sys.modules["probe"] = probe
cli.COMMANDS["probe"] = ("probe", "for tests")
sys.exit(cli.main())
"""


def begin(code: str, *arguments: str) -> subprocess.Popen[str]:
    """The process, once it has said that it is up."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    return process


def interrupted_at(moment: float, number: signal.Signals, *arguments: str) -> bool:
    """Whether a command was still there so many seconds after its start, and ended as it should."""
    process = begin(_MAIN, *arguments)
    time.sleep(moment)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert "Traceback" not in out, out
    if process.returncode == 2:  # its own end
        assert out.startswith("error: cannot read the configuration"), out
        return False
    assert (process.returncode, out) == (128 + number, "aborted\n"), moment
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_imports_are_interrupted_without_a_traceback(number: signal.Signals) -> None:
    assert interrupted_at(0.02, number, "train", "absent.yaml")
    interrupted_at(0.7, number, "train", "absent.yaml")


@pytest.mark.faults
def test_a_signal_at_many_moments(tmp_path: Path) -> None:
    found = [interrupted_at(0.02 + i * 0.05, signal.SIGINT, "train", "no.yaml") for i in range(80)]
    assert sum(found) > 10


def end(process: subprocess.Popen[str], *numbers: int) -> tuple[int, list[str]]:
    for number in numbers:
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_cleans_up(number: int) -> None:
    # Twice at once, as `timeout` sends it: once.
    assert end(begin(_PROBE, "probe", "works"), number, number) == (
        128 + number,
        ["clean", "aborted"],
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)]
)
def test_a_build_leaves_nothing(tmp_path: Path, number: int) -> None:
    for out, left in ((tmp_path / "new" / "deep", []), (tmp_path / "there", ["there"])):
        if left:
            out.mkdir()
        process = begin(_PROBE, "probe", "builds", str(out))
        assert [p.name[:15] for p in out.iterdir()] == [".lxscale-build-"]
        assert end(process, number) == (128 + number, ["clean", "aborted"])
        assert [p.name for p in tmp_path.rglob("*")] == left


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        # What a library makes of it, and a finalizer that swallows it, do not matter.
        ("library", ["clean", "aborted"]),
        ("finalizer", ["clean", "aborted"]),
        ("ending", ["aborted"]),
    ],
)
def test_what_may_lose_an_interruption_does_not(kind: str, lines: list[str]) -> None:
    assert end(begin(_PROBE, "probe", kind), signal.SIGINT) == (130, lines)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)]
)
def test_an_end_that_was_told_is_not_changed(number: int) -> None:
    process = begin(_PROBE, "probe", "fails")
    time.sleep(1.5)
    assert end(process, number) == (2, ["clean", "error: what is wrong"])


def test_a_second_signal_ends_a_clean_up_that_hangs() -> None:
    process = begin(_PROBE, "probe", "hangs")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    assert end(process, signal.SIGINT) == (143, ["aborted"])


def test_what_was_ignored_from_the_start_stays_ignored() -> None:
    """As nohup and shells do for what runs in the background."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + _PROBE
    process = begin(code, "probe", "works")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    assert end(process, signal.SIGTERM) == (143, ["clean", "aborted"])


_HANGS = """
import sys, time
from cluster.stopping import stop_signals
where = sys.argv[1]
with stop_signals(2) as stop:
    print("up", flush=True)
    while not stop.asked():
        time.sleep(0.01)
    if where == "inside":
        time.sleep(60)
if where == "after":
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["inside", "after", "nowhere"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_ends_the_process_in_time_whatever_hangs(number: int, where: str) -> None:
    began = time.monotonic()
    status, lines = end(begin(_HANGS, where), number)
    if where == "nowhere":
        assert (status, lines) == (0, [])
    else:
        assert status == 75 and time.monotonic() - began < 30
        (line,) = lines
        assert line.startswith("error: the stop took longer than cluster.stop_timeout_s=2;"), line
