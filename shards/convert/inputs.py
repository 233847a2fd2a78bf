"""Which files a data set is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shards.sources.image_ids import Collection


@dataclass(frozen=True)
class FeatureInput:
    """Files of features."""

    place: str
    """A file, a folder, or a URL with braces."""
    format: str | None = None
    """Its name, or a plug-in's module path; None: it is detected."""
    numbers: Collection | None = None
    """Of which collection bare numbers are that stand for images."""
    split: str | None = None
    """Of its images."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the format."""


@dataclass(frozen=True)
class SentenceInput:
    """Files of sentences that belong together, as questions and their annotations do."""

    files: tuple[Path, ...]
    format: str | None = None
    source: str | None = None
    """The name of their set; None: the format's."""
    split: str | None = None
    """Of their images."""


@dataclass(frozen=True)
class Inputs:
    """All that a build reads."""

    features: tuple[FeatureInput, ...]
    sentences: tuple[SentenceInput, ...] = ()
    vg_images: Path | None = None
    """Visual Genome's image_data.json: which of its images are COCO's."""
    exclude: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Why -> ids of images that stay out (`shards.sources.image_ids`)."""
    only: frozenset[str] | None = None
    """Ids of the only images that are taken."""
