"""Who a process is, and whether it has ended, as far as another one can tell."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from shards.processes import boot_id


@dataclass(frozen=True)
class Process:
    """A process of some machine. What its system does not say is empty or 0."""

    host: str
    pid: int
    boot: str
    """The machine's id since it was last started."""
    namespace: str
    """In which the pid is valid."""
    started: int
    """Clock ticks from the machine's start to the process's."""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"


def this_process() -> Process:
    pid = os.getpid()
    boot, namespace = _here()
    return Process(socket.gethostname(), pid, boot, namespace, _started(pid))


def has_ended(process: Process) -> bool:
    """Whether the process was of this machine and is gone. False where that cannot be known."""
    if not process.boot or not process.started or (process.boot, process.namespace) != _here():
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    # 0: its facts are hidden from us.
    return _started(process.pid) not in (0, process.started)


def _here() -> tuple[str, str]:
    """This machine's boot and this process's pid namespace."""
    try:
        return boot_id(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _started(pid: int) -> int:
    """When a process started; -1 for one that has ended and is not yet reaped, 0 if unknown."""
    try:
        # The name of the program may hold anything, spaces and parentheses included.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])
