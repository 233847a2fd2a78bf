"""Fixtures that several test files share."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from shards.record import ImageRecord, Labels, Sentence

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample files that lies beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not part of the repository")
    return SHARED / "data"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of a bucket on a moto server of its own; exports endpoint and credentials."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        try:
            _make_bucket("lxscale-test", server, port)
            yield "s3://lxscale-test"
        finally:
            server.terminate()
            server.wait()


def _make_bucket(name: str, server: subprocess.Popen[bytes], port: int) -> None:
    import s3fs

    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "moto_server ended at its start"
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < deadline, "moto_server does not listen"
        time.sleep(0.1)
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)


class FlakyProxy(ThreadingHTTPServer):
    """Forwards to the S3 server; the first `fail` requests get a 503, or a body that breaks off."""

    daemon_threads = True

    allow_reuse_address = True

    def __init__(self, target: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), ProxyHandler)
        self.target = target.removeprefix("http://")
        self.fail, self.kind, self.requests = 0, "503", 0
        self.lock = threading.Lock()


class ProxyHandler(BaseHTTPRequestHandler):
    server: FlakyProxy
    protocol_version = "HTTP/1.1"  # clients ask for "100 Continue" before they send a body

    def _forward(self) -> None:
        with self.server.lock:
            failing = self.server.requests < self.server.fail
            self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if failing and self.server.kind == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(self.server.target)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            cut = failing and self.command == "GET"
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    server = FlakyProxy(os.environ["AWS_ENDPOINT_URL"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    server.server_close()


MakeRecords = Callable[..., list[ImageRecord]]


def small_records(
    n: int, labels: bool = False, feature_dim: int = 8, seed: int = 0
) -> list[ImageRecord]:
    """n image records, of which the questions have answers and the captions have none."""
    rng = np.random.default_rng(seed)
    words = ["a", "red", "green", "blue", "small", "circle", "line", "on", "the", "left"]
    records = []
    for i in range(n):
        objects = int(rng.integers(1, 5))
        corners = np.sort(rng.random((objects, 2, 2)), axis=1).reshape(objects, 4)
        captions = [
            Sentence(" ".join(rng.choice(words, size=int(rng.integers(1, 9)))), "coco_cap")
            for _ in range(int(rng.integers(0, 3)))
        ]
        color = str(rng.choice(["red", "green", "blue"]))
        questions = [Sentence(f"what color is it {i}?", "vqa", {color: 1.0, "rare": 0.3}, i)]
        records.append(
            ImageRecord(
                image=f"pictures/image {i}.png",
                width=640,
                height=480,
                boxes=corners.astype(np.float32),
                features=rng.random((objects, feature_dim)).astype(np.float16),
                sentences=(*captions, *questions),
                labels=Labels(
                    rng.integers(0, 1600, objects).astype(np.int32),
                    rng.random(objects, dtype=np.float32),
                    rng.integers(0, 400, objects).astype(np.int32),
                    rng.random(objects, dtype=np.float32),
                )
                if labels
                else None,
            )
        )
    return records


@pytest.fixture(scope="session")
def make_records() -> MakeRecords:
    """`small_records`, for tests."""
    return small_records


def subprocess_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process that imports the packages of this repository."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **changes}
