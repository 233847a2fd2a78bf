"""Object stores for tests, and a proxy that makes them fail as networks and gateways do."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[1].parent / "shared"
_RGW_UP = SHARED / "tools" / "rgw-up"
_BUCKET = "lxscale-test"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- servers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectStore:
    """A server with one empty bucket; `environment` is what its clients need."""

    bucket: str
    environment: dict[str, str]

    @property
    def endpoint(self) -> str:
        return self.environment["AWS_ENDPOINT_URL"]


@contextlib.contextmanager
def moto_server() -> Iterator[ObjectStore]:
    """moto's S3 in a process of its own."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.moto_server", "-H", "127.0.0.1", "-p", str(port)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, "moto_server ended at its start"
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "moto_server does not listen"
            time.sleep(0.1)
        yield _with_bucket(port, "test", "test-secret")
    finally:
        server.terminate()
        server.wait()


def why_no_radosgw() -> str | None:
    """The reason for which `radosgw` cannot be started here."""
    if not _RGW_UP.exists():
        return "needs ../shared/tools/rgw-up, which is not part of the repository"
    if not shutil.which("radosgw"):
        return "needs Debian's ceph-mon ceph-osd ceph-mgr radosgw ceph-common"
    return None


@contextlib.contextmanager
def radosgw(
    folder: Path, within: Sequence[str] = (), address: str = "127.0.0.1"
) -> Iterator[ObjectStore]:
    """Ceph's S3 gateway on a one-machine cluster that keeps its objects in memory.

    within: a command that runs it, as in a network namespace; address: its there.
    """
    # Others on this machine may run it, too: its monitor's fixed port is replaced.
    script, state, port = folder / "rgw-up", folder / "ceph", free_port()
    text = _RGW_UP.read_text().replace("16789", str(free_port()))
    if within:
        text = text.replace("endpoint=127.0.0.1", "endpoint=0.0.0.0")
    script.write_text(text)
    try:
        with open(folder / "rgw-up.log", "w") as log:  # a pipe would stay open in the daemons
            done = subprocess.run(
                [*within, "bash", str(script), str(state), str(port)],
                stdout=log,
                stderr=log,
                timeout=180,
            )
        said = (folder / "rgw-up.log").read_text()
        assert done.returncode == 0, f"rgw-up failed: {said}"
        words = said.split()
        key, secret = (words[words.index(name) + 1] for name in ("key", "secret"))
        yield _with_bucket(port, key, secret, within, address)
    finally:
        _stop([int(p.read_text()) for p in state.glob("run/*.pid") if p.read_text().strip()])


def _stop(pids: list[int]) -> None:
    def alive() -> list[int]:
        commands = {p: Path(f"/proc/{p}/comm") for p in pids}
        return [
            p
            for p, c in commands.items()
            if c.exists() and c.read_text().startswith(("ceph-", "radosgw"))
        ]

    for kind in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        for pid in alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kind)
        while alive() and time.monotonic() < deadline:
            time.sleep(0.1)


