"""What a run needs of a machine, looked at before there is one: reads, and leaves nothing.

`examine` looks at the machine that it runs on and tells in plain data; `findings` compares what
several have told. Each node is asked once, and opens connections to the head and to its neighbour
alone: the cost grows with the nodes, not with their pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import ipaddress
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.environment import PASSED_ON
from cluster.interfaces import interface_of
from shards.store.cache import cache_folder

PACKAGES = ("lxscale", "torch", "deepspeed", "ray", "numpy")
_GIB = 1 << 30
# Less than this is a warning: room of the cache, of /dev/shm, memory; open files.
_ROOM, _SHM, _MEMORY, _FILES = 10 * _GIB, 1 * _GIB, 4 * _GIB, 4096
# Seconds that clocks may differ; S3 itself refuses requests at 15 minutes.
_SKEW_S, SKEW_S3_S = 5.0, 300.0
_CONNECT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    kind: str
    """ok, warning or problem."""
    about: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.kind:<8} {self.about:<12} {self.text}{remedy}"


@dataclass(frozen=True)
class Machine:
    """What one machine tells of itself. No values of variables: some are secrets."""

    name: str
    address: str
    versions: dict[str, str]
    interface: str | None
    """That of `address`."""
    named: tuple[str, ...]
    """Addresses that its own name resolves to."""
    gloo: str
    """GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME, where somebody has set one."""
    clock: float
    room: dict[str, int]
    """Bytes free: of the cache's disk, of /dev/shm, of memory."""
    files: int
    """Open files that a process may have."""
    gpus: int
    variables: dict[str, str] = field(default_factory=dict)
    """Name -> hash of the value with a key of this report's, of those that are passed on."""


