"""How long work says how far it is: one callback for sources, builds, checks and audits."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called with what is counted ("images read"), how many are done, and of how many (None while that
is not known). Several stages may be under way at one time; one ends when as many are done as there
are. `cluster/cli/progress.py` shows it to a person."""


def no_progress(_what: str, _done: int, _total: int | None) -> None:
    """For callers that do not watch."""
