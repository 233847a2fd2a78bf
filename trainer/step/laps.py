"""How long a step is at what, by the host's clock."""

from __future__ import annotations

import time


class Laps:
    """A watch: each call names what has been done since the one before, or since it began. On a GPU
    most of forward and backward is waited for in `reduce`, the first that needs a result."""

    def __init__(self) -> None:
        self.began = self._since = time.monotonic()
        self.seconds: dict[str, float] = {}
        """By what was done: data (the wait for the next step's), agreement (the wait for what all
        ranks bring to this one), copy (beginning those of batches to the device), forward,
        backward, reduce (of losses, over ranks), update."""

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now

    @property
    def total(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began
