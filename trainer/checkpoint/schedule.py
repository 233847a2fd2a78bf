"""When a save is due, and for how long none has landed: rank 0's account, which decides for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from trainer.checkpoint.errors import UnsavedError
from trainer.sections import CheckpointSection

log = logging.getLogger("lxscale")

# A second failure in a row may come at once, as of a full disk: pauses then grow to this, in s.
_LONGEST_PAUSE = 60.0


class Schedule:
    """Told what became of every save; says when the next is due. Holds no state of the run."""

    def __init__(
        self,
        settings: CheckpointSection,
        newest: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """newest: URL of the newest generation; clock: seconds."""
        self._settings, self._newest, self._clock = settings, newest, clock
        self._begun_at = clock()
        self._open: list[tuple[int, float]] = []
        """Due saves that have not landed: the step and the time at which each became due."""
        self._to_begin = False
        """A save is due and has not begun: the last of the open ones, or one after a failure."""
        self._asked: int | None = None
        """The first step after which that save could have been made."""
        self._failures = 0
        """In a row."""
        self._not_before = self._begun_at
        self._why = "the store has not answered yet"

    def due(self, step: int) -> bool:
        """Whether a save is due after `step`, which is about to be made."""
        now = self._clock()
        minutes = self._settings.every_minutes
        in_time = minutes is not None and now - self._begun_at >= 60 * minutes
        if not self._to_begin and (in_time or step % self._settings.every == 0):
            self._to_begin = True
            self._open.append((step, now))
        if not self._to_begin or now < self._not_before:
            return False
        if self._asked is None:
            self._asked = step
        elif step == self._asked + 1:
            log.warning(
                "checkpoint at step %d is put off: checkpoint.spool=%d are waiting or under way",
                self._asked,
                self._settings.spool,
            )
        return True

    def begun(self) -> None:
        """The due save, or that of the end, has begun."""
        self._to_begin, self._asked, self._begun_at = False, None, self._clock()

    def withheld(self) -> None:
        """The due save was not wanted after this step, for which there was room."""
        self._asked = None

    def landed(self, step: int, url: str) -> None:
        """The save of `step` is committed, and with it all that were due until then."""
        self._newest, self._failures = url, 0
        self._open = [due for due in self._open if due[0] > step]

    def failed(self, why: str) -> None:
        """A save was given up: the next is due at once, or after a pause if it is not the first."""
        self._why, self._to_begin = why, True
        self._failures += 1
        pause = min(2.0 ** min(self._failures, 30), _LONGEST_PAUSE) if self._failures > 1 else 0.0
        self._not_before = self._clock() + pause

    def unsaved(self, step: int) -> UnsavedError | None:
        """What ends the run, `step` steps of which are done, if nothing could be saved for too
        long."""
        if not self._open:
            return None
        (since, at), settings = self._open[0], self._settings
        steps, minutes = step - since, (self._clock() - at) / 60
        if minutes > settings.max_unsaved_minutes:
            limit = f"checkpoint.max_unsaved_minutes={settings.max_unsaved_minutes:g}"
        elif settings.max_unsaved is not None and steps > settings.max_unsaved:
            limit = f"checkpoint.max_unsaved={settings.max_unsaved}"
        else:
            return None
        return UnsavedError(
            f"nothing could be saved since step {since}, {steps} steps and {minutes:.1f} minutes "
            f"ago ({limit}): {self._why}; {newest_is(self._newest)}"
        )


def newest_is(url: str | None) -> str:
    """What a run that cannot save goes on from."""
    if url is None:
        return "there is no checkpoint, the same command starts anew once the store takes one"
    return f"the same command goes on from {url} once the store takes checkpoints"
