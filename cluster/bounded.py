"""Calls that may never return, as many of Ray's do where a part of it is gone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Seconds between two looks whether the call has ended.
_LOOK_S = 0.02


class StillBusyError(Exception):
    """The call has not returned in time. It goes on in its thread."""


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """The result of a call, made in a thread; StillBusyError after so many seconds."""
    outcome: list[Any] = [None, None]

    def run() -> None:
        try:
            outcome[0] = call()
        except BaseException as error:
            outcome[1] = error

    thread = threading.Thread(target=run, name="lxscale-bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise StillBusyError
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def held(
    enter: Callable[[], Any],
    leave: Callable[[], Any],
    seconds: float,
    patience: float,
    meanwhile: Callable[[], None],
) -> Iterator[None]:
    """A context entered and left by one thread, which lives in between: the kernel ends what a
    thread has started along with that thread (PR_SET_PDEATHSIG), as Ray asks for.

    `meanwhile` is called again and again during `enter`, and may raise. StillBusyError where
    `enter` takes longer than `seconds`; for `leave`, nobody waits longer than `patience`.
    """
    failure: list[BaseException] = []
    entered, release = threading.Event(), threading.Event()

    def run() -> None:
        try:
            enter()
        except BaseException as error:
            failure.append(error)
        entered.set()
        release.wait()
        leave()

    thread = threading.Thread(target=run, name="lxscale-held", daemon=True)
    thread.start()
    try:
        until = time.monotonic() + seconds
        while not entered.wait(_LOOK_S):
            meanwhile()
            if time.monotonic() > until:
                raise StillBusyError
        if failure:
            raise failure[0]
        yield
    finally:
        release.set()
        thread.join(patience)
