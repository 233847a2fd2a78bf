"""Files in a folder or under an s3:// prefix, by URL, with retries around object storage.

A passing fault costs time and nothing else; one that outlasts the deadline, and one that no retry
can mend (no such bucket, access denied, no credentials), ends in one DataError that names the
object. Local files are not retried. Credentials and endpoint come from the usual AWS environment
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …) or files. s3fs is not fork-safe: use threads or spawn.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from shards.errors import DataError

log = logging.getLogger("lxscale")

T = TypeVar("T")

# One ranged GET: large enough that latency does not count, small enough to repeat cheaply.
_CHUNK = 16 << 20


class NotFoundError(DataError):
    """The object is not there."""


@dataclass(frozen=True)
class Retry:
    """Full jitter: before attempt n, wait a uniform time up to min(cap, base * 2^n), in seconds.

    deadline: seconds from the first attempt after which a fault is final; the default is
    LXSCALE_STORE_DEADLINE or 300, which outlasts a restarting gateway but not a lost one.
    """

    base: float = 0.2
    cap: float = 20.0
    deadline: float = float(os.environ.get("LXSCALE_STORE_DEADLINE", "300"))


DEFAULT_RETRY = Retry()


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


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


@cache
def _s3_of_process(pid: int, endpoint: str, key: str | None) -> Any:
    """One file system per process: its connections don't survive a fork."""
    import s3fs

    # Listings are not cached: other writers exist. Retries are ours, within one deadline: those of
    # botocore and s3fs would multiply; s3fs keeps two for the parts of a large upload.
    fs = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 20,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    )
    fs.retries = 2
    return fs


