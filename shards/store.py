"""Files in a folder or under an s3:// prefix, by URL, with retries around object storage.

A passing fault costs time and nothing else; one that outlasts the deadline, and one that no retry
can mend (no such bucket, access denied, no credentials), ends in one DataError that names the
object. Local files are not retried. Credentials and endpoint come from the usual AWS environment
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …) or files.

Any number of threads may call in here, of any process; forks included (shards/s3.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from shards.errors import DataError
from shards.s3 import endpoint, s3

log = logging.getLogger("lxscale")

T = TypeVar("T")

# One ranged GET or one part of an upload: large enough that latency does not count, small enough
# to repeat cheaply.
_CHUNK = 16 << 20

# Parts of one upload that are under way at once.
_PARTS_AT_ONCE = 4


class NotFoundError(DataError):
    """The object is not there."""


def _deadline() -> float:
    text = os.environ.get("LXSCALE_STORE_DEADLINE", "300")
    try:
        return float(text)
    except ValueError:
        raise DataError(f"LXSCALE_STORE_DEADLINE is {text!r}: give a number of seconds") from None


@dataclass(frozen=True)
class Retry:
    """Full jitter: before attempt n, wait a uniform time up to min(cap, base * 2^n), in seconds.

    deadline: seconds from the first attempt after which a fault is final; the default is
    LXSCALE_STORE_DEADLINE or 300, which outlasts a restarting gateway but not a lost one.
    """

    base: float = 0.2
    cap: float = 20.0
    deadline: float = field(default_factory=_deadline)

    def wait(self, attempt: int) -> float:
        return _jitter.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 30)))

    def attempt_time(self, attempt: int, left: float) -> float:
        """The longest that an attempt may take: a tenth of the deadline, then half as long again
        each time. A request that is never answered leaves time for others, and over a slow line
        the last ones get there."""
        return max(1.0, min(left, self.deadline / 10 * 1.5 ** min(attempt, 30)))


# Not the seeded generator of a training process: all ranks would wait for the same time.
_jitter = random.SystemRandom()


# --- names --------------------------------------------------------------------------------------


def local_path(url: str | Path) -> Path | None:
    """The path of a local URL, None for object storage."""
    text = str(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def join(url: str | Path, *parts: str) -> str:
    """`url` with path parts appended."""
    return "/".join([str(url).rstrip("/"), *parts])


def _call(url: str, until: float, method: str, *args: Any, **options: Any) -> Any:
    """The result of a file system's method on `url`; on S3, not later than `until`."""
    if url.startswith("s3://"):
        key = url.removeprefix("s3://").rstrip("/")
        return s3().run(getattr(s3().file_system(), f"_{method}")(key, *args, **options), until)
    import fsspec

    try:
        fs, key = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"{url} is not a place that can be read or written: {error}") from None
    return getattr(fs, method)(key, *args, **options)


# --- retries ------------------------------------------------------------------------------------


# Answers of a store to requests that were good and may be repeated, though their status is 4xx.
_PASSING = {
    "BadDigest",
    "IncompleteBody",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}


def _final(error: BaseException, url: str) -> DataError | None:
    """The error to raise at once, or None where another attempt may succeed."""
    name, text = type(error).__name__, str(error)
    code, status = _answer(error)
    if code in _PASSING:
        return None
    if code == "NoSuchBucket" or "specified bucket does not exist" in text:
        return DataError(
            f"{url}: the bucket {url.split('/')[2]} does not exist at {endpoint()}: create it, or "
            "correct the URL or AWS_ENDPOINT_URL"
        )
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{url} does not exist")
    if isinstance(error, PermissionError):
        return DataError(
            f"{url}: access denied at {endpoint()} ({code or text}): check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the bucket's policy"
        )
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return DataError(
            f"{url}: no credentials ({text}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "name a profile in AWS_PROFILE"
        )
    if 300 <= status < 500 and status not in (408, 409, 429):
        return DataError(
            f"{url}: refused by {endpoint()} ({code or status}: {text}): check the URL"
        )
    if isinstance(error, OSError) or _is_network_error(error):
        return None
    return DataError(f"{url}: {name}: {text}")


def _answer(error: BaseException) -> tuple[str, int]:
    """The store's error code and HTTP status, where it has answered."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_network_error(error: BaseException) -> bool:
    """Errors of the HTTP client and of boto's core that are not OSErrors."""
    modules = {c.__module__.split(".")[0] for c in type(error).__mro__}
    return bool(modules & {"botocore", "aiobotocore", "aiohttp", "http", "urllib3"})


