"""The store's retries and errors against a real server."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3fs
from _pytest.mark import ParameterSet

from shards.errors import DataError, NotFoundError, StoreError
from shards.store import objects
from shards.store.retry import Retry, retrying
from tests.conftest import subprocess_environment
from tests.object_store import (
    BEFORE,
    IN_BODY,
    Fault,
    FaultProxy,
    ObjectStore,
    Request,
    first,
    storm,
)

CONTENT = np.random.default_rng(0).bytes(300_000)
FAST = Retry(base=0.01, cap=0.05, deadline=20)
SHORT = Retry(base=0.01, cap=0.05, deadline=0.5)


def downloaded(url: str, size: int | None = None, retry: Retry | None = None) -> bytes:
    target = io.BytesIO()
    objects.download(url, target, size, retry)
    return target.getvalue()


@pytest.fixture
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """As everywhere, but a real gateway's in `make test-faults`."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    return server.bucket


def test_objects_in_a_folder(tmp_path: Path) -> None:
    check_objects(str(tmp_path))


def test_objects_on_s3(s3: str) -> None:
    check_objects(f"{s3}/objects")


def check_objects(base: str) -> None:
    url = objects.join(base, "deep", "a.bin")
    assert not objects.exists(url) and objects.list_names(objects.join(base, "deep")) == []
    with pytest.raises(NotFoundError, match=r"a.bin does not exist"):
        objects.read_bytes(url)
    objects.write_bytes(url, CONTENT)
    objects.write_bytes(objects.join(base, "deep", "er", "b"), b"")
    assert objects.exists(url) and objects.file_size(url) == len(CONTENT)
    assert objects.read_bytes(url) == CONTENT
    assert objects.read_bytes(objects.join(base, "deep", "er", "b")) == b""
    assert objects.list_names(objects.join(base, "deep")) == ["a.bin"]
    assert objects.read_range(url, 10, 20) == CONTENT[10:20]
    assert objects.read_range(url, len(CONTENT) - 2, len(CONTENT) + 9) == CONTENT[-2:]
    assert downloaded(url) == CONTENT
    objects.delete(url)
    objects.delete(url)
    assert not objects.exists(url)