def _with_bucket(
    port: int, key: str, secret: str, within: Sequence[str] = (), address: str = "127.0.0.1"
) -> ObjectStore:
    store = ObjectStore(
        f"s3://{_BUCKET}",
        {
            "AWS_ENDPOINT_URL": f"http://{address}:{port}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    )
    make = f"import s3fs; s3fs.S3FileSystem().call_s3('create_bucket', Bucket={_BUCKET!r})"
    subprocess.run(
        [*within, sys.executable, "-c", make], env={**os.environ, **store.environment}, check=True
    )
    return store


# --- faults -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """number: counted from 0 since `FaultProxy.begin`; name: the object's, without its folder."""

    number: int
    method: str
    path: str

    @property
    def name(self) -> str:
        return self.path.partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    reset: the connection is reset (RST) before the request is passed on
    lost: the request is carried out, and the connection reset instead of an answer
    hang: it is never answered          delay: it is answered `seconds` later
    503, 500: it is answered so
    Of the body that a GET is answered with, the part `at` arrives, and then
    break: the connection is reset      cut: it is closed       stall: nothing more comes
    short: the answer ends there and is whole in itself (its Content-Length says so)
    flip: one bit of the next byte is another
    """

    kind: str
    at: float = 0.5
    seconds: float = 0.1


BEFORE = ("reset", "lost", "hang", "delay", "503", "500")
IN_BODY = ("break", "cut", "stall", "short", "flip")

Plan = Callable[[Request], Fault | None]


def first(count: int, kind: str, at: float = 0.5) -> Plan:
    """The first `count` requests fail."""
    return lambda request: Fault(kind, at) if request.number < count else None


def first_of_each(count: int, kind: str, *methods: str) -> Plan:
    """The first `count` requests of each object (of these methods; GET if none is given) fail."""
    seen: Counter[str] = Counter()

    def plan(request: Request) -> Fault | None:
        if request.method not in (methods or ("GET",)):
            return None
        seen[request.name] += 1
        return Fault(kind) if seen[request.name] <= count else None

    return plan


def storm(seed: int, probability: float, *kinds: str) -> Plan:
    """Any request fails with this probability, in one of these ways; equal seeds, equal faults."""

    def plan(request: Request) -> Fault | None:
        draw = random.Random(f"{seed} {request.number}")
        if draw.random() >= probability:
            return None
        return Fault(draw.choice(kinds), draw.random(), draw.random())

    return plan


class FaultProxy:
    """Forwards HTTP to a server, and fails by plan. Bodies are streamed.

    requests: passed through or failed since `begin`; sent: bytes of bodies by object name
    """

    def __init__(self, target: str, port: int = 0) -> None:
        self.target = target.removeprefix("http://")
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), self)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.begin()
        self._serve()

    def begin(self, plan: Plan | None = None) -> None:
        """Count from 0 and fail by `plan` from now on; who still waits for an answer gets none."""
        with self.lock:
            if hasattr(self, "release"):
                self.release.set()
            self.release = threading.Event()
            self.plan = plan or (lambda request: None)
            self.log: list[Request] = []
            self.sent: Counter[str] = Counter()

    @property
    def requests(self) -> int:
        return len(self.log)

    def count(self, method: str, name: str) -> int:
        """How often the object was asked for."""
        with self.lock:
            return sum(r.method == method and r.name == name for r in self.log)

    def register(self, method: str, path: str) -> tuple[Fault | None, threading.Event]:
        with self.lock:
            self.log.append(Request(len(self.log), method, path))
            return self.plan(self.log[-1]), self.release

    def _serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """An outage: open connections end, new ones are refused."""
        self._server.shutdown()
        self._server.server_close()
        self.release.set()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def up(self) -> None:
        """The end of an outage, if there is one."""
        if self._server.socket.fileno() < 0:
            self._server = _Server(("127.0.0.1", self.port), self)
            self._serve()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy

    def shutdown_request(self, request: Any) -> None:
        with self.proxy.lock:
            self.proxy.connections.discard(request)
        request.close()  # no shutdown before: that would end in good order where a reset is due

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed, or servers that are gone


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"  # clients ask for "100 Continue" before they send a body
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server.proxy.lock:
            self.server.proxy.connections.add(self.connection)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _forward(self) -> None:
        fault, release = self.server.proxy.register(self.command, self.path)
        kind = fault.kind if fault else ""
        if kind == "reset":
            return self._reset()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault and kind == "hang":
            release.wait(120)
            return self._reset()
        if fault and kind == "delay":
            time.sleep(fault.seconds)
        if kind in ("503", "500"):
            return self._refuse(int(kind))
        upstream = http.client.HTTPConnection(self.server.proxy.target, timeout=60)
        with contextlib.closing(upstream):
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            if kind == "lost":
                answer.read()
                return self._reset()
            self._answer(answer, fault if kind in IN_BODY else None, release)

    def _refuse(self, status: int) -> None:
        code = {503: "SlowDown", 500: "InternalError"}[status]
        body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(
        self, answer: http.client.HTTPResponse, fault: Fault | None, release: threading.Event
    ) -> None:
        length = answer.getheader("Content-Length")
        size = None if length is None or self.command == "HEAD" else int(length)
        if not (size and self.command == "GET" and answer.status in (200, 206)):
            fault = None
        at = int((size or 0) * fault.at) if fault else 0
        kind = fault.kind if fault else ""
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() in ("transfer-encoding", "connection", "server", "date"):
                continue
            if kind == "flip" and name.lower().startswith("x-amz-checksum"):
                continue  # not all stores send one, with which the client sees it
            short = kind == "short" and name.lower() == "content-length"
            self.send_header(name, str(at) if short else value)
        if size is None and self.command != "HEAD" and answer.status not in (204, 304):
            self.send_header("Connection", "close")  # its end is the end of the connection
        self.end_headers()
        if self.command == "HEAD":
            return
        name = Request(0, self.command, self.path).name
        done = 0
        while data := answer.read1(65536):
            if kind == "flip" and done <= at < done + len(data):
                changed = bytearray(data)
                changed[at - done] ^= 1
                data = bytes(changed)
            elif kind in IN_BODY and kind != "flip":
                data = data[: at - done]
            self.wfile.write(data)
            done += len(data)
            with self.server.proxy.lock:
                self.server.proxy.sent[name] += len(data)
            if kind in IN_BODY and kind != "flip" and done == at:
                break
        if kind == "stall":
            release.wait(120)
        if kind in ("break", "stall"):
            self._reset()
        if kind == "cut":
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass
