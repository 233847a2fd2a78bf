"""Ends what a driver that was killed leaves behind. Run as a script, so it imports only little.

The kernel ends Ray's daemons with their driver, but not their agents, which try for a minute to
reach them, nor processes that workers started. All of them carry a mark in their environment.
"""

from __future__ import annotations

import os
import shutil
import signal
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
    mark = f"{MARK}={session}".encode()
    began = seen = time.monotonic()
    while (now := time.monotonic()) < began + quiet + 5:
        found = [pid for pid in _processes() if _environment(pid) & {mark}]
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


def _environment(pid: int) -> set[bytes]:
    """What the process was started with; nothing of zombies and of other users' processes."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


if __name__ == "__main__":
    if sys.stdin.buffer.read() != b"done":
        reap(sys.argv[1], quiet=1.0)
        shutil.rmtree(sys.argv[1], ignore_errors=True)