def test_downloads_in_ranges(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.write_bytes(f"{s3}/ranges", CONTENT)
    monkeypatch.setattr(objects, "_CHUNK", 70_000)
    for size in (None, len(CONTENT), len(CONTENT) + 100_000):  # the last: an object that is short
        assert downloaded(f"{s3}/ranges", size) == CONTENT


def test_large_uploads_go_in_parts(s3: str, tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(110 << 20)
    (tmp_path / "big").write_bytes(content)
    objects.upload(tmp_path / "big", f"{s3}/big")
    assert downloaded(f"{s3}/big") == content
    objects.delete(f"{s3}/big")


# How many requests fail in a row; those that take time are few.
FAILING = dict.fromkeys((*BEFORE, *IN_BODY), 6) | {"hang": 1, "stall": 1, "delay": 3}


def mostly(quick: str, kinds: Iterable[str]) -> list[ParameterSet]:
    """All kinds for `make test-faults`, those in `quick` for `make test`, too."""
    long = pytest.mark.faults
    return [pytest.param(k, marks=[] if k in quick.split() else long) for k in kinds]


@pytest.mark.parametrize(
    "kind", mostly("reset lost hang 503 cut short", [k for k in FAILING if k != "flip"])
)
def test_passing_faults_cost_time_only(
    s3: str, proxy: FaultProxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, count = f"{s3}/{kind}", FAILING[kind]
    if kind in BEFORE:
        proxy.begin(first(count, kind))
    retry = Retry(base=0.01, cap=0.05, deadline=8 if kind in ("hang", "stall") else 30)
    objects.write_bytes(url, CONTENT, retry)
    monkeypatch.setattr(objects, "_CHUNK", 70_000)
    proxy.begin(first(count, kind))
    assert downloaded(url, len(CONTENT), retry) == CONTENT
    assert proxy.requests > count
    proxy.begin(first(count, kind))
    assert objects.read_bytes(url, retry) == CONTENT


@pytest.mark.parametrize(
    "kind",
    mostly("down hang stall short", ["down", *(k for k in FAILING if k not in ("delay", "flip"))]),
)
def test_a_long_outage_ends_in_one_error_at_the_deadline(
    s3: str, proxy: FaultProxy, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{s3}/outage-{kind}"
    objects.write_bytes(url, CONTENT)
    if kind == "down":
        proxy.down()
    else:
        proxy.begin(first(10**9, kind))
    retry = Retry(base=0.05, cap=0.2, deadline=1.5)
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"cannot read {url}: .*gave up after \d+ attempts"):
        objects.download(url, io.BytesIO(), len(CONTENT), retry)
    assert 1.4 < time.monotonic() - begin < 10
    assert "attempt 2 in" in caplog.text
    if kind == "down":
        with pytest.raises(DataError, match=f"cannot write {url}: "):
            objects.write_bytes(url, CONTENT, retry)
        with pytest.raises(DataError, match=f"cannot look up {url}: "):
            objects.exists(url, retry)
    if kind == "down":
        proxy.up()
    proxy.begin()
    assert objects.read_bytes(url) == CONTENT


def test_the_deadline_comes_from_the_environment(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "1.5")
    proxy.down()
    with pytest.raises(DataError, match="or raise LXSCALE_STORE_DEADLINE"):
        objects.read_bytes(f"{s3}/x")
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "soon")
    with pytest.raises(DataError, match="LXSCALE_STORE_DEADLINE is 'soon': give a number"):
        objects.read_bytes(f"{s3}/x")


def test_an_absent_server_is_waited_for(s3: str, proxy: FaultProxy) -> None:
    proxy.down()
    timer = threading.Timer(0.7, proxy.up)
    timer.start()
    objects.write_bytes(f"{s3}/late", b"1", Retry(base=0.05, cap=0.2, deadline=20))
    timer.join()
    assert objects.read_bytes(f"{s3}/late") == b"1"


def test_threads_in_a_storm_block_one_another_by_nothing(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.write_bytes(f"{s3}/storm", CONTENT)
    monkeypatch.setattr(objects, "_CHUNK", 70_000)
    kinds = [k for k in FAILING if k != "flip"]
    proxy.begin(storm(7, 0.4, *kinds))
    retry = Retry(base=0.01, cap=0.05, deadline=10)

    def fetch(_: int) -> bytes:
        return downloaded(f"{s3}/storm", len(CONTENT), retry)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, range(12))) == [CONTENT] * 12
    # Requests that were given up hold no connection that others wait for.
    answering = threading.Event()
    proxy.begin(lambda request: None if answering.is_set() else Fault("hang"))
    with ThreadPoolExecutor(100) as pool:
        given_up = [pool.submit(objects.read_bytes, f"{s3}/storm", SHORT) for _ in range(100)]
        assert {type(future.exception()) for future in given_up} == {StoreError}
    answering.set()
    assert objects.read_bytes(f"{s3}/storm", Retry(deadline=5)) == CONTENT


@pytest.mark.parametrize("kind", mostly("lost 503", ["lost", "reset", "503", "hang"]))
def test_parts_of_an_upload_are_repeated_by_themselves(
    s3: str, proxy: FaultProxy, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_CHUNK", 5 << 20)
    content = np.random.default_rng(1).bytes(12 << 20)
    (tmp_path / "big").write_bytes(content)
    url = f"{s3}/{tmp_path.name}/big-{kind}"
    failed: set[str] = set()

    def once(request: Request) -> Fault | None:
        """The start, every part and the completion fail at their first attempt."""
        which = request.method + request.path.partition("uploadId")[0]
        failed.add(which) if (new := which not in failed) else None
        return Fault(kind) if new else None

    proxy.begin(once)
    # A tenth of the deadline is an attempt's: ample for all but what never answers.
    deadline = 10 if kind == "hang" else 60
    objects.upload(tmp_path / "big", url, Retry(base=0.01, cap=0.05, deadline=deadline))
    assert sum(r.method == "PUT" for r in proxy.log) == 6
    proxy.begin()
    assert downloaded(url) == content


def test_an_upload_that_fails_leaves_nothing(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_CHUNK", 5 << 20)
    url = f"{s3}/failed/big"
    proxy.begin(lambda request: Fault("503") if "partNumber=2" in request.path else None)
    with pytest.raises(DataError, match=f"cannot write {url}: .*not now"):
        objects.write_bytes(url, bytes(12 << 20), Retry(base=0.1, cap=0.2, deadline=2))
    assert not objects.exists(url)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket = s3.removeprefix("s3://")
    found = fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    used = " ".join(r.path for r in proxy.log if r.method == "PUT")
    assert "uploadId" in used and not [u for u in found if u["UploadId"] in used]


FORKING = """
import multiprocessing, os, sys, threading
from shards.store import objects
url, how = sys.argv[1:]
content = objects.read_bytes(url)
busy, stop = threading.Event(), threading.Event()

def load():
    while not stop.is_set():
        assert objects.read_bytes(url) == content
        busy.set()

threads = [threading.Thread(target=load) for _ in range(3)]
for t in threads:
    t.start()
busy.wait()
if how == "fork":
    for _ in range(3):
        if (pid := os.fork()) == 0:
            assert objects.read_bytes(url) == content
            if os.fork() == 0:
                assert objects.read_bytes(url) == content
                os._exit(0)
            assert os.wait()[1] == 0
            sys.exit(0)  # with all that the interpreter does at its end
        assert os.waitpid(pid, 0)[1] == 0
else:
    with multiprocessing.get_context(how).Pool(1) as pool:
        assert pool.apply(objects.read_bytes, (url,)) == content
stop.set()
for t in threads:
    t.join()
assert objects.read_bytes(url) == content
"""


@pytest.mark.parametrize("how", mostly("fork", ["fork", "spawn", "forkserver"]))
def test_children_of_a_process_that_uses_s3(s3: str, how: str) -> None:
    objects.write_bytes(f"{s3}/parent", CONTENT)
    done = subprocess.run(
        [sys.executable, "-c", FORKING, f"{s3}/parent", how],
        env=subprocess_environment(LXSCALE_STORE_DEADLINE="20"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_faults_that_no_retry_mends_are_clear_at_once(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = time.monotonic()
    for call in (
        lambda: objects.read_bytes("s3://absent-bucket/x"),
        lambda: objects.write_bytes("s3://absent-bucket/x", b""),
        lambda: objects.list_names("s3://absent-bucket/x"),
    ):
        with pytest.raises(
            DataError, match=r"absent-bucket/x: the bucket .* does not exist at http"
        ):
            call()
    with pytest.raises(DataError, match="xyz://a/b is not a place"):
        objects.read_bytes("xyz://a/b")
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

    def action(until: float) -> str:
        calls.append(1)
        if len(calls) > 2:
            return "done"
        raise kind(code) from _ClientError(code, status)

    if message is None:
        assert retrying("s3://b/x", "read", action, FAST) == "done"
        return
    with pytest.raises(DataError, match=message):
        retrying("s3://b/x", "read", action, FAST)
    assert len(calls) == 1


def test_denied_for_real(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"cannot write {path}/x"):
        objects.write_bytes(f"{path}/x", b"")
