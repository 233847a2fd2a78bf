"""A run's goodput while it trains, for its curves: what the storage says of the time before this
attempt (trainer/goodput.py), and what the attempt adds."""

from __future__ import annotations

import logging
import threading
import time

from shards.errors import DataError
from trainer.checkpoint.errors import CheckpointError
from trainer.goodput import Goodput, Part, goodput_of

log = logging.getLogger("lxscale")


class LiveGoodput:
    """Rank 0's. What was before is read once, in a thread, behind the training."""

    def __init__(self, run_url: str, attempt: int) -> None:
        self._run_url, self._attempt = run_url, attempt
        self._before: Goodput | None = None
        self._first: float | None = None
        """When the attempt's first step began, in seconds since 1970."""
        self._seconds = 0.0
        threading.Thread(target=self._read, name="lxscale-goodput", daemon=True).start()

    def step(self, seconds: float) -> None:
        """A step was made."""
        if self._first is None:
            self._first = time.time() - seconds
        self._seconds += seconds

    def scalars(self) -> dict[str, float]:
        """kept_share: step time / wall so far, if all since the restored generation is kept.
        lost_steps: of all faults before. start_seconds: from the last progress before this attempt
        to its first step. Empty until what was before is known."""
        before, first = self._before, self._first
        if before is None or first is None or not before.parts:
            return {}
        wall = time.time() - before.parts[0].began
        earlier = [p for p in before.parts if p.attempt not in (0, self._attempt)]
        progress = _last_progress(earlier[-1]) if earlier else before.parts[0].began
        return {
            "goodput/kept_share": (before.seconds["kept"] + self._seconds) / max(wall, 1e-9),
            "goodput/lost_steps": before.lost_steps + sum(p.unsaved_steps for p in earlier),
            "goodput/start_seconds": first - progress,
        }

    def _read(self) -> None:
        try:
            self._before = goodput_of(self._run_url)
        except (CheckpointError, DataError) as error:
            log.debug("goodput: %s", error)


def _last_progress(part: Part) -> float:
    return part.ended - part.seconds.get("detect", 0.0) - part.seconds.get("tear down", 0.0)