def _remote(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    if url.startswith("s3://"):
        fs = _s3_of_process(os.getpid(), _endpoint(), os.environ.get("AWS_ACCESS_KEY_ID"))
        return fs, url.removeprefix("s3://").rstrip("/")
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"{url} is not a place that can be read or written: {error}") from None


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
    response = getattr(error.__cause__ or error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _PASSING:
        return None
    if code == "NoSuchBucket" or "specified bucket does not exist" in text:
        return DataError(
            f"{url}: the bucket {url.split('/')[2]} does not exist at {_endpoint()}: create it, or "
            "correct the URL or AWS_ENDPOINT_URL"
        )
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{url} does not exist")
    if isinstance(error, PermissionError):
        return DataError(
            f"{url}: access denied at {_endpoint()} ({code or text}): check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the bucket's policy"
        )
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return DataError(
            f"{url}: no credentials ({text}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "name a profile in AWS_PROFILE"
        )
    if 300 <= status < 500 and status not in (408, 409, 429):
        return DataError(
            f"{url}: refused by {_endpoint()} ({code or status}: {text}): check the URL"
        )
    if isinstance(error, OSError | asyncio.TimeoutError) or _is_network_error(error):
        return None
    return DataError(f"{url}: {name}: {text}")


def _is_network_error(error: BaseException) -> bool:
    """Errors of the HTTP client and of boto's core that are not OSErrors."""
    modules = {c.__module__.split(".")[0] for c in type(error).__mro__}
    return bool(modules & {"botocore", "aiobotocore", "aiohttp", "http", "urllib3"})


def retrying(url: str, what: str, action: Callable[[], T], retry: Retry = DEFAULT_RETRY) -> T:
    """`action()`, repeated with backoff until it succeeds; DataError naming `url` when it fails
    for good. `what` completes "cannot … <url>" in messages."""
    begin, attempt = time.monotonic(), 0
    while True:
        try:
            return action()
        except DataError:
            raise
        except Exception as error:
            if final := _final(error, url):
                raise final from error
            cause = error
        wait = random.uniform(0, min(retry.cap, retry.base * 2**attempt))
        spent = time.monotonic() - begin
        wait = min(wait, retry.deadline - spent)  # the last attempt falls on the deadline
        if spent >= retry.deadline:
            raise DataError(
                f"cannot {what} {url}: {type(cause).__name__}: {cause} (gave up after "
                f"{attempt + 1} attempts in {spent:.0f} s): check the network and {_endpoint()}, "
                "or raise LXSCALE_STORE_DEADLINE"
            ) from cause
        attempt += 1
        log.warning("cannot %s %s (%s); attempt %d in %.1f s", what, url, cause, attempt + 1, wait)
        time.sleep(wait)


# --- whole objects ------------------------------------------------------------------------------


def read_bytes(url: str, retry: Retry = DEFAULT_RETRY) -> bytes:
    """The whole object. Raises NotFoundError where it is absent, DataError otherwise."""
    if path := local_path(url):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{path} does not exist") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    fs, key = _remote(url)
    return retrying(url, "read", lambda: bytes(fs.cat_file(key)), retry)


def write_bytes(url: str, data: bytes, retry: Retry = DEFAULT_RETRY) -> None:
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
    fs, key = _remote(url)
    retrying(url, "write", lambda: fs.pipe_file(key, data), retry)


def upload(path: str | Path, url: str, retry: Retry = DEFAULT_RETRY) -> None:
    """Copy a local file to object storage; in parts where it is large."""
    fs, key = _remote(url)
    retrying(url, "write", lambda: fs.put_file(str(path), key), retry)


def download(
    url: str, target: IO[bytes], size: int | None = None, retry: Retry = DEFAULT_RETRY
) -> str:
    """Copy an object into an open file and return its sha256 (hex), computed on the way.

    size: bytes to read; None asks the store. Every range is retried by itself, so a cut
    connection repeats at most one. An object that ends early is copied as far as it goes.
    """
    digest = hashlib.sha256()
    size = file_size(url, retry) if size is None else size
    for begin in range(0, size, _CHUNK):
        data = read_range(url, begin, min(begin + _CHUNK, size), retry)
        digest.update(data)
        target.write(data)
        if len(data) < min(_CHUNK, size - begin):
            break
    return digest.hexdigest()


def read_range(url: str, begin: int, end: int, retry: Retry = DEFAULT_RETRY) -> bytes:
    """Bytes [begin, end) of an object, fewer where it ends before."""
    if path := local_path(url):
        try:
            with open(path, "rb") as f:
                f.seek(begin)
                return f.read(end - begin)
        except OSError as error:
            raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    fs, key = _remote(url)

    def action() -> bytes:
        try:
            return bytes(fs.cat_file(key, start=begin, end=end))
        except OSError as error:
            if "range" in str(error).lower() and file_size(url, retry) <= begin:
                return b""
            raise

    return retrying(url, "read", action, retry)


def file_size(url: str, retry: Retry = DEFAULT_RETRY) -> int:
    """Bytes of an object; NotFoundError where it is absent."""
    if path := local_path(url):
        try:
            return path.stat().st_size
        except OSError:
            raise NotFoundError(f"{path} does not exist") from None
    fs, key = _remote(url)
    return retrying(url, "look up", lambda: int(fs.info(key)["size"]), retry)


def exists(url: str, retry: Retry = DEFAULT_RETRY) -> bool:
    """Whether the object is there."""
    try:
        file_size(url, retry)
    except NotFoundError:
        return False
    return True


def list_names(url: str, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """Names of the files directly in a folder or under a prefix, sorted; empty if there is none."""
    if path := local_path(url):
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if p.is_file())
    fs, key = _remote(url)

    def action() -> list[str]:
        entries = fs.ls(key, detail=True, refresh=True)
        names = (str(e["name"]).rstrip("/") for e in entries if e["type"] == "file")
        return sorted(n.rpartition("/")[2] for n in names if n != key)

    try:
        return retrying(url, "list", action, retry)
    except NotFoundError:
        return []


def delete(url: str, retry: Retry = DEFAULT_RETRY) -> None:
    """Remove an object; one that is not there is no error."""
    if path := local_path(url):
        path.unlink(missing_ok=True)
        return
    fs, key = _remote(url)
    try:
        retrying(url, "delete", lambda: fs.rm_file(key), retry)
    except NotFoundError:
        return


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