def retrying(url: str, what: str, action: Callable[[float], T], retry: Retry | None = None) -> T:
    """`action(until)`, repeated with backoff until it succeeds; DataError naming `url` when it
    fails for good. `until`: the time.monotonic() at which an attempt has to end. `what` completes
    "cannot … <url>" in messages."""
    retry = retry or Retry()
    if url.startswith("s3://"):
        s3().file_system()  # the first time, this imports for a second: not the store's fault
    begin, attempt = time.monotonic(), 0
    while True:
        now = time.monotonic()
        try:
            return action(now + retry.attempt_time(attempt, begin + retry.deadline - now))
        except DataError:
            raise
        except Exception as error:
            if final := _final(error, url):
                raise final from error
            cause = error
        spent = time.monotonic() - begin
        if spent >= retry.deadline:
            raise DataError(
                f"cannot {what} {url}: {type(cause).__name__}: {cause} (gave up after "
                f"{attempt + 1} attempts in {spent:.0f} s): check the network and {endpoint()}, "
                "or raise LXSCALE_STORE_DEADLINE"
            ) from cause
        # The last attempt falls on the deadline.
        wait = min(retry.wait(attempt), retry.deadline - spent)
        attempt += 1
        log.warning("cannot %s %s (%s); attempt %d in %.1f s", what, url, cause, attempt + 1, wait)
        time.sleep(wait)


# --- whole objects ------------------------------------------------------------------------------


def read_bytes(url: str, retry: Retry | None = None) -> bytes:
    """The whole object. Raises NotFoundError where it is absent, DataError otherwise."""
    if path := local_path(url):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{path} does not exist") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    first = read_range(url, 0, _CHUNK, retry)
    if len(first) < _CHUNK:
        return first
    target = io.BytesIO(first)
    target.seek(0, io.SEEK_END)
    for begin in range(_CHUNK, size := file_size(url, retry), _CHUNK):
        target.write(read_range(url, begin, min(begin + _CHUNK, size), retry))
    return target.getvalue()


