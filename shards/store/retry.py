"""Which faults of a store are tried again, for how long, and which are final at once.

Full jitter: M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from shards.errors import DataError, NodeError, NotFoundError, StoreError
from shards.store.places import bucket_and_key
from shards.store.s3 import endpoint, s3
from shards.urls import shown

log = logging.getLogger("lxscale")

T = TypeVar("T")


# Seconds that a deadline may be: more would outlive every run, and overflow the system's clocks.
_LONGEST = 10**7


def _deadline() -> float:
    text = os.environ.get("LXSCALE_STORE_DEADLINE", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST:
        raise DataError(
            f"LXSCALE_STORE_DEADLINE is {text!r:.40}: give a number of seconds, 0 to {_LONGEST:,}"
        )
    return seconds


class StoppedError(NodeError):
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class Retry:
    """Full jitter: before attempt n, wait a uniform time up to min(cap, base * 2^n); in seconds."""

    base: float = 0.2
    cap: float = 20.0
    deadline: float = field(default_factory=_deadline)
    """After this time from the first attempt a fault is final. The default is
    LXSCALE_STORE_DEADLINE or 300, which outlasts a restarting gateway but not a lost one."""
    over: threading.Event | None = None
    """Once it is set nobody waits for the result any more: StoppedError, within a moment."""

    def wait(self, attempt: int) -> float:
        """Seconds to wait before an attempt."""
        return _jitter.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 30)))

    def attempt_time(self, attempt: int, left: float) -> float:
        """The longest that an attempt may take: a tenth of the deadline, then half as long again
        each time. A request that is never answered leaves time for others, and over a slow line
        the last ones get there."""
        return max(1.0, min(left, self.deadline / 10 * 1.5 ** min(attempt, 30)))

    def check(self, pause: float = 0.0) -> None:
        """Wait so many seconds; StoppedError as soon as it is over."""
        if self.over is None:
            time.sleep(pause)
        elif self.over.wait(pause):
            raise StoppedError("stopped, as nobody waits for it any more")


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


# What the text of a TLS error has in it that is of the configuration.
_WRONG_TLS = "CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER"

# Of botocore's errors, by a base class each, those that another attempt may not meet. The others
# are of names and settings.
_PASSING_OF_BOTOCORE = {
    "ClientError",
    "ConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "IncompleteReadError",
    "MetadataRetrievalError",
    "ResponseParserError",
}


def _final(error: BaseException, url: str) -> DataError | None:
    """The error to raise at once, or None where another attempt may succeed."""
    name, text = type(error).__name__, _line(error)
    code, status = answer_of(error)
    if code in _PASSING:
        return None
    if code == "NoSuchBucket" or "specified bucket does not exist" in text:
        return DataError(
            f"{url}: the bucket {url.split('/')[2]} does not exist at {_server(url)}: create it, "
            "or correct the URL or AWS_ENDPOINT_URL"
        )
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{url} does not exist")
    if isinstance(error, PermissionError):
        return DataError(
            f"{url}: access denied at {_server(url)} ({code or text}): check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the bucket's policy"
        )
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return DataError(
            f"{url}: no credentials ({text}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "name a profile in AWS_PROFILE"
        )
    if 300 <= status < 500 and status not in (408, 409, 429):
        return DataError(
            f"{url}: refused by {_server(url)} ({code or status}: {text}): check the URL"
        )
    if any(problem in text for problem in _WRONG_TLS):
        return DataError(
            f"{url}: no TLS with {_server(url)} ({text}): check http or https, and its certificate"
        )
    if _may_pass(error):
        return None
    return DataError(f"{url}: {name}: {text}")


def _line(error: BaseException) -> str:
    """What an error says, as a short line."""
    text = " ".join(shown(error).split())
    return text if len(text) <= 200 else f"{text[:199]}…"


def _server(url: str) -> str:
    """What serves a URL, for messages."""
    return endpoint() if url.startswith("s3://") else "/".join(url.split("/")[:3])


def answer_of(error: BaseException) -> tuple[str, int]:
    """The store's error code and HTTP status, where it has answered."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code, int(status or getattr(error, "status", 0))  # the latter of aiohttp


def _may_pass(error: BaseException) -> bool:
    """Whether it is of the system, or of the HTTP client: not of a name or a setting."""
    bases = {(c.__module__.split(".")[0], c.__name__) for c in type(error).__mro__}
    modules = {module for module, _ in bases}
    if modules & {"botocore", "aiobotocore"}:
        return bool({name for _, name in bases} & _PASSING_OF_BOTOCORE)
    if isinstance(error, OSError):
        return True
    # A ValueError is of a URL that cannot be parsed.
    return bool(modules & {"aiohttp", "http", "urllib3"}) and not isinstance(error, ValueError)


def retrying(url: str, what: str, action: Callable[[float], T], retry: Retry | None = None) -> T:
    """`action(until)`, repeated with backoff until it succeeds; DataError naming `url` when it
    fails for good. `until`: the time.monotonic() at which an attempt has to end. `what` completes
    "cannot … <url>" in messages."""
    retry = retry or Retry()
    if url.startswith("s3://"):
        bucket_and_key(url, what)
        s3().file_system()  # the first time, this imports for a second: not the store's fault
    begin, attempt = time.monotonic(), 0
    while True:
        retry.check()
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
        attempt += 1
        if spent >= retry.deadline:
            raise StoreError(
                f"cannot {what} {url}: {type(cause).__name__}: {_line(cause)} (gave up after "
                f"{_tried(attempt, spent)}): check the network and {_server(url)}, or raise "
                "LXSCALE_STORE_DEADLINE"
            ) from cause
        # The last attempt falls on the deadline.
        wait = min(retry.wait(attempt - 1), retry.deadline - spent)
        log.warning(
            "cannot %s %s (%s); attempt %d in %.1f s",
            what,
            shown(url),
            _line(cause),
            attempt + 1,
            wait,
        )
        retry.check(wait)


def _tried(attempts: int, seconds: float) -> str:
    """So many requests, as the client's own retries are off, and in what time."""
    time_ = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{attempts} attempt{'s' if attempts > 1 else ''} in {time_}"
