"""What a person sees of long work: on a terminal a bar for each stage, elsewhere some lines.

Both go to stderr: what a command is asked for is on stdout alone. Work goes on unseen where stderr
is closed or full.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from cluster.cli.streams import say
from shards.progress import Progress, no_progress

_EVERY_S = 5.0  # between two lines of a stage


@contextlib.contextmanager
def shown_progress(quiet: bool = False) -> Iterator[Progress]:
    """Yields the callback to give to the work, for as long as that lasts."""
    if quiet or sys.stderr is None or sys.stderr.closed:
        yield no_progress
    elif sys.stderr.isatty():
        with contextlib.ExitStack() as bars:
            yield _bars(bars)
    else:
        yield _lines()


def _bars(open_bars: contextlib.ExitStack) -> Progress:
    """Draws a bar with rate and time left for each stage, one below the other."""
    bars: dict[str, tqdm] = {}
    columns, lines = os.get_terminal_size(sys.stderr.fileno())
    # Where a terminal does not know its size, tqdm would draw nothing.
    size = {"ncols": columns or 80, "nrows": lines or 24}

    def show(what: str, done: int, total: int | None) -> None:
        bar = bars.get(what)
        if bar is None:
            bar = bars[what] = open_bars.enter_context(
                tqdm(desc=what, unit="", unit_scale=True, position=len(bars), **size)
            )
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.refresh()

    return show


def _lines() -> Progress:
    """Prints a line of a stage from time to time, and one when it ends."""
    began: dict[str, float] = {}
    told: dict[str, float] = {}

    def show(what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        start = began.setdefault(what, now)
        if done == total or now - told.setdefault(what, start) >= _EVERY_S:
            told[what] = now
            say(_line(what, done, total, now - start))

    return show


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    text = f"{what}: {done:,}"
    if total is not None:
        text += f" of {total:,}"
    if seconds < 1 or not done:
        return text
    text += f", {done / seconds:,.0f}/s" if done > seconds else f", {seconds / done:.0f} s each"
    if total is not None and done < total:
        text += f", {tqdm.format_interval((total - done) * seconds / done)} left"
    return text
