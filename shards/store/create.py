"""Create-only writes: of any number of writers of one name, one succeeds, and its bytes stay.

On S3 a PUT with `If-None-Match: *`, in a folder a hard link to a file that is whole. A store that
overwrites in spite of the condition is found by `check_create_only`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from shards.errors import DataError, NotFoundError
from shards.store import objects
from shards.store.atomic import flush
from shards.store.places import bucket_and_key
from shards.store.retry import Retry, answer_of, retrying
from shards.store.s3 import endpoint, s3


def create_bytes(url: str, data: bytes, retry: Retry | None = None) -> bool:
    """Write a new object, whole at once; whether it is there now with these bytes.

    False: the name is taken by other bytes, which stay. A name that is taken by the same bytes is
    taken as ours (the reply to an earlier try was lost), so bytes of different writers must differ.
    Raises DataError where the store cannot be reached, and it is then not known whether the object
    was written.
    """
    if path := objects.local_path(url):
        try:
            return _link(path, data)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from None

    def action(until: float) -> bool:
        try:
            _put_new(url, data, until)
        except OSError as error:
            if answer_of(error)[1] != 412:  # a 409 (another writer is at it) is tried again
                raise
            return _holds(url, data)
        return True

    return retrying(url, "write", action, retry)


def check_create_only(prefix: str) -> None:
    """Raise DataError where the store under `prefix` overwrites what it is told to create only."""
    url = objects.join(prefix, f"probe-{secrets.token_hex(8)}")
    first, second = secrets.token_bytes(8), secrets.token_bytes(8)
    try:
        if create_bytes(url, first) and not create_bytes(url, second) and _holds(url, first):
            return
    finally:
        objects.delete(url)
    raise DataError(
        f"{endpoint()} overwrites objects in spite of If-None-Match ({prefix}): runs there cannot "
        "be owned safely; use a store that honours it, or a folder"
    )


def _put_new(url: str, data: bytes, until: float) -> None:
    """One conditional PUT; an OSError with the store's 412 where the name is taken."""
    if not url.startswith("s3://"):
        raise DataError(f"{url}: objects can be created exclusively in folders and on s3:// only")
    bucket, key = bucket_and_key(url, "write")
    options: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": data, "IfNoneMatch": "*"}
    s3().run(s3().file_system()._call_s3("put_object", **options), until)


def _link(path: Path, data: bytes) -> bool:
    """Create a file by a hard link to a temporary one: no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        flush(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return _holds(str(path), data)
        except OSError as error:
            raise DataError(
                f"cannot link {path} ({error.strerror}): runs need a file system with hard links, "
                "by which one of several jobs creates a file; use another run.storage"
            ) from None
        flush(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _holds(url: str, data: bytes) -> bool:
    """Whether an object has these bytes."""
    try:
        return objects.read_bytes(url) == data
    except NotFoundError:  # it was there, and whoever owns it has removed it since
        return False
