"""What a checkpoint is on the store: names, the manifest's fields, its JSON and its own hash.

    storage/name/attempts/000002-1f3a….json                the lease of attempt 2's owner
    storage/name/attempts/job-9c41….json                   the lease of a job, while it lasts
    storage/name/checkpoints/objects/step-…-a…-r…-….safetensors   one a rank: its fragments
    storage/name/checkpoints/record/step-…-…-a…-….jsonl    a segment of the journal
    storage/name/checkpoints/a000002-000001.json           a link of the chain (chain.py): the
                                                           manifest of a generation, or a claim
    storage/name/checkpoints/step-00001000-a000002.json    a manifest of lxscale 0.1.0

The journal is called "record" in its folder's name and in the manifest's JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from shards.order.sampler import SamplerState
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError, NewerFormatError

FORMAT = "lxscale-checkpoint-2"

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What is kept of each element: the fp32 weight and Adam's two moments. An object holds one flat
fp32 array of each."""


# --- objects ------------------------------------------------------------------------------------


class Span(NamedTuple):
    """The elements [start, start + length) of a flattened parameter."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """How a manifest names an immutable object."""

    folder: ClassVar[str]
    """Under the run's checkpoints."""
    pattern: ClassVar[re.Pattern[str]]
    """Of its names: the step that it was written at, and the attempt that wrote it."""

    name: str
    size: int
    """Bytes."""
    sha256: str

    def url(self, run_url: str) -> str:
        return checkpoint_url(run_url, self.folder, self.name)


@dataclass(frozen=True)
class ObjectEntry(Entry):
    """A rank's part of a generation: safetensors with one flat array for each of KINDS."""

    folder = "objects"
    pattern = re.compile(r"step-(?P<step>\d+)-a(?P<attempt>\d+)-r\d+-[0-9a-f]+\.safetensors")

    fragments: tuple[Span, ...]
    """What the arrays hold, end to end."""


@dataclass(frozen=True)
class SegmentEntry(Entry):
    """A segment of the journal: the lines of some steps in a row."""

    folder = "record"
    pattern = re.compile(r"step-(?P<first>\d+)-(?P<step>\d+)-a(?P<attempt>\d+)-[0-9a-f]+\.jsonl")

    first: int
    """Its first step."""
    last: int
    """Its last step."""


def checkpoint_url(run_url: str, *parts: str) -> str:
    """The folder of a run's checkpoints, or a place in it."""
    return objects.join(run_url, "checkpoints", *parts)


def lease_url(run_url: str, *name: str) -> str:
    """The folder of a run's leases, or one of them."""
    return objects.join(run_url, "attempts", *name)


def job_lease_url(run_url: str, job: str) -> str:
    return lease_url(run_url, f"job-{job}.json")


# The random end keeps apart what a save that is tried again writes.
def object_name(step: int, attempt: int, rank: int) -> str:
    return f"step-{step:08d}-a{attempt:06d}-r{rank:05d}-{secrets.token_hex(4)}.safetensors"


def segment_name(first: int, last: int, attempt: int) -> str:
    return f"step-{first:08d}-{last:08d}-a{attempt:06d}-{secrets.token_hex(4)}.jsonl"


def now_utc() -> str:
    """For people to read; nothing is decided by it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the manifest -------------------------------------------------------------------------------

LINK_PATTERN = re.compile(r"a(?P<attempt>\d+)-(?P<index>\d+)\.json")
MANIFEST_PATTERN = re.compile(r"step-(?P<step>\d+)-a(?P<attempt>\d+)\.json")
"""Of lxscale 0.1.0."""
LEASE_PATTERN = re.compile(r"(?P<attempt>\d+)-(?P<token>[0-9a-f]+)\.json")


@dataclass(frozen=True)
class RunDescription:
    """What stays the same throughout an attempt, and every generation of it says."""

    world_size: int
    zero_stage: int
    parameters: dict[str, list[int]]
    """Shape of every parameter; a tied one under its first name only."""
    config: dict[str, Any]
    """The resolved configuration."""
    data_state: dict[str, Any]
    """What the stream of batches depends on beside the sampler's state: settings by their keys,
    the version of the order, the data set's fingerprint."""
    objectives: dict[str, float]
    """Weight of every objective that is trained."""
    vocab_sha256: str
    answers_sha256: str


@dataclass(frozen=True)
class CheckpointManifest(RunDescription):
    """Everything that a generation says, in the order of its JSON."""

    sampler: SamplerState
    """After the last of `step` steps."""
    step: int
    """Optimizer steps done."""
    attempt: int
    objects: tuple[ObjectEntry, ...]
    """One for each rank."""
    journal: Annotated[tuple[SegmentEntry, ...], Field(alias="record")]
    """All segments that lead to this generation, from the run's first step on."""
    skipped_updates: int = 0
    """Of the steps, those whose loss or gradients were not finite: Adam does not count them. Not
    written when there are none."""
    saved_at: str = ""
    """When it was written, in UTC; for people only. Not written where it is not known."""


_MANIFEST: TypeAdapter[CheckpointManifest] = TypeAdapter(CheckpointManifest)


def manifest_bytes(manifest: CheckpointManifest) -> bytes:
    """The manifest as it is stored, with its format and its own hash."""
    document = _MANIFEST.dump_python(manifest, by_alias=True)
    for key in ("skipped_updates", "saved_at"):
        if not document[key]:
            del document[key]
    return document_bytes(FORMAT, document)


def parse_manifest(data: bytes, url: str) -> CheckpointManifest:
    """The manifest in `data`; CheckpointError naming `url` and what is wrong with it."""
    checked_document(data, url, FORMAT)
    try:
        return _MANIFEST.validate_json(data, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{url}: not a checkpoint manifest: {what_is_wrong(error)}") from None


# --- documents ----------------------------------------------------------------------------------


def document_bytes(format_: str, fields: dict[str, Any]) -> bytes:
    """A JSON object with its format and its own hash."""
    document = {"format": format_, **fields}
    return json.dumps({**document, "sha256": _self_hash(document)}).encode()


def checked_document(data: bytes, url: str, expected: str) -> dict[str, Any]:
    """`parse_document` of one with its own hash, which is checked."""
    document = parse_document(data, url, expected)
    # Over all that was read: a key or a digit that the fields would drop counts, too.
    if document.get("sha256") != _self_hash(document):
        raise CheckpointError(f"{url}: its own hash does not match, it is damaged")
    return document


def parse_document(data: bytes, url: str, expected: str) -> dict[str, Any]:
    """A JSON object of the expected format; CheckpointError names `url` and what it is instead,
    NewerFormatError if that is a later version of the format."""
    try:
        document = json.loads(data)
        found = document.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{url}: not a JSON object: {error}") from None
    if _is_newer(found, expected):
        raise NewerFormatError(
            f"{url} was written by a newer lxscale (format {found}): upgrade lxscale"
        )
    if found != expected:
        raise CheckpointError(f"{url}: format {found!r}, this lxscale reads {expected!r}")
    return dict(document)


def _is_newer(found: Any, expected: str) -> bool:
    kind, _, version = expected.rpartition("-")
    other, _, number = str(found).rpartition("-")
    return other == kind and number.isdecimal() and int(number) > int(version)


def what_is_wrong(error: ValidationError) -> str:
    """Every key that does not fit, with the reason."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def _self_hash(document: dict[str, Any]) -> str:
    body = {k: v for k, v in document.items() if k != "sha256"}
    return sha256_of(json.dumps(body, sort_keys=True).encode())
