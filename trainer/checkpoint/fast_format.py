"""What a snapshot in the nodes' memory is: names, the fields of its manifest, its JSON.

    PLACE/lxscale-fast-1000/3f9c…/checkpoints/objects/step-…-a…-r…-….safetensors
    PLACE/lxscale-fast-1000/3f9c…/checkpoints/a000002-s00000040.json

in a folder of the user's, in one of the run's (fast_folder.py). Objects are those of a generation
on the store, and lie as they do there. A node has those of its ranks, and copies of another node's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from shards.order.sampler import SamplerState
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import (
    CheckpointManifest,
    checked_document,
    document_bytes,
    what_is_wrong,
)
from trainer.checkpoint.generations import Generation
from trainer.checkpoint.journal import JournalPart, StepLine

FORMAT = "lxscale-fast-1"

MANIFEST = re.compile(r"a(?P<attempt>\d+)-s(?P<step>\d+)\.json")


def manifest_name(attempt: int, step: int) -> str:
    return f"a{attempt:06d}-s{step:08d}.json"


@dataclass(frozen=True)
class FastManifest:
    """Everything that a snapshot says."""

    manifest: CheckpointManifest
    """As a generation of this step would have it; its journal ends with what the store's newest one
    names."""
    claim: str
    """Token of the attempt that made it."""
    start: SamplerState
    """After the last step of the journal's segments."""
    lines: tuple[StepLine, ...]
    """The steps since: as many as the store is behind."""

    @property
    def place(self) -> tuple[int, int]:
        """Attempt and step: the higher, the newer."""
        return self.manifest.attempt, self.manifest.step

    @property
    def name(self) -> str:
        return manifest_name(*self.place)

    @property
    def journal(self) -> JournalPart:
        return JournalPart(self.manifest.journal, self.start, self.lines)

    def __str__(self) -> str:
        return f"the snapshot of step {self.manifest.step} (attempt {self.manifest.attempt})"


def continued(fast: FastManifest, stored: Generation | None) -> JournalPart:
    """The account of a snapshot, with what the store has got of it since it was made. stored: the
    store's newest generation, older than the snapshot."""
    part = fast.journal
    if stored is None or stored.manifest.attempt != fast.manifest.attempt:
        return part
    segments = stored.manifest.journal
    if segments[: len(part.segments)] != part.segments:
        return part
    lines = tuple(line for line in part.lines if line.step > stored.step)
    return JournalPart(segments, stored.manifest.sampler, lines)


_MANIFEST: TypeAdapter[FastManifest] = TypeAdapter(FastManifest)


def fast_manifest_bytes(fast: FastManifest) -> bytes:
    return document_bytes(FORMAT, _MANIFEST.dump_python(fast, by_alias=True))


def parse_fast_manifest(data: bytes, url: str) -> FastManifest:
    """Raises CheckpointError, naming `url`, where it is damaged or of another format."""
    checked_document(data, url, FORMAT)
    try:
        found = _MANIFEST.validate_json(data, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{url}: not a snapshot: {what_is_wrong(error)}") from None
    # These become files' names.
    if strange := [e.name for e in found.manifest.objects if not e.pattern.fullmatch(e.name)]:
        raise CheckpointError(f"{url}: not a snapshot: {strange[0]!r} is no object's name")
    return found
