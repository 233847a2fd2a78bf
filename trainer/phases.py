"""How long a rank is at what: the account of an attempt, from which its goodput is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from trainer.checkpoint.lease import Made
from trainer.checkpoint.owner import Owner


class Phases:
    """What the loop is at, one phase after the other; the first is "start"."""

    def __init__(
        self,
        enter: Callable[[str], None] = lambda phase: None,
        tell: Callable[[Made], None] = lambda made: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """enter, tell: told of each phase, and before it of what has been done."""
        self._enter, self._tell, self._clock = enter, tell, clock
        self._phase, self._since = "start", clock()
        self._owner: Owner | None = None
        self.made = Made(begun=time.time())

    def owned(self, attempt: int, step: int, owner: Owner | None) -> None:
        """The attempt has begun, and goes on from `step`. owner: rank 0's, whose leases tell."""
        self._owner = owner
        self.made = replace(self.made, attempt=attempt, since=step, step=step)
        self.done()

    def enter(self, phase: str) -> None:
        """Here one ends, and the next begins."""
        self.done()
        self._phase = phase
        self._enter(phase)

    def done(self, step: int | None = None) -> None:
        """Tell what is done. step: of the run, where one more is."""
        now = self._clock()
        spent = dict(self.made.spent)
        spent[self._phase] = spent.get(self._phase, 0.0) + now - self._since
        self._since = now
        step = self.made.step if step is None else step
        self.made = replace(self.made, step=step, spent=spent)
        if self._owner:
            self._owner.made = self.made
        self._tell(self.made)
