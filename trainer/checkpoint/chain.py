"""The chain of a run: links that are created, one after the other, and say who may create the next.

A link is a file of the run's checkpoints, made by a create-only write: `a000007-000003.json` is the
3rd of attempt 7. It is a generation that attempt 7 committed or, as the last link of attempt 7, the
claim of attempt 8. So the first claim of a run is `a000000-000001.json`.

An owner writes only the link after the last one that it knows. Where that name is taken by others,
the owner is stale, and stays so: what it finds there is a claim, and claims are never removed.
Generations are, but that opens no name to a stale owner: the first link after an attempt's last
commit is a claim, as nobody else commits for that attempt. So an owner that slept for however long
cannot commit. Where it cannot know its last commit, as an answer was lost, it or a claimant that
slept may find a name free again that retention had freed. Both look once more after they wrote: a
claim counts only as the last link of all, a commit only without a claim after it. What was written
so is an old generation, which nothing goes back to and later owners remove.

That it is old rests on one thing: only generations are removed that are older than one that stays.
`lxscale checkpoint rm` of the newest holds to it, too: it claims the run, and commits the one that
stays anew before anything else goes (inspect.py).

Runs of lxscale 0.1.0 have manifests named `step-00001000-a000002.json` instead, which still count,
after the links of higher attempts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from shards.errors import NotFoundError
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError, NewerFormatError
from trainer.checkpoint.format import (
    LEASE_PATTERN,
    LINK_PATTERN,
    MANIFEST_PATTERN,
    CheckpointManifest,
    ObjectEntry,
    SegmentEntry,
    checked_document,
    checkpoint_url,
    document_bytes,
    lease_url,
    parse_manifest,
    what_is_wrong,
)
from trainer.checkpoint.process import Process

CLAIM_FORMAT = "lxscale-claim-1"


@dataclass(frozen=True, order=True)
class Link:
    """Sorted by place in the chain."""

    attempt: int
    index: int

    @property
    def name(self) -> str:
        return f"a{self.attempt:06d}-{self.index:06d}.json"


@dataclass(frozen=True)
class Claim:
    """Who began an attempt."""

    attempt: int
    job: str
    """One for all attempts of a command."""
    token: str
    """Of this attempt alone."""
    process: Process
    since: str
    """When, in UTC."""
    driver: Process | None = None
    """The command that started it, and will start another one where this one is lost."""

    @property
    def who(self) -> str:
        return f"{self.driver or self.process}, since {self.since}"


_CLAIM: TypeAdapter[Claim] = TypeAdapter(Claim)


def claim_bytes(claim: Claim) -> bytes:
    return document_bytes(CLAIM_FORMAT, _CLAIM.dump_python(claim))


def parse_link(data: bytes, url: str) -> Claim | CheckpointManifest:
    """What a link says. Raises CheckpointError, or NewerFormatError, naming `url`."""
    if b'"lxscale-claim-' not in data[:64]:
        return parse_manifest(data, url)
    checked_document(data, url, CLAIM_FORMAT)
    try:
        return _CLAIM.validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{url}: not a claim: {what_is_wrong(error)}") from None


def read_link(run_url: str, name: str) -> Claim | CheckpointManifest:
    """The link of that name. Raises NotFoundError where it is gone, CheckpointError where it is
    damaged, DataError where the store cannot be reached: that says nothing about the link."""
    url = checkpoint_url(run_url, name)
    return parse_link(objects.read_bytes(url), url)


def list_links(run_url: str) -> tuple[list[Link], list[str]]:
    """The chain, in order, and the names of manifests that are no links, as they come."""
    names = objects.list_names(checkpoint_url(run_url))
    found = filter(None, map(LINK_PATTERN.fullmatch, names))
    links = sorted(Link(int(m["attempt"]), int(m["index"])) for m in found)
    return links, [n for n in names if MANIFEST_PATTERN.fullmatch(n)]


# --- what attempts leave behind -------------------------------------------------------------------


@dataclass(frozen=True)
class Traces:
    """The names of all that the attempts of a run have left."""

    run_url: str
    links: list[Link]
    manifests: list[str]
    leases: list[str]
    objects: list[str]
    segments: list[str]
    attempt: int
    """The highest attempt that there ever was; 0 for none."""
    end: Claim | CheckpointManifest | None
    """What the last link says; None where it is damaged, or there is none."""

    def last(self, attempt: int) -> Link | None:
        """The last link of an attempt."""
        return max((link for link in self.links if link.attempt == attempt), default=None)

    @property
    def next(self) -> Link:
        """The link that the next claim is to be."""
        last = self.last(self.attempt)
        return Link(self.attempt, last.index + 1 if last else 1)

    def claim_of(self, attempt: int) -> Claim | None:
        """The claim of an attempt, where there is one."""
        link = self.last(attempt - 1)
        if link is None:
            return None
        found = self.end if link == self.links[-1] else _read(self.run_url, link)
        return found if isinstance(found, Claim) and found.attempt == attempt else None

    def leases_of(self, attempt: int) -> list[str]:
        return [n for n in self.leases if _attempts(LEASE_PATTERN, [n]) == {attempt}]


def read_traces(run_url: str) -> Traces:
    """List all that there is of a run, and read its last link: only of that its name does not say
    what it is."""
    while True:
        links, manifests = list_links(run_url)
        end = _read(run_url, links[-1]) if links else None
        # Between the two, a late claim may have taken a name that retention had freed, and does not
        # count. One that counts is the last link still.
        if not isinstance(end, Claim) or list_links(run_url)[0][-1] == links[-1]:
            break
    leases = [n for n in objects.list_names(lease_url(run_url)) if LEASE_PATTERN.fullmatch(n)]
    written = objects.list_names(checkpoint_url(run_url, ObjectEntry.folder))
    segments = objects.list_names(checkpoint_url(run_url, SegmentEntry.folder))
    attempts = {
        0,
        *_attempts(LEASE_PATTERN, leases),
        *_attempts(MANIFEST_PATTERN, manifests),
        *_attempts(ObjectEntry.pattern, written),
        *_attempts(SegmentEntry.pattern, segments),
    }
    if links:
        attempts.add(links[-1].attempt + isinstance(end, Claim))
    return Traces(run_url, links, manifests, leases, written, segments, max(attempts), end)


def _read(run_url: str, link: Link) -> Claim | CheckpointManifest | None:
    """What a link says; None where it is damaged or gone. One of a newer format is an error."""
    try:
        return read_link(run_url, link.name)
    except NewerFormatError:
        raise
    except (NotFoundError, CheckpointError):
        return None


def _attempts(pattern: re.Pattern[str], names: Iterable[str]) -> set[int]:
    return {int(m["attempt"]) for m in map(pattern.fullmatch, names) if m}
