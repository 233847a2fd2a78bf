"""Machines on a network, made of Linux network namespaces: Ray nodes with addresses of their own,
whose links can be cut. Needs root."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import subprocess_environment

_RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
_PORT = 6379
HUB, HUB_IP = -1, "10.77.0.254"
# Of Ray's nodes and of jobs. Ray's head asks for a token where its user happens to have one.
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}


def why_no_namespaces() -> str:
    """Why this process cannot make them, or "" where it can."""
    name = f"lxs-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "name", "hub", "type", "bridge")
            _ip("-n", name, "link", "add", "name", "a", "type", "veth", "peer", "name", "b")
        finally:
            _ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs network namespaces, bridges and veth pairs ({error})"
    return ""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


class Network:
    """Machine 0 has Ray's head and no room for workers; `add` makes others. `close` ends all.

    Besides them there is a machine that no link leads away from, `on(HUB)` with the address HUB_IP,
    for a store that all can reach.
    """

    def __init__(self, folder: Path, *head: str) -> None:
        """head: more arguments for its Ray."""
        self.head = head or ("--include-dashboard=false", "--num-cpus=0")
        self._folder, self._name = folder, f"lxs-{secrets.token_hex(3)}"
        self._count = 0
        self._rays: dict[int, subprocess.Popen[bytes]] = {}
        self._hub = f"{self._name}-hub"
        _ip("netns", "add", self._hub)
        _ip("-n", self._hub, "link", "add", "name", "hub", "type", "bridge")
        _ip("-n", self._hub, "address", "add", f"{HUB_IP}/24", "dev", "hub")
        _ip("-n", self._hub, "link", "set", "hub", "up")
        _ip("-n", self._hub, "link", "set", "lo", "up")
        self.machine()
        self.address = f"{self.address_of(0)}:{_PORT}"
        self.start_head()

    def start_head(self) -> None:
        self.ray(0, "--head", f"--port={_PORT}", *self.head)

    def machine(self) -> int:
        """A machine without Ray; its number."""
        number = self._count
        self._count += 1
        name = self._namespace(number)
        _ip("netns", "add", name)
        peer = ("peer", "name", "eth0", "netns", name)
        _ip("-n", self._hub, "link", "add", "name", f"p{number}", "type", "veth", *peer)
        _ip("-n", self._hub, "link", "set", f"p{number}", "master", "hub", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "address", "add", f"{self.address_of(number)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "route", "add", "default", "via", HUB_IP)
        return number

    def add(self, cpus: int = 1) -> int:
        """A machine with a Ray node; its number."""
        number = self.machine()
        self.join(number, cpus)
        return number

    def join(self, number: int, cpus: int = 1) -> None:
        """Start the Ray node of a machine."""
        self.ray(number, f"--address={self.address}", f"--num-cpus={cpus}")

    def leave(self, number: int) -> None:
        """-9 of a machine's processes, and no trace of them."""
        self.kill(number)
        self._rays.pop(number).wait()

    def ray(self, number: int, *arguments: str) -> None:
        log = self._folder / f"ray-{self._name}-{number}.log"
        more = [f"--node-ip-address={self.address_of(number)}", "--disable-usage-stats"]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self.on(number), *_RAY, *arguments, *more, f"--object-store-memory={80 << 20}"],
                stdout=output,
                stderr=output,
                env=subprocess_environment(**ENVIRONMENT),
            )
        self._rays[number] = process
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def keep(self, number: int) -> None:
        """Start the Ray node of a machine again if it has ended, as who runs machines does."""
        if self._rays[number].poll() is not None:
            self.kill(number)
            self.join(number)

    def _namespace(self, number: int) -> str:
        return self._hub if number == HUB else f"{self._name}-{number}"

    def address_of(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def on(self, number: int) -> list[str]:
        """What runs a command on a machine."""
        return ["ip", "netns", "exec", self._namespace(number)]

    def cut(self, number: int) -> None:
        _ip("-n", self._hub, "link", "set", f"p{number}", "down")

    def mend(self, number: int) -> None:
        _ip("-n", self._hub, "link", "set", f"p{number}", "up")

    def listeners(self, number: int) -> list[tuple[str, str]]:
        """(Address, process name) of every socket on which a machine listens."""
        told = subprocess.run(
            [*self.on(number), "ss", "-ltnpH"], check=True, capture_output=True, text=True
        )
        found = []
        for line in told.stdout.splitlines():
            address = line.split()[3].rpartition(":")[0]
            process = re.search(r'users:\(\("([^"]*)"', line)
            found.append((address, process[1] if process else ""))
        return found

    def kill(self, number: int) -> None:
        """-9 of all that runs on a machine."""
        for pid in _ip("netns", "pids", self._namespace(number)).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        for number in range(self._count):
            self.kill(number)
            _ip("netns", "delete", self._namespace(number))
        self.kill(HUB)
        _ip("netns", "delete", self._hub)
