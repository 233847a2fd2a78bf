"""What a store's faults are called, which end at once, what is never shown, what reading costs."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError, NotFoundError, StoreError
from shards.store import objects
from shards.store.cache import cache_folder
from shards.store.create import create_bytes
from shards.store.retry import Retry
from shards.urls import shown
from tests.object_store import FaultProxy, first

CONTENT = np.random.default_rng(0).bytes(3000)
LONG = Retry(base=0.2, cap=0.5, deadline=30)


# --- what no retry mends ------------------------------------------------------------------------

CALLS: dict[str, Callable[[str], object]] = {
    "read": lambda url: objects.read_bytes(url, LONG),
    "exists": lambda url: objects.exists(url, LONG),
    "list": lambda url: objects.list_names(url, LONG),
    "delete": lambda url: objects.delete(url, LONG),
    "write": lambda url: objects.write_bytes(url, b"1", LONG),
    "create": lambda url: create_bytes(url, b"1", LONG),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bad_Bucket!/x", "'bad_Bucket!' is no bucket's name"),
        (f"s3://{'b' * 256}/x", "is no bucket's name"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket//x", "an empty name after the bucket"),
        (f"s3://bucket/{'k' * 1025}", "1024 are the most"),
        ("s3://bucket/\ud800", "not valid Unicode"),
        ("s3:/bucket/x", "no URL of a store"),
        ("~nobody-has-this-name/x", "no user 'nobody-has-this-name'"),
    ],
)
def test_a_name_that_no_store_can_have_is_refused_at_once(
    s3: str, proxy: FaultProxy, call: str, url: str, words: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        CALLS[call](url)
    assert not isinstance(caught.value, StoreError | NotFoundError)
    assert_short(str(caught.value))
    assert time.monotonic() - begin < 5 and proxy.requests == 0


def assert_short(line: str) -> None:
    assert len(line) < 300 and "\n" not in line and "regex" not in line


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    objects.write_bytes("~/a/x", b"1")
    assert (tmp_path / "a" / "x").read_bytes() == b"1" == objects.read_bytes("~/a/x")
    monkeypatch.setenv("LXSCALE_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    assert cache_folder("~/b") == tmp_path / "b"


def test_a_bucket_is_no_object(s3: str) -> None:
    for url in (s3, f"{s3}/"):
        objects.list_names(url, LONG)
        for call in ("read", "exists", "delete", "write", "create"):
            with pytest.raises(DataError, match="names a bucket and no object"):
                CALLS[call](url)


@pytest.mark.parametrize(
    "endpoint",
    [
        *("localhost:9000", "nonsense", "http://", "http://:80", "http://host:port", "http://[::1"),
        *("http://127.0.0.1:99999", "ftp://127.0.0.1", "http://a b/", "s3://bucket"),
    ],
)
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_no_address_is_refused_by_name(
    s3: str, endpoint: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, endpoint)
    begin = time.monotonic()
    for call in CALLS.values():
        with pytest.raises(DataError, match=f"^{variable} is '{re.escape(endpoint)}'") as caught:
            call("s3://bucket/x")
        assert_short(str(caught.value))
    assert time.monotonic() - begin < 5


def test_tls_to_a_server_without_is_refused_at_once(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url.replace("http:", "https:"))
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"no TLS with https://127\.0\.0\.1") as caught:
        objects.read_bytes(f"{s3}/x", LONG)
    assert not isinstance(caught.value, StoreError) and time.monotonic() - begin < 10


def test_an_unknown_host_may_be_known_later(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    with pytest.raises(StoreError, match=r"gave up after \d+ attempt"):
        objects.read_bytes(f"{s3}/x", Retry(base=0.05, cap=0.1, deadline=0.3))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "soon", "", "1e300"])
def test_a_deadline_that_is_no_time_is_refused_by_name(
    s3: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", value)
    with pytest.raises(DataError, match=rf"LXSCALE_STORE_DEADLINE is '{value}': give a number of"):
        objects.read_bytes(f"{s3}/x")


# --- what was tried -----------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [0.0, 0.6])
def test_an_error_counts_the_requests_that_were_made(
    s3: str, proxy: FaultProxy, deadline: float
) -> None:
    objects.exists(f"{s3}/x")  # the first call makes the client, for longer than an attempt has
    for call in (objects.read_bytes, objects.file_size, objects.list_names, objects.delete):
        proxy.begin(first(10**9, "503"))
        with pytest.raises(StoreError) as caught:
            call(f"{s3}/x", Retry(base=0.3, cap=0.3, deadline=deadline))
        said = re.search(r"gave up after (\d+) (attempts?) in (\d+\.\d) s", str(caught.value))
        assert said, str(caught.value)
        assert int(said[1]) == proxy.requests
        assert said[2] == ("attempt" if proxy.requests == 1 else "attempts")
        assert deadline - 0.06 <= float(said[3]) < deadline + 5


# --- what is never shown ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("https://user:pass@host/x", "https://…@host/x"),
        ("s3://KEY:a/b+c@d@bucket/x", "s3://…@bucket/x"),
        ("s3://KEY:12/pass@bucket/x", "s3://…@bucket/x"),
        ("s3://KEY@bucket/x", "s3://…@bucket/x"),
        ("cannot read http://u:pass@h:1/x, twice", "cannot read http://…@h:1/x, twice"),
        ('at "http://u:pass@h:1/x": no', 'at "http://…@h:1/x": no'),
        ("https://h/x?X-Amz-Signature=pass&a=b: no", "https://h/x?…: no"),
        ("https://h/x#token=pass", "https://h/x#…"),
        # Nothing of that.
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("http://host:9000/a@b.tar", "http://host:9000/a@b.tar"),
        ("s3://bucket/what?.tar", "s3://bucket/what?.tar"),
        ("/data/a:b@c?d=e", "/data/a:b@c?d=e"),
        ("s3://b/x: asked by me@home", "s3://b/x: asked by me@home"),
    ],
)
def test_urls_are_shown_without_secrets(text: str, what: str) -> None:
    assert shown(text) == what and "pass" not in what
    assert shown(what) == what
    assert str(DataError(text)) == what


def test_a_log_and_an_error_of_a_retry_show_no_password(
    s3: str, monkeypatch: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    retry = Retry(base=0.05, cap=0.1, deadline=0.3)
    urls = ("https://user:hunter2@127.0.0.1:1/x?token=hunter2", f"s3://key:hunter2@{s3[5:]}/x")
    for url in urls:
        with pytest.raises(DataError) as caught:
            objects.read_bytes(url, retry)
        assert "hunter2" not in str(caught.value) and "…@" in str(caught.value)
    assert said and not any("hunter2" in r.getMessage() for r in said)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2/x@127.0.0.1:1")
    with pytest.raises(
        DataError, match=r"AWS_ENDPOINT_URL is .*user's name or a password"
    ) as caught:
        objects.read_bytes(f"{s3}/x", LONG)
    assert "hunter2" not in str(caught.value)


# --- what reading costs -------------------------------------------------------------------------


def test_a_small_object_costs_one_request(s3: str, proxy: FaultProxy, tmp_path: Path) -> None:
    url = f"{s3}/small"
    objects.write_bytes(url, CONTENT)
    proxy.begin()
    assert objects.read_bytes(url) == CONTENT
    assert proxy.requests == 1
    with open(tmp_path / "copy", "wb") as f:
        objects.download(url, f)
    assert (tmp_path / "copy").read_bytes() == CONTENT and proxy.requests == 2
    assert objects.read_range(url, 2990, 5000) == CONTENT[2990:] and proxy.requests == 3
    with pytest.raises(NotFoundError):
        objects.read_bytes(f"{s3}/absent")
    assert proxy.requests == 4


@contextmanager
def store(content: bytes, kind: str) -> Iterator[tuple[str, list[str]]]:
    """A server with one object at every path, and the methods that it was asked by.

    strict: it refuses ranges that end beyond the object's end; whole: it knows no ranges;
    unsized: it does not say the object's size with a range; denied: it refuses all
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.command)
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            begin, end = (int(span[1]), int(span[2]) + 1) if span else (0, len(content))
            status, data = 200, content
            if kind == "denied":
                status, data = 403, b""
            elif span and kind != "whole":
                beyond = begin >= len(content) or (kind == "strict" and end > len(content))
                status, data = (416, b"") if beyond else (206, content[begin:end])
            self.send_response(status)
            if status == 206:
                size = "*" if kind == "unsized" else len(content)
                self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{size}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["lax", "strict", "whole", "unsized"])
@pytest.mark.parametrize("size", [0, 1, 700, 1400, 3000])
def test_any_store_is_read(s3: str, kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_CHUNK", 700)
    content, retry = CONTENT[:size], Retry(base=0.01, cap=0.05, deadline=5)
    with store(content, kind) as (url, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert objects.read_bytes("s3://bucket/x", retry) == content
        if kind == "lax" and size:
            assert asked == ["GET"] * -(-size // 700)
        for begin, end in ((0, 10), (500, 900), (2999, 3001), (4000, 5000)):
            assert objects.read_range("s3://bucket/x", begin, end, retry) == content[begin:end]


def test_a_web_server_that_refuses_is_not_asked_again() -> None:
    with store(b"", "denied") as (url, asked):
        begin = time.monotonic()
        with pytest.raises(DataError, match=rf"{url}/x: refused by {url} \(403") as caught:
            objects.read_bytes(f"{url}/x", LONG)
        assert not isinstance(caught.value, StoreError)
        assert time.monotonic() - begin < 10 and len(asked) <= 2