def examine(address: str, cache: str | None = None, key: bytes = b"") -> Machine:
    """This machine, which has `address` in the cluster's network. cache: as data.cache."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
        named = tuple(sorted({str(a[4][0]) for a in found}))
    except OSError:
        named = ()
    gloo = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or ""
    return Machine(
        socket.gethostname(),
        address,
        versions,
        interface_of(address),
        named,
        gloo,
        time.time(),
        {
            "cache": _free(cache_folder(cache)),
            "/dev/shm": _free(Path("/dev/shm")),
            "memory": _memory(),
        },
        _open_files(),
        _gpus(),
        _variables(key),
    )


def _free(folder: Path) -> int:
    """Bytes free where the folder is or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _memory() -> int:
    """Bytes of memory that are to be had, a container's limit included."""
    found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(text for text in lines if text.startswith("MemAvailable:"))
        found = int(line.split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        found = min(found, limit - used)
    return found


def _open_files() -> int:
    """The hard limit, to which a process raises its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 62 if hard == resource.RLIM_INFINITY else hard


def _gpus() -> int:
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _variables(key: bytes) -> dict[str, str]:
    return {
        name: hashlib.blake2b(value.encode(), key=key, digest_size=8).hexdigest()
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON)
    }


# --- findings -----------------------------------------------------------------------------------


def findings(machines: Sequence[Machine], joined: bool) -> list[Finding]:
    """What the machines' own words say, the first of which is the command's. joined: they are nodes
    of a cluster."""
    return [
        _versions(machines),
        _interface(machines, joined),
        _environment(machines),
        _room(machines),
        _files(machines),
        *([_clock(machines)] if len(machines) > 1 else []),
    ]


def _versions(machines: Sequence[Machine]) -> Finding:
    first = machines[0].versions
    told = ", ".join(f"{name} {version}" for name, version in first.items())
    if absent := [name for name, version in first.items() if version == "absent"]:
        return Finding(
            "problem", "versions", f"{', '.join(absent)} not installed", "pip install it"
        )
    for m in machines[1:]:
        for name, version in m.versions.items():
            # Ray itself asks for equal micro versions of Python.
            if version != first[name]:
                return Finding(
                    "problem",
                    "versions",
                    f"{name} is {first[name]} on {machines[0].name}, {version} on {m.name}",
                    "install the same everywhere (constraints.txt)",
                )
    return Finding("ok", "versions", told + (" on all" if len(machines) > 1 else ""))


def _interface(machines: Sequence[Machine], joined: bool) -> Finding:
    for m in machines:
        on = f"{m.name} ({m.address})"
        if ipaddress.ip_address(m.address).is_loopback and joined and len(machines) > 1:
            return Finding(
                "problem",
                "network",
                f"Ray knows {on} by a loopback address",
                "`ray start --node-ip-address=` with its address in the cluster's network",
            )
        if m.gloo and m.interface and m.gloo.lstrip("=^").split(",")[0] != m.interface:
            return Finding(
                "warning",
                "network",
                f"GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is {m.gloo} on {on}, where Ray's "
                f"address is of {m.interface}",
                "unset it, unless another network is meant",
            )
        if m.interface is None and joined:
            return Finding(
                "warning",
                "network",
                f"no interface of {on} has that address (NAT, IPv6)",
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for `ray start` on every node",
            )
    loopback = {m.name for m in machines if any(a.startswith("127.") for a in m.named)}
    used = ", ".join(sorted({m.interface or "?" for m in machines}))
    text = f"workers talk over {used}"
    if loopback:
        # Gloo and NCCL by themselves would take the name's address.
        text += (
            f"; the names of {len(loopback)} machines are loopback addresses, which does no harm"
        )
    return Finding("ok", "network", text)


def _environment(machines: Sequence[Machine]) -> Finding:
    here = machines[0].variables
    own = {n for m in machines[1:] for n, v in m.variables.items() if here.get(n, v) != v}
    # A node's own cache is its own affair, and its AWS_* are replaced.
    if odd := sorted(n for n in own if not n.startswith("AWS_") and n != "LXSCALE_CACHE"):
        return Finding(
            "warning",
            "environment",
            f"{', '.join(odd)} have other values on some nodes, which count there",
            "unset them for `ray start`: the command passes its own on",
        )
    names = ", ".join(sorted(here))
    text = f"{names}, passed on to workers" if names else "no AWS_* or LXSCALE_* is set here"
    return Finding("ok", "environment", text)


def _room(machines: Sequence[Machine]) -> Finding:
    least = {"cache": _ROOM, "/dev/shm": _SHM, "memory": _MEMORY}
    remedies = {
        "cache": "data.cache or LXSCALE_CACHE on a larger disk, data.cache_limit_gb",
        "/dev/shm": "docker --shm-size, or an emptyDir of medium Memory",
        "memory": "a larger machine, or fewer workers on it",
    }
    for m in machines:
        for what, wanted in least.items():
            if m.room[what] < wanted:
                text = f"{what} of {m.name} has {m.room[what] / _GIB:.1f} GiB left"
                return Finding("warning", "room", text, remedies[what])
    told = (f"{w} {min(m.room[w] for m in machines) / _GIB:.0f} GiB" for w in least)
    return Finding("ok", "room", f"at least: {', '.join(told)}")


def _files(machines: Sequence[Machine]) -> Finding:
    worst = min(machines, key=lambda m: m.files)
    if worst.files < _FILES:
        text = f"{worst.name} allows a process {worst.files} open files"
        return Finding("warning", "open files", text, f"ulimit -Hn {_FILES} before `ray start`")
    shown = "any number" if worst.files >= 1 << 62 else str(worst.files)
    return Finding("ok", "open files", f"{shown} a process")


def _clock(machines: Sequence[Machine]) -> Finding:
    """`clock` is seconds ahead of the asking machine's, as doctor_nodes has put it there."""
    worst = max(machines[1:], key=lambda m: abs(m.clock))
    if abs(worst.clock) > _SKEW_S:
        text = (
            f"{worst.name} is {abs(worst.clock):.0f} s {'ahead' if worst.clock > 0 else 'behind'}"
        )
        return Finding("warning", "clock", text, "let NTP (chrony) set the clocks of all nodes")
    return Finding("ok", "clock", f"all within {max(1.0, abs(worst.clock)):.0f} s")


# --- connections --------------------------------------------------------------------------------


def listen(address: str) -> socket.socket:
    """A port that the system chooses, as workers take theirs."""
    return socket.create_server((address, 0), backlog=128)


def connects(address: str, port: int) -> str:
    """Why no connection to a peer is to be had, or ""."""
    try:
        with socket.create_connection((address, port), _CONNECT_S):
            return ""
    except OSError as error:
        return error.strerror or str(error)
