"""Ends what a driver that was killed leaves behind. Run as a script, so it imports only little.

The kernel ends Ray's daemons with their driver, but not their agents, which try for a minute to
reach them, nor processes that workers started. All of them carry a mark in their environment, but
some cannot be seen to: Ray's agents and workers write their titles over it, in part or whole. Those
have files of the session's folder open to write to.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

MARK = "LXSCALE_SESSION"


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Watch this process: when it ends without `stop`, reap the session and remove its folder."""
    return subprocess.Popen(
        [sys.executable, "-S", __file__, str(folder)],
        stdin=subprocess.PIPE,  # which the kernel closes when this process ends
        start_new_session=True,  # out of Ctrl-C's reach
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    process.communicate(b"done")


def reap(session: str, quiet: float = 0.0) -> None:
    """kill -9 every process of the session, until none was found for `quiet` seconds: one
    that is just being started shows no environment. Linux only; elsewhere Ray's own clean-up must
    do."""
    began = seen = time.monotonic()
    while (now := time.monotonic()) < began + quiet + 5:
        found = [pid for pid in _processes() if _belongs(pid, session)]
        if found:
            seen = now
        elif now - seen >= quiet:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # it ended meanwhile
        time.sleep(0.05)


def _processes() -> list[int]:
    if not Path("/proc/self/environ").exists():
        return []
    return [int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) != os.getpid()]


def _belongs(pid: int, session: str) -> bool:
    """Whether a process is of the session, of what can be seen of it: nothing can of zombies and of
    other users' processes."""
    try:
        mark = f"{MARK}={session}".encode()
        if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
        return any(_writes(Path(fd.path), session) for fd in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def _writes(fd: Path, session: str) -> bool:
    """Whether a process's descriptor is of a file of the session's, and for writing: a person may
    read its logs."""
    try:
        return os.readlink(fd).startswith(f"{session}/") and bool(fd.lstat().st_mode & stat.S_IWUSR)
    except OSError:
        return False  # closed meanwhile


if __name__ == "__main__":
    if sys.stdin.buffer.read() != b"done":
        reap(sys.argv[1], quiet=1.0)
        shutil.rmtree(sys.argv[1], ignore_errors=True)
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from shards.processes import sweep_homes

        sweep_homes()
