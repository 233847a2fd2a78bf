"""The store's retries and errors against a real server."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shards import store
from shards.errors import DataError
from tests.conftest import FlakyProxy, free_port

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAST = store.Retry(base=0.01, cap=0.05, deadline=20)


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
    target, port = os.environ["AWS_ENDPOINT_URL"], free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    late: list[FlakyProxy] = []

    def start() -> None:
        time.sleep(0.7)
        late.append(FlakyProxy(target, port))
        late[0].serve_forever()

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
