"""Files in a folder or under an s3:// prefix, by URL, with retries around object storage.

A passing fault costs time and nothing else; one that outlasts the deadline, and one that no retry
can mend (no such bucket, access denied, no credentials), ends in one DataError that names the
object. Local files are not retried. Credentials and endpoint come from the usual AWS environment
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …) or files.

Any number of threads may call in here, of any process; forks included (shards/store/s3.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.errors import DataError, NotFoundError
from shards.store.atomic import written_whole
from shards.store.places import bucket_and_key, expanded
from shards.store.retry import Retry, answer_of, retrying
from shards.store.s3 import s3

# One ranged GET or one part of an upload: large enough that latency does not count, small enough
# to repeat cheaply.
_CHUNK = 16 << 20

# Parts of one upload that are under way at once.
_PARTS_AT_ONCE = 4


# --- names --------------------------------------------------------------------------------------


def local_path(url: str | Path) -> Path | None:
    """The path of a local URL, None for object storage. A ~ at the beginning is the home folder."""
    text = str(url)
    if text.startswith("s3:") and not text.startswith("s3://"):
        raise DataError(f"{text:.200} is no URL of a store: give s3://bucket/key, or ./{text:.200}")
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(expanded(text))


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
    target = io.BytesIO()
    download(url, target, retry=retry)
    return target.getvalue()


def write_bytes(url: str, data: bytes, retry: Retry | None = None, *, durable: bool = True) -> None:
    """Write the whole object at once: a reader sees all of it or nothing. durable: a local file is
    on the disk then."""
    if path := local_path(url):
        try:
            with written_whole(path, durable=durable) as temporary:
                temporary.write_bytes(data)
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
    """Write an object of `size` bytes; `part(begin, end)` gives some of them.

    Large objects are written in parts, which are retried one by one: a fault repeats one of them,
    and nobody sees the object before it is whole.
    """
    step = max(_CHUNK, -(-size // 9999))  # S3 takes 10,000 parts
    if size <= step or not url.startswith("s3://"):
        data = part(0, size)
        return retrying(url, "write", lambda until: _call(url, until, "pipe_file", data), retry)
    bucket, key = bucket_and_key(url, "write")

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
        # Parts of an upload that is never completed take room in the bucket until they are removed.
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
    """Something that is written to, as an open file."""

    def write(self, data: bytes, /) -> Any: ...


def download(url: str, target: Target, size: int | None = None, retry: Retry | None = None) -> None:
    """Copy an object into something that is written to, while it arrives.

    size: bytes to read; None reads all. After a cut connection the next attempt goes on where it
    broke off. An object with fewer bytes than `size` is copied as far as it goes. A small object
    costs one request.
    """
    at = 0
    while size is None or at < size:
        end = at + _CHUNK if size is None else min(at + _CHUNK, size)
        at, whole = _copy(url, at, end, target, retry)
        if at < end:
            break
        size = whole if size is None else size


def read_range(url: str, begin: int, end: int, retry: Retry | None = None) -> bytes:
    """Bytes [begin, end) of an object, fewer where it ends before."""
    target = io.BytesIO()
    _copy(url, begin, end, target, retry)
    return target.getvalue()


class _TargetError(DataError):
    """What was read could not be written: a fault of the target's, so reading is not retried."""


def _copy(
    url: str, begin: int, end: int, target: Target, retry: Retry | None
) -> tuple[int, int | None]:
    """Write bytes [begin, end) of an object to `target`. Returns where copying stopped (at `end`,
    or at the object's end if that comes first), and the object's size where it became known."""
    at, size = begin, None

    def action(until: float) -> None:
        nonlocal at, size
        wanted = end if size is None else min(end, size)
        if at >= wanted:
            return
        try:
            size, parts = _parts(url, at, wanted, until)
            for data in parts:
                if retry:
                    retry.check()
                try:
                    target.write(data)
                except OSError as error:
                    raise _TargetError(str(error)) from error
                at += len(data)
        except OSError as error:
            if answer_of(error)[1] != 416:
                raise
            # Stores refuse what begins at the object's end or beyond it, and some refuse what ends
            # beyond it: those are asked once more, for what there is.
            size = _size(url, until)
            if at < size:
                if size >= wanted:
                    raise
                return action(until)
        # An answer may be short though nothing was cut off. That is right at the object's end only.
        if at < end:
            size = _size(url, until) if size is None else size
            if at < size:
                raise OSError(f"{at - begin} bytes came of {min(end, size) - begin} at {begin}")

    try:
        retrying(url, "read", action, retry)
    except _TargetError as error:
        assert error.__cause__
        raise error.__cause__ from None
    return at, size


