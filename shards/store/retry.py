"""Which faults of a store are tried again, for how long, and which are final at once.

Full jitter: M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from shards.errors import DataError, NotFoundError, StoreError
from shards.store.s3 import endpoint, s3

log = logging.getLogger("lxscale")

T = TypeVar("T")


def _deadline() -> float:
    text = os.environ.get("LXSCALE_STORE_DEADLINE", "300")
    try:
        return float(text)
    except ValueError:
        raise DataError(f"LXSCALE_STORE_DEADLINE is {text!r}: give a number of seconds") from None


@dataclass(frozen=True)
class Retry:
    """Full jitter: before attempt n, wait a uniform time up to min(cap, base * 2^n); in seconds."""

    base: float = 0.2
    cap: float = 20.0
    deadline: float = field(default_factory=_deadline)
    """After this time from the first attempt a fault is final. The default is
    LXSCALE_STORE_DEADLINE or 300, which outlasts a restarting gateway but not a lost one."""

    def wait(self, attempt: int) -> float:
        """Seconds to wait before an attempt."""
        return _jitter.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 30)))

    def attempt_time(self, attempt: int, left: float) -> float:
        """The longest that an attempt may take: a tenth of the deadline, then half as long again
        each time. A request that is never answered leaves time for others, and over a slow line
        the last ones get there."""
        return max(1.0, min(left, self.deadline / 10 * 1.5 ** min(attempt, 30)))


# With the seeded generator of a training process all ranks would wait for the same times.
_jitter = random.SystemRandom()


# Error codes with a 4xx status that do not mean a bad request: the same request may succeed later.
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
    code, status = answer_of(error)
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


def answer_of(error: BaseException) -> tuple[str, int]:
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
            raise StoreError(
                f"cannot {what} {url}: {type(cause).__name__}: {cause} (gave up after "
                f"{attempt + 1} attempts in {spent:.0f} s): check the network and {endpoint()}, "
                "or raise LXSCALE_STORE_DEADLINE"
            ) from cause
        # The last attempt falls on the deadline.
        wait = min(retry.wait(attempt), retry.deadline - spent)
        attempt += 1
        log.warning("cannot %s %s (%s); attempt %d in %.1f s", what, url, cause, attempt + 1, wait)
        time.sleep(wait)
