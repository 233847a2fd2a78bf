"""What a URL names, checked before anything is asked of a store."""

from __future__ import annotations

import os
import re

from shards.errors import DataError
from shards.urls import shown

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")  # the signs that S3's clients let through
_LONGEST_KEY = 1024  # bytes


def expanded(path: str) -> str:
    """A path, or URL, with the home folder for a ~ at its beginning."""
    out = os.path.expanduser(path)
    if out.startswith("~"):
        raise DataError(
            f"{path!r:.200}: there is no user {path.partition('/')[0][1:]!r:.60}; a file of that "
            f"name is ./{path:.60}"
        )
    return out


def bucket_and_key(url: str, what: str = "read") -> tuple[str, str]:
    """What an s3:// URL names. what: is to be done with it; to list it, a bucket is enough.

    Raises DataError where no store could have such an object.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise DataError(
            f"{url}: there is a password, or another thing that is no bucket, before the key: give "
            "s3://bucket/key, and credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not _BUCKET.fullmatch(bucket):
        problem = f"{bucket!r:.80} is no bucket's name" if bucket else "it names no bucket"
        raise DataError(f"{shown(url)!a:.100}: {problem}: give s3://bucket/key")
    if key.startswith("/"):
        raise DataError(
            f"{shown(url):.200}: there is an empty name after the bucket: give s3://bucket/key"
        )
    if not key and what != "list":
        raise DataError(f"{url}: it names a bucket and no object: give s3://bucket/key")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise DataError(f"{shown(url)!a:.200}: it is not valid Unicode") from None
    if size > _LONGEST_KEY:
        raise DataError(
            f"{shown(url):.100}…: its key has {size} bytes, and {_LONGEST_KEY} are the most"
        )
    return bucket, key
