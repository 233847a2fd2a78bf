"""A process's connections to S3: one event loop in a thread, and the file systems on it.

Any number of threads may call in here; their requests share the loop and its connections. A forked
child makes new ones at its first call.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from shards.errors import DataError
from shards.urls import shown

T = TypeVar("T")

# The most bytes that are taken from a connection's buffer at a time.
_READ = 1 << 20

# Of a name or an address; a name that nobody knows may be known later.
_HOST = r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%\w+)?"

_ENDPOINTS = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"


def endpoint() -> str:
    """The address of the store."""
    return next((v for name in _ENDPOINTS if (v := os.environ.get(name))), "AWS")


def _check_endpoint() -> None:
    """Raise DataError where the environment has an endpoint that no request can reach."""
    url = endpoint()
    if url == "AWS":
        return
    name = next(n for n in _ENDPOINTS if os.environ.get(n))
    said, remedy = f"{name} is {shown(url)!r:.200}", "give http(s)://host:port"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        good = parts.scheme in ("http", "https") and re.fullmatch(_HOST, host)
    except ValueError:  # as its port is none
        good = False
    if "@" in url:
        raise DataError(
            f"{said}, with a user's name or a password in it: {remedy}, and credentials in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not good:
        raise DataError(f"{said}, which is no address of a store: {remedy}")


class S3:
    """This process's event loop, which runs in a thread, and its S3 file systems by endpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._file_systems: dict[tuple[str, str | None], Any] = {}

    def file_system(self) -> Any:
        which = endpoint(), os.environ.get("AWS_ACCESS_KEY_ID")
        with self._lock:
            if which not in self._file_systems:
                _check_endpoint()
                self._file_systems[which] = _new_file_system()
            return self._file_systems[which]

    def run(self, call: Coroutine[Any, Any, T], until: float) -> T:
        """The result of `call`. At `until` (time.monotonic) it is cancelled and its connection is
        closed."""
        future, seconds = self._start(call, until)
        try:
            return _result(future, seconds)
        except BaseException:
            future.cancel()  # Ctrl-C ends the request, too
            raise

    def read(
        self, bucket: str, key: str, begin: int, end: int, until: float
    ) -> tuple[int | None, Iterator[bytes]]:
        """The object's size, where the answer says it, and its bytes [begin, end) as they arrive,
        so that the caller writes some of them while others are on their way. They end early where
        the store's answer does."""
        fs = self.file_system()
        size: SimpleQueue[int | None] = SimpleQueue()
        arrived: SimpleQueue[bytes | None] = SimpleQueue()

        async def get() -> None:
            answer = await fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}"
            )
            whole, at = answer.get("ContentRange"), begin
            if whole is None:  # a store that knows no ranges
                size.put(int(answer["ContentLength"]))
                at = 0
            else:
                size.put(int(s) if (s := whole.rpartition("/")[2]).isdecimal() else None)
            async with answer["Body"] as body:
                while at < end and (data := await body.read(_READ)):
                    if wanted := data[max(0, begin - at) : end - at]:
                        arrived.put(wanted)
                    at += len(data)

        def parts() -> Iterator[bytes]:
            try:
                while data := arrived.get():
                    yield data
                _result(future, seconds)
            finally:
                future.cancel()

        def ended(_: Future[None]) -> None:
            size.put(None)
            arrived.put(None)

        future, seconds = self._start(get(), until)
        future.add_done_callback(ended)
        try:
            return size.get(), parts()
        except BaseException:
            future.cancel()  # Ctrl-C ends the request, too
            raise

    def _start(self, call: Coroutine[Any, Any, T], until: float) -> tuple[Future[T], float]:
        """Begin a call; returns its future and the seconds that it may take."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name="lxscale-store", daemon=True
                ).start()
        seconds = max(1.0, until - time.monotonic())
        call = asyncio.wait_for(call, seconds)
        return asyncio.run_coroutine_threadsafe(call, self._loop), seconds

    def close(self) -> None:
        """Close the connections, so that the end of the process is quiet."""

        async def close() -> None:
            for fs in self._file_systems.values():
                await (await fs.set_session()).close()

        if self._loop is not None:
            with contextlib.suppress(Exception):
                self.run(close(), 0.0)


def _result(future: Future[T], seconds: float) -> T:
    try:
        return future.result()
    except TimeoutError as error:
        # Timeouts of the connection have words; ours has none.
        raise TimeoutError(str(error) or f"not done within {seconds:.0f} s") from error


def _new_file_system() -> Any:
    import s3fs

    # Listings are not cached: other writers exist. Retries are ours, within one deadline: those of
    # botocore and s3fs would multiply. Loops are ours: fsspec's does not live through a fork, and
    # its calls end late. A server that says nothing for 20 s has forgotten the request.
    fs = s3fs.S3FileSystem(
        asynchronous=True,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 20,
            "max_pool_connections": 64,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    )
    fs.retries = 1
    return fs


_current = S3()
atexit.register(lambda: _current.close())
_inherited: list[S3] = []


def _begin_anew_in_child() -> None:
    """A forked child has its parent's connections and loop, but not the thread that runs it."""
    global _current
    # It is kept, as closing it would take the parent's sockets out of the epoll that both share.
    _inherited.append(_current)
    _current = S3()


os.register_at_fork(after_in_child=_begin_anew_in_child)


def s3() -> S3:
    """The connections of this process."""
    return _current
