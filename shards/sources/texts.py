"""What a format of sentences offers: the sentences of images, one image or sentence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.format.record import Report, Sentence


@dataclass(frozen=True)
class ImageText:
    """Sentences of one image; an image may come many times."""

    image: str
    """Its id after `shards.sources.image_ids.image_id`, by which it meets its features."""
    sentences: tuple[Sentence, ...]
    split: str | None = None
    """Of the image, where the file says one."""
    pictures: tuple[str, str] | None = None
    """Ids of the two images that the sentences are about; `image` is then what both are called."""


@dataclass(frozen=True)
class SentenceFormat:
    """A kind of file of sentences; `shards.sources.sentences.FORMATS` has ours."""

    name: str
    help: str
    """One line for `lxscale shards formats`."""
    source: str
    """Set of the sentences, where neither the file nor the user names one."""
    detect: Callable[[Path], bool]
    """Whether a file is of this format, by its first bytes."""
    read: Callable[[Sequence[Path], str, Report], Iterator[ImageText]]
    """The sentences of all given files of this format, which may belong together (questions and
    annotations), with the name of their set. Streamed: files of gigabytes are never in memory as a
    whole. DataError names file and entry; what is left out goes into the report."""
