"""The store's retries and errors, and the cache's promises, against a real server."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import subprocess_environment

from shards import cache, store
from shards.cache import local_file, write_once
from shards.errors import DataError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAST = store.Retry(base=0.01, cap=0.05, deadline=20)


class FlakyProxy(ThreadingHTTPServer):
    """Forwards to the S3 server; the first `fail` requests get a 503, or a body that breaks off."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target.removeprefix("http://")
        self.fail, self.kind, self.requests = 0, "503", 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
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


# --- store --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "s3"])
def test_objects(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = str(tmp_path) if where == "local" else request.getfixturevalue("s3") + "/objects"
    url = store.join(base, "deep", "a.bin")
    assert not store.exists(url) and store.list_names(store.join(base, "deep")) == []
    with pytest.raises(store.NotFoundError, match=r"a.bin does not exist"):
        store.read_bytes(url)
    store.write_bytes(url, CONTENT)
    store.write_bytes(store.join(base, "deep", "er", "b"), b"")
    assert store.exists(url) and store.file_size(url) == len(CONTENT)
    assert store.read_bytes(url) == CONTENT
    assert store.read_bytes(store.join(base, "deep", "er", "b")) == b""
    assert store.list_names(store.join(base, "deep")) == ["a.bin"]
    assert store.read_range(url, 10, 20) == CONTENT[10:20]
    assert store.read_range(url, len(CONTENT) - 2, len(CONTENT) + 9) == CONTENT[-2:]
    target = io.BytesIO()
    assert store.download(url, target) == SHA256 and target.getvalue() == CONTENT
    store.delete(url)
    store.delete(url)
    assert not store.exists(url)


def test_downloads_in_ranges(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_CHUNK", 70_000)
    store.write_bytes(f"{s3}/ranges", CONTENT)
    for size in (None, len(CONTENT), len(CONTENT) + 100_000):  # the last: an object that is short
        target = io.BytesIO()
        assert store.download(f"{s3}/ranges", target, size) == SHA256
        assert target.getvalue() == CONTENT


def test_large_uploads_go_in_parts(s3: str, tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(110 << 20)
    (tmp_path / "big").write_bytes(content)
    store.upload(tmp_path / "big", f"{s3}/big")
    target = io.BytesIO()
    assert store.download(f"{s3}/big", target) == hashlib.sha256(content).hexdigest()
    store.delete(f"{s3}/big")


@pytest.mark.parametrize("kind", ["503", "cut"])
def test_passing_faults_cost_time_only(
    s3: str, proxy: FlakyProxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_CHUNK", 70_000)
    proxy.kind = kind
    if kind == "503":
        proxy.fail = 12
    store.write_bytes(f"{s3}/{kind}", CONTENT, FAST)
    proxy.requests, proxy.fail = 0, 12
    target = io.BytesIO()
    assert store.download(f"{s3}/{kind}", target, len(CONTENT), FAST) == SHA256
    assert proxy.requests > 12
    proxy.requests, proxy.fail = 0, 5
    assert store.read_bytes(f"{s3}/{kind}", FAST) == CONTENT


def test_a_long_outage_ends_in_one_error_at_the_deadline(
    s3: str, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fail = 10**9
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"cannot read {s3}/x: .*gave up after \d+ attempts"):
        store.read_bytes(f"{s3}/x", store.Retry(base=0.05, cap=0.2, deadline=1.5))
    assert 1.4 < time.monotonic() - begin < 10
    assert "attempt 2 in" in caplog.text


def test_an_absent_server_is_waited_for(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = os.environ["AWS_ENDPOINT_URL"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    late: list[FlakyProxy] = []

    def start() -> None:
        time.sleep(0.7)
        FlakyProxy.allow_reuse_address = True
        server = FlakyProxy.__new__(FlakyProxy)
        ThreadingHTTPServer.__init__(server, ("127.0.0.1", port), _Handler)
        server.target, server.fail, server.requests = target.removeprefix("http://"), 0, 0
        server.kind, server.lock = "503", threading.Lock()
        late.append(server)
        server.serve_forever()

    threading.Thread(target=start, daemon=True).start()
    store.write_bytes(f"{s3}/late", b"1", store.Retry(base=0.05, cap=0.2, deadline=20))
    late[0].shutdown()
    late[0].server_close()


def test_faults_that_no_retry_mends_are_clear_at_once(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = time.monotonic()
    for call in (
        lambda: store.read_bytes("s3://absent-bucket/x"),
        lambda: store.write_bytes("s3://absent-bucket/x", b""),
        lambda: store.list_names("s3://absent-bucket/x"),
    ):
        with pytest.raises(
            DataError, match=r"absent-bucket/x: the bucket .* does not exist at http"
        ):
            call()
    with pytest.raises(DataError, match="xyz://a/b is not a place"):
        store.read_bytes("xyz://a/b")
    assert time.monotonic() - begin < 5


class _ClientError(Exception):
    """Shaped as botocore's."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("kind", "code", "status", "message"),
    [
        (PermissionError, "AccessDenied", 403, "s3://b/x: access denied .*AWS_ACCESS_KEY_ID"),
        (PermissionError, "SignatureDoesNotMatch", 403, "access denied"),
        (OSError, "AuthorizationHeaderMalformed", 400, "refused by .*AuthorizationHeaderMalf"),
        (OSError, "SlowDown", 503, None),
        (OSError, "InternalError", 500, None),
        (OSError, "RequestTimeout", 400, None),
        (FileNotFoundError, "NoSuchUpload", 404, None),
    ],
)
def test_which_answers_are_final(
    kind: type[OSError], code: str, status: int, message: str | None
) -> None:
    calls = []

    def action() -> str:
        calls.append(1)
        if len(calls) > 2:
            return "done"
        raise kind(code) from _ClientError(code, status)

    if message is None:
        assert store.retrying("s3://b/x", "read", action, FAST) == "done"
        return
    with pytest.raises(DataError, match=message):
        store.retrying("s3://b/x", "read", action, FAST)
    assert len(calls) == 1


def test_denied_for_real(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"cannot write {path}/x"):
        store.write_bytes(f"{path}/x", b"")


# --- cache --------------------------------------------------------------------------------------


@pytest.fixture
def remote(s3: str, tmp_path: Path) -> str:
    url = f"{s3}/{tmp_path.name}/object"
    store.write_bytes(url, CONTENT)
    return url


def fetch(url: str, folder: Path) -> Path:
    return local_file(url, SHA256, len(CONTENT), folder)


def test_fetched_once_and_verified_once(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    real = cache.hash_file
    monkeypatch.setattr(cache, "hash_file", lambda path: hashed.append(path) or real(path))
    path = fetch(remote, tmp_path)
    assert path.name == SHA256 and path.read_bytes() == CONTENT
    store.delete(remote)
    assert fetch(remote, tmp_path) == path
    assert len(hashed) == 1  # when first opened, and not again while it is unchanged
    assert [p.name for p in (tmp_path / "files").iterdir()] == [SHA256]
    os.utime(path)
    fetch(remote, tmp_path)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cached_file_is_set_aside_and_fetched_again(
    remote: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(remote, tmp_path)
    bad = {"flip": b"\0" + CONTENT[1:], "cut": CONTENT[:-1], "empty": b""}[damage]
    path.write_bytes(bad)
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert path.with_suffix(".damaged").read_bytes() == bad
    assert "set aside" in caplog.text


def test_wrong_content_upstream_is_an_error_that_names_it(remote: str, tmp_path: Path) -> None:
    for bad in (b"\0" + CONTENT[1:], CONTENT[:-1]):
        store.write_bytes(remote, bad)
        with pytest.raises(DataError, match=f"{remote} does not have the content"):
            fetch(remote, tmp_path)
        assert not (tmp_path / "files" / SHA256).exists()
    store.delete(remote)
    with pytest.raises(DataError, match=f"{remote} does not exist"):
        fetch(remote, tmp_path)
    store.write_bytes(remote, CONTENT)
    assert fetch(remote, tmp_path).read_bytes() == CONTENT


def test_dead_processes_leave_no_obstacle(remote: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "locks").mkdir()
    stale = tmp_path / "files" / f".{SHA256}.deadbeef.tmp"
    stale.write_bytes(CONTENT[:100])
    (tmp_path / "locks" / SHA256).touch()
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert not stale.exists()


def test_a_process_killed_while_it_fetches(s3: str, proxy: FlakyProxy, tmp_path: Path) -> None:
    url = f"{s3}/killed/object"
    store.write_bytes(url, CONTENT)
    proxy.requests, proxy.fail = 0, 10**9  # the child retries until it is killed
    child = subprocess.Popen(
        [sys.executable, "-c", WORKER, url, SHA256, str(len(CONTENT)), str(tmp_path)],
        env=subprocess_environment(),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not proxy.requests:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert list((tmp_path / "files").glob("*.tmp")) + list((tmp_path / "files").glob(".*.tmp"))
    child.kill()
    child.wait()
    proxy.fail = 0
    assert fetch(url, tmp_path).read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "files").iterdir()] == [SHA256]


WORKER = """
import sys
from pathlib import Path
from shards.cache import local_file
path = local_file(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
assert path.stat().st_size == int(sys.argv[3])
"""


def test_one_download_however_many_processes(s3: str, proxy: FlakyProxy, tmp_path: Path) -> None:
    url = f"{s3}/crowd/object"
    store.write_bytes(url, CONTENT)
    proxy.requests = 0
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, SHA256, str(len(CONTENT)), str(tmp_path)],
            env=subprocess_environment(),
        )
        for _ in range(4)
    ]
    assert [c.wait() for c in children] == [0] * 4
    assert proxy.requests == 1
    assert [p.name for p in (tmp_path / "files").iterdir()] == [SHA256]


def test_local_files_are_verified_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "shard.tar", tmp_path / "cache"
    path.write_bytes(CONTENT)
    assert fetch(str(path), folder) == path
    assert not (folder / "files").exists()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "hash_file", lambda path: pytest.fail("hashed again"))
        assert fetch(str(path), folder) == path
    path.write_bytes(b"\0" + CONTENT[1:])
    with pytest.raises(DataError, match=f"{path} is damaged: sha256"):
        fetch(str(path), folder)
    path.write_bytes(CONTENT[1:])
    with pytest.raises(DataError, match=f"{path} is damaged: 299999 bytes instead of 300000"):
        fetch(str(path), folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} does not exist"):
        fetch(str(path), folder)
    monkeypatch.chdir(tmp_path)
    path.write_bytes(CONTENT)
    assert fetch("shard.tar", folder).is_absolute()


def test_a_marker_belongs_to_one_expected_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    fetch(str(path), tmp_path / "cache")
    with pytest.raises(DataError, match="is damaged"):
        local_file(str(path), "0" * 64, len(CONTENT), tmp_path / "cache")


def test_write_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "x"
    built: list[Path] = []

    def broken(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("stop")

    def whole(temporary: Path) -> None:
        built.append(temporary)
        temporary.write_bytes(b"whole")

    with pytest.raises(RuntimeError, match="stop"):
        write_once(path, broken)
    assert not path.exists()
    threads = [threading.Thread(target=write_once, args=(path, whole)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert path.read_bytes() == b"whole" and len(built) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["locks", "x"]


def test_an_unusable_cache_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    with pytest.raises(DataError, match="LXSCALE_CACHE"):
        fetch(str(path), tmp_path / "file")