def _parts(url: str, begin: int, end: int, until: float) -> tuple[int | None, Iterable[bytes]]:
    """The object's size, where that costs nothing, and bytes [begin, end) of it as they come."""
    if path := local_path(url):
        try:
            with open(path, "rb") as f:
                f.seek(begin)
                return os.fstat(f.fileno()).st_size, [f.read(end - begin)]
        except OSError as error:
            raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    if url.startswith("s3://"):
        return s3().read(*bucket_and_key(url), begin, end, until)
    return None, [_call(url, until, "cat_file", start=begin, end=end)]


def read_tagged(url: str, retry: Retry | None = None) -> tuple[bytes, str]:
    """A small object, and the tag of this content, by which it can be replaced (create.py).
    NotFoundError where it is absent."""
    if local_path(url):
        data = read_bytes(url)
        return data, hashlib.sha256(data).hexdigest()
    bucket, key = bucket_and_key(url)

    def action(until: float) -> tuple[bytes, str]:
        file_system = s3().file_system()

        async def get() -> tuple[bytes, str]:
            answer = await file_system._call_s3("get_object", Bucket=bucket, Key=key)
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"].strip('"')

        return s3().run(get(), until)

    return retrying(url, "read", action, retry)


@dataclass(frozen=True)
class Listed:
    """An object below a place."""

    name: str
    """Relative to the place, with / between folders."""
    size: int
    modified: float
    """Seconds since the epoch."""


def list_tree(url: str, retry: Retry | None = None) -> list[Listed]:
    """All objects below a folder or prefix, by name; hidden ones, too."""
    if path := local_path(url):
        found = []
        for folder, _, names in os.walk(path):
            for name in names:
                full = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    s = full.lstat()
                    found.append(Listed(str(full.relative_to(path)), s.st_size, s.st_mtime))
        return sorted(found, key=lambda o: o.name)
    key = url.partition("://")[2].rstrip("/")

    def action(until: float) -> list[Listed]:
        entries = _call(url, until, "find", detail=True)
        return [
            Listed(name.removeprefix(f"{key}/"), e["size"], e["LastModified"].timestamp())
            for name, e in sorted(entries.items())
            if e["type"] == "file" and name.startswith(f"{key}/")
        ]

    try:
        return retrying(url, "list", action, retry)
    except NotFoundError:
        return []


def look_up(url: str, retry: Retry | None = None) -> Listed:
    """Size and time of an object, by the store's clock; NotFoundError where it is absent."""
    name = url.rpartition("/")[2]
    if path := local_path(url):
        try:
            s = path.stat()
        except OSError:
            raise NotFoundError(f"{path} does not exist") from None
        return Listed(name, s.st_size, s.st_mtime)

    def action(until: float) -> Listed:
        info = _info(url, until)
        when = info.get("LastModified")  # S3's; other stores have other names for it
        return Listed(name, int(info["size"]), when.timestamp() if when else 0.0)

    return retrying(url, "look up", action, retry)


def file_size(url: str, retry: Retry | None = None) -> int:
    """Bytes of an object; NotFoundError where it is absent."""
    return look_up(url, retry).size


def _size(url: str, until: float) -> int:
    return int(_info(url, until)["size"])


def _info(url: str, until: float) -> dict[str, Any]:
    info: dict[str, Any] = _call(url, until, "info")
    if info["type"] != "file":  # a prefix of other objects
        raise FileNotFoundError(url)
    return info


def exists(url: str, retry: Retry | None = None) -> bool:
    """Whether the object is there."""
    try:
        file_size(url, retry)
    except NotFoundError:
        return False
    return True


def list_names(url: str, retry: Retry | None = None) -> list[str]:
    """Names of the files directly in a folder or under a prefix, sorted; empty if there is none."""
    return list_folder(url, retry)[0]


def list_folder(url: str, retry: Retry | None = None) -> tuple[list[str], list[str]]:
    """Names of the files directly in a folder or under a prefix, and of the folders, both sorted;
    empty if there is none."""
    if path := local_path(url):
        if not path.is_dir():
            return [], []
        entries = sorted(path.iterdir())
        return [p.name for p in entries if p.is_file()], [p.name for p in entries if p.is_dir()]
    key = url.partition("://")[2].rstrip("/")

    def action(until: float) -> tuple[list[str], list[str]]:
        entries = _call(url, until, "ls", detail=True, refresh=True)
        names: dict[str, list[str]] = {"file": [], "directory": []}
        for e in entries:
            name = str(e["name"]).rstrip("/")
            if name != key:
                names[e["type"]].append(name.rpartition("/")[2])
        return sorted(names["file"]), sorted(names["directory"])

    try:
        return retrying(url, "list", action, retry)
    except NotFoundError:
        return [], []


def delete(url: str, retry: Retry | None = None) -> None:
    """Remove an object; one that is not there is no error."""
    if path := local_path(url):
        path.unlink(missing_ok=True)
        return
    try:
        retrying(url, "delete", lambda until: _call(url, until, "rm_file"), retry)
    except NotFoundError:
        return
