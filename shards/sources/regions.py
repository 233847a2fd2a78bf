"""What a format of features offers: images are listed first, then the regions of each are read.

Listing is quick and opens no array, so that a build knows every image, finds what is missing or
there twice, and can deal the reading out to many processes before any of it begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.format.record import Labels, Sentence


@dataclass(frozen=True)
class Regions:
    """The regions of one image: n objects with features of width D."""

    image: str
    """Its id, as the file has it."""
    width: int
    """In pixels."""
    height: int
    boxes: NDArray[np.float32]
    """(n, 4): x1 y1 x2 y2 over width and height, 0..1."""
    features: NDArray[np.floating]
    """(n, D), of the type that the file has; the build converts and checks."""
    labels: Labels | None = None


@dataclass(frozen=True)
class Entry:
    """An image that a file has, and where."""

    image: str
    """Its id, as the file has it; empty where it cannot be read."""
    position: str
    """What the format's reader finds it by: a byte, a row, a key."""
    where: str
    """The same for people, after the file's name: `line 12`; empty for the file as a whole."""
    objects: int = 0
    """How many it has; 0 where only reading it would tell."""
    problem: str = ""
    """Why it cannot be used, where listing shows that already."""
    version: str = ""
    """What changes when it does, where that is not the file that lists it: size and time of a
    picture in a folder (`file_version`)."""
    sentences: tuple[Sentence, ...] = ()
    """Of formats that hold them beside the features."""
    split: str | None = None
    """Of the image, where the file says one."""
    empty_sentences: int = 0
    """How many of its sentences have no text, and are left out."""


@dataclass(frozen=True)
class Options:
    """What records are checked against, and the settings of a format."""

    feature_dim: int = 2048
    """Width of a feature."""
    object_classes: int = 1600
    """Range of object labels, where there are any."""
    attribute_classes: int = 400
    room: Path | None = None
    """Where copies of remote files go while they are read; None: the system's temporary folder."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """By name; each is one of `FeatureFormat.settings`."""


Reader = Callable[[Entry], Regions]
"""Reads one image. ValueError (`checks.PartError` among them) says what is wrong with it, and the
build adds file and `Entry.where`; DataError where the file as a whole cannot be used."""


@dataclass(frozen=True)
class FeatureFormat:
    """A kind of features file; `shards.sources.features.FORMATS` has ours."""

    name: str
    help: str
    """One line for `lxscale shards formats`."""
    extractor: str
    """What made the features, where the user does not say: it goes into the manifest."""
    detect: Callable[[str], bool]
    """Whether a path (or URL) that exists is of this format; looks at names and first bytes."""
    files: Callable[[str], list[str]]
    """The files of a place, each of which is listed and read on its own, in their order."""
    entries: Callable[[str, Options], Iterator[Entry]]
    """The images of a file, in its order. DataError where it is damaged as a whole."""
    reader: Callable[[str, Options], AbstractContextManager[Reader]]
    """Opens a file for reading; within a process two at most, entries in rising order mostly."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Name -> help of what `--feature-option NAME=VALUE` can say to it."""


def file_version(stat: os.stat_result) -> str:
    """What changes when a file does."""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def one_file(place: str) -> list[str]:
    """`FeatureFormat.files` where a place is one file."""
    return [place]