def write_bytes(url: str, data: bytes, retry: Retry | None = None) -> None:
    """Write the whole object at once: a reader sees all of it or nothing."""
    if path := local_path(url):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            try:
                with open(temporary, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from None
        return
    _write(url, len(data), lambda begin, end: data[begin:end], retry)


def upload(path: str | Path, url: str, retry: Retry | None = None) -> None:
    """Copy a local file to object storage; in parts where it is large."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        _write(url, size, lambda begin, end: os.pread(f.fileno(), end - begin, begin), retry)


def _write(
    url: str, size: int, part: Callable[[int, int], bytes], retry: Retry | None = None
) -> None:
    """Write an object of which `part` gives bytes [begin, end). Its parts are retried one by one,
    so a fault repeats at most one; nobody sees the object before it is whole."""
    step = max(_CHUNK, -(-size // 9999))  # S3 takes 10,000 parts
    if size <= step or not url.startswith("s3://"):
        data = part(0, size)
        return retrying(url, "write", lambda until: _call(url, until, "pipe_file", data), retry)
    bucket, _, key = url.removeprefix("s3://").partition("/")

    def call(until: float, method: str, **options: Any) -> dict[str, Any]:
        options |= {"Bucket": bucket, "Key": key}
        answer: dict[str, Any] = s3().run(s3().file_system()._call_s3(method, **options), until)
        return answer

    started = retrying(url, "write", lambda t: call(t, "create_multipart_upload"), retry)
    of = {"UploadId": started["UploadId"]}

    def put(begin: int) -> dict[str, Any]:
        number, data = begin // step + 1, part(begin, min(begin + step, size))

        def action(until: float) -> dict[str, Any]:
            return call(until, "upload_part", PartNumber=number, Body=data, **of)

        return {"PartNumber": number, "ETag": retrying(url, "write", action, retry)["ETag"]}

    try:
        with ThreadPoolExecutor(_PARTS_AT_ONCE, "lxscale-upload") as pool:
            parts = list(pool.map(put, range(0, size, step)))

        def complete(until: float) -> None:
            try:
                call(until, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **of)
            except FileNotFoundError:
                # An attempt whose answer was lost may have completed it.
                if call(until, "head_object")["ETag"].strip('"') != _etag(parts):
                    raise

        retrying(url, "write", complete, retry)
    except BaseException:
        # Parts without an object cost room until somebody removes them.
        with contextlib.suppress(Exception):
            call(0.0, "abort_multipart_upload", **of)
        raise


def _etag(parts: list[dict[str, Any]]) -> str:
    """What S3 calls an object that is made of `parts`."""
    with contextlib.suppress(ValueError):
        digests = b"".join(bytes.fromhex(p["ETag"].strip('"')) for p in parts)
        return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
    return ""


class Target(Protocol):
    def write(self, data: bytes, /) -> Any: ...


def download(url: str, target: Target, size: int | None = None, retry: Retry | None = None) -> None:
    """Copy an object into something that is written to, while it arrives.

    size: bytes to read; None asks the store. A cut connection repeats nothing: the next attempt
    goes on where it broke off. An object that ends early is copied as far as it goes.
    """
    size = file_size(url, retry) if size is None else size
    for begin in range(0, size, _CHUNK):
        end = min(begin + _CHUNK, size)
        if _copy(url, begin, end, target, retry) < end:
            break


def read_range(url: str, begin: int, end: int, retry: Retry | None = None) -> bytes:
    """Bytes [begin, end) of an object, fewer where it ends before."""
    target = io.BytesIO()
    _copy(url, begin, end, target, retry)
    return target.getvalue()


class _TargetError(DataError):
    """What is read cannot be written: no fault of the store's."""


def _copy(url: str, begin: int, end: int, target: Target, retry: Retry | None) -> int:
    """Write bytes [begin, end) of an object to `target`; returns where it ended, before `end` if
    the object does."""
    at = begin

    def action(until: float) -> None:
        nonlocal at
        try:
            for data in _parts(url, at, end, until):
                try:
                    target.write(data)
                except OSError as error:
                    raise _TargetError(str(error)) from error
                at += len(data)
        except OSError as error:
            if _answer(error)[1] != 416 or _size(url, until) > at:
                raise
        # An answer can be short and whole in itself: the object has the last word.
        if at != end and at < (size := _size(url, until)):
            raise OSError(f"{at - begin} bytes came of {min(end, size) - begin} at {begin}")

    try:
        retrying(url, "read", action, retry)
    except _TargetError as error:
        assert error.__cause__
        raise error.__cause__ from None
    return at


def _parts(url: str, begin: int, end: int, until: float) -> Iterator[bytes]:
    """Bytes [begin, end) of an object, as they come."""
    if path := local_path(url):
        try:
            with open(path, "rb") as f:
                f.seek(begin)
                yield f.read(end - begin)
        except OSError as error:
            raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    elif url.startswith("s3://"):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        yield from s3().read(bucket, key, begin, end, until)
    else:
        yield _call(url, until, "cat_file", start=begin, end=end)


def file_size(url: str, retry: Retry | None = None) -> int:
    """Bytes of an object; NotFoundError where it is absent."""
    if path := local_path(url):
        try:
            return path.stat().st_size
        except OSError:
            raise NotFoundError(f"{path} does not exist") from None
    return retrying(url, "look up", lambda until: _size(url, until), retry)


def _size(url: str, until: float) -> int:
    info = _call(url, until, "info")
    if info["type"] != "file":  # a prefix of other objects
        raise FileNotFoundError(url)
    return int(info["size"])


def exists(url: str, retry: Retry | None = None) -> bool:
    """Whether the object is there."""
    try:
        file_size(url, retry)
    except NotFoundError:
        return False
    return True


def list_names(url: str, retry: Retry | None = None) -> list[str]:
    """Names of the files directly in a folder or under a prefix, sorted; empty if there is none."""
    if path := local_path(url):
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if p.is_file())
    key = url.partition("://")[2].rstrip("/")

    def action(until: float) -> list[str]:
        entries = _call(url, until, "ls", detail=True, refresh=True)
        names = (str(e["name"]).rstrip("/") for e in entries if e["type"] == "file")
        return sorted(n.rpartition("/")[2] for n in names if n != key)

    try:
        return retrying(url, "list", action, retry)
    except NotFoundError:
        return []


def delete(url: str, retry: Retry | None = None) -> None:
    """Remove an object; one that is not there is no error."""
    if path := local_path(url):
        path.unlink(missing_ok=True)
        return
    try:
        retrying(url, "delete", lambda until: _call(url, until, "rm_file"), retry)
    except NotFoundError:
        return


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
