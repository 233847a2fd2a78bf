"""What a kind of input offers to `lxscale shards build`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.format.record import ImageRecord, Report
from shards.progress import Progress


@dataclass(frozen=True)
class Source:
    """A kind of input; `shards.sources.SOURCES` has them by name."""

    help: str
    """One line for `lxscale shards build --help`."""

    extractor: str
    """What made the features, where the user does not say: it goes into the manifest."""

    add_arguments: Callable[[ArgumentParser], None]
    """Adds the arguments of this source alone."""

    read: Callable[[Namespace, Report, Progress], Iterator[ImageRecord]]
    """The records. The arguments have those of every build, too: feature_dim, skip_bad, staging."""
