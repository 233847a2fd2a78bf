"""The owner of a run: the one job that commits to it and prunes it (chain.py says how that is so).

    check_free      may this job claim the run?
    claim           become its owner
    Owner.commit    a generation; or StaleAttemptError, for ever, when somebody else has claimed it

Safety rests on the chain alone. Leases (lease.py) say whose turn it is: who takes a live owner for
dead stops it, and mixes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from shards.errors import DataError, NotFoundError
from shards.store import create, objects
from shards.store.retry import Retry
from trainer.checkpoint.chain import (
    Claim,
    Link,
    Traces,
    claim_bytes,
    list_links,
    parse_link,
    read_traces,
)
from trainer.checkpoint.errors import CheckpointError, OwnedError, StaleAttemptError
from trainer.checkpoint.format import (
    LINK_PATTERN,
    CheckpointManifest,
    Entry,
    ObjectEntry,
    SegmentEntry,
    checkpoint_url,
    job_lease_url,
    lease_url,
    manifest_bytes,
    now_utc,
)
from trainer.checkpoint.generations import Generation, named_generations
from trainer.checkpoint.lease import (
    OLD_CLAIM,
    ONE_TRY,
    Heart,
    Lease,
    Made,
    begin_job_lease,
    lease_bytes,
    parse_lease,
    read_lease,
    watch,
)
from trainer.checkpoint.line import Named, line_first
from trainer.checkpoint.process import Process, has_ended, this_process

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class Claimant:
    """Who wants to own a run."""

    job: str = field(default_factory=lambda: secrets.token_hex(8))
    """One for all attempts of a command: a later one supersedes an earlier one at once."""
    take_over: bool = False
    """From a live owner, too: the one that `check_free` meets first, and not from others later."""
    driver: Process | None = None
    """The command's own process: while it keeps the job's lease, the run has an owner, though its
    workers be lost at the moment."""
    over: int = 0
    """The owners of attempts up to this one were found dead, or are to be taken over."""
    remedy: str = (
        "wait for its end, give this one another run.name, or take the run from it with --take-over"
    )
    """What to do where a live owner has it."""


# --- claiming -----------------------------------------------------------------------------------


def check_free(run_url: str, claimant: Claimant) -> Claimant:
    """Raise OwnedError when a live owner has the run; the claimant, to whom it is free now.

    Reads only. An owner that may be alive is watched for some seconds.
    """
    return _check_free(read_traces(run_url), claimant)


def is_owned(traces: Traces) -> bool:
    """Whether the owner of the newest attempt lives, which takes some seconds to see where it does
    not say so itself."""
    try:
        _check_free(traces, Claimant())
    except OwnedError:
        return True
    return False


def claim(run_url: str, claimant: Claimant) -> Owner:
    """Own the run from now on. Raises OwnedError when a live owner has it, or has just taken it."""
    while True:
        traces = read_traces(run_url)
        _check_free(traces, claimant)
        link = traces.next
        mine = Claim(
            link.attempt + 1,
            claimant.job,
            secrets.token_hex(8),
            this_process(),
            now_utc(),
            claimant.driver,
        )
        url = checkpoint_url(run_url, link.name)
        created = create.create_bytes(url, claim_bytes(mine))
        # After a pause before that, the name may have been free again: then there are later links.
        if created and list_links(run_url)[0][-1:] == [link]:
            if claimant.driver:
                begin_job_lease(run_url, claimant.job)
            return Owner(run_url, mine)
        # Somebody was quicker.


def _check_free(traces: Traces, claimant: Claimant) -> Claimant:
    attempt = traces.attempt
    if attempt <= claimant.over:
        return claimant
    free = replace(claimant, take_over=False, over=attempt)
    mark, names = traces.claim_of(attempt), traces.leases_of(attempt)
    if claimant.take_over or not (mark or names):
        return free
    url = lease_url(traces.run_url, lease_name(mark) if mark else names[-1])
    urls = [url, job_lease_url(traces.run_url, mark.job)] if mark and mark.driver else [url]
    before = [read_lease(u) for u in urls]
    if not _may_live(before, url, mark, claimant):
        return free
    now = watch(urls, before)
    # One that is removed is of a job that has ended.
    rewritten = any(n and n != b for n, b in zip(now, before, strict=True))
    if not rewritten or not _may_live(now, url, mark, claimant):
        return free
    said = mark or _said(now[0], url)
    raise OwnedError(
        f"the run {traces.run_url} is owned by a live job ({said.who if said else url}; attempt "
        f"{attempt}): {claimant.remedy}"
    )


def _may_live(leases: list[bytes], url: str, mark: Claim | None, claimant: Claimant) -> bool:
    """Whether an owner has to be watched. leases: its attempt's, at `url`, and its job's, where it
    may have one; empty if they are not there. mark: its claim, if that is known."""
    data, *job = leases
    if data == OLD_CLAIM:
        return False  # it would never change
    said = _said(data, url) or mark
    if said is None:
        return True
    # The job of an attempt that has ended may be about to begin another one.
    ended = isinstance(said, Lease) and said.state == "ended" and not any(job)
    process = mark.driver if mark and mark.driver else said.process
    return not (ended or said.job == claimant.job or has_ended(process))


def _said(data: bytes, url: str) -> Lease | None:
    """The lease; None for one that is damaged: that it changes can be seen all the same."""
    try:
        return parse_lease(data, url) if data else None
    except CheckpointError:
        return None


# --- owning -------------------------------------------------------------------------------------


class Owner:
    """The job that began the run's newest attempt. Make one by `claim`; `close` it at the end.

    One thread at a time may call `commit`.
    """

    def __init__(self, run_url: str, mark: Claim) -> None:
        """mark: its claim, which is the last link."""
        self.run_url, self.attempt = run_url, mark.attempt
        self._mark = mark
        self._next = Link(mark.attempt, 1)
        self._tried: dict[bytes, CheckpointManifest] = {}
        self._step: int | None = None
        self.made: Made | None = None
        """What its leases say that it has done."""
        self._beats = 0
        self._lost: str | None = None
        self._swept = False
        self._heart = Heart(self._beat)
        try:
            # Nobody else commits or prunes from here on: what there is stays known without a look.
            self._known = list(named_generations(run_url))
        except BaseException:
            self.close()
            raise

    @property
    def known(self) -> list[Named]:
        """The run's generations, newest first, each with its manifest's name."""
        return list(self._known)

    @property
    def found(self) -> list[Generation | str]:
        """The run's generations, newest first, as `generations` gives them."""
        return [found for _, found in self._known]

    @property
    def token(self) -> str:
        """Of its claim: no other attempt, of whatever life of the run, has it."""
        return self._mark.token

    def lost(self) -> str | None:
        """Who has taken the run over, as a message; None as long as that is not known. Does not
        block: the store is asked at every beat of the lease."""
        return self._lost

    def close(self) -> None:
        """Say that the attempt has ended: the next one need not wait."""
        self._heart.stop()

    def commit(self, manifest: CheckpointManifest, keep: int) -> Generation:
        """Make a generation visible by creating its manifest, then remove what it makes
        superfluous.

        Everything that the manifest names must have been written. Raises StaleAttemptError, and
        writes nothing, when another attempt has begun.
        """
        swept, self._swept = self._swept, False
        data = manifest_bytes(manifest)
        self._tried[data] = manifest
        while not create.create_bytes(self._url(), data):
            # A commit that failed for want of an answer may have been carried out after all.
            found = self._tried.get(_content(self._url()))
            if found is None:
                self._lost = self._who()
                raise StaleAttemptError(self._lost)
            self._add(found)
            self._tried[data] = manifest
        # The name may have been free again: of an earlier try without an answer, which a successor
        # went on from and removed at last. Then there is its claim. A commit of which that cannot
        # be told is as one without an answer.
        after = Link(self.attempt, self._next.index + 1)
        if _read_claim(self.run_url, after):
            self._lost = self._who(after)
            raise StaleAttemptError(self._lost)
        generation = self._add(manifest)
        try:
            # What the run has left to go on from an earlier one goes before what that came from.
            self._known = line_first(self._known)
            self._drop(self._known[keep:], manifest.step, swept)
        except DataError as error:
            log.warning(
                "%s is committed; what it makes superfluous stays: %s", generation.url, error
            )
        return generation

    def remove(self, names: Collection[str]) -> None:
        """Remove generations by their manifests' names, and what none of the others names. One that
        is whole and newer than all of them must stay: else their names, which are free then, might
        be those of the run's newest generation (chain.py). A kill in between leaves the others
        whole, and objects that the next owner removes. Raises DataError where the store is away."""
        self._drop([known for known in self._known if known[0] in names], step=-1, swept=False)

    def _url(self) -> str:
        return checkpoint_url(self.run_url, self._next.name)

    def _add(self, manifest: CheckpointManifest) -> Generation:
        """Note a generation that was committed as the next link."""
        generation = Generation(self.run_url, self._next.name, manifest)
        self._known.insert(0, (generation.name, generation))
        self._tried.clear()
        self._next = Link(self.attempt, self._next.index + 1)
        first, self._step = self._step is None, manifest.step
        if first:
            self._heart.soon()
        return generation

    def _drop(self, dropped: list[Named], step: int, swept: bool) -> None:
        """Remove generations, and what dead attempts left uncommitted.

        step: of the newest commit. swept: the commit before did all of this, so of segments, whose
        names grow more as the run goes on, only those can be superfluous that `dropped` names.
        """
        gone = {name for name, _ in dropped}
        kept = [(name, found) for name, found in self._known if name not in gone]
        for name, found in dropped:
            # What is damaged may be a claim: its name must stay taken.
            if isinstance(found, Generation) or not LINK_PATTERN.fullmatch(name):
                objects.delete(checkpoint_url(self.run_url, name))
        self._known = kept
        if any(isinstance(found, str) for _, found in kept):
            return  # remove no object that a damaged manifest might name
        used = {e.name for e in _entries(kept)}
        for kind in (ObjectEntry, SegmentEntry):
            if kind is SegmentEntry and swept:
                names = [e.name for e in _entries(dropped) if isinstance(e, SegmentEntry)]
            else:
                names = objects.list_names(checkpoint_url(self.run_url, kind.folder))
            for name in names:
                if name not in used and self._is_left_over(kind, name, step):
                    objects.delete(checkpoint_url(self.run_url, kind.folder, name))
        self._swept = True

    def _is_left_over(self, kind: type[Entry], name: str, step: int) -> bool:
        """Whether what no kept generation names is nobody's any more: of an earlier attempt, or of
        this one's saves up to the step that is committed. Later steps are saves under way, later
        attempts another owner's."""
        m = kind.pattern.fullmatch(name)
        if m is None:
            return False
        attempt = int(m["attempt"])
        return attempt < self.attempt or (attempt == self.attempt and int(m["step"]) <= step)

    def _who(self, link: Link | None = None) -> str:
        """What to say when a link, the next one by default, is somebody else's."""
        other = _read_claim(self.run_url, link or self._next)
        text = f"attempt {other.attempt} ({other.who})" if other else "another attempt"
        return (
            f"attempt {self.attempt} of {self.run_url} is stale: {text} has started since; this "
            "one stops and commits nothing more"
        )

    def _beat(self, ended: bool) -> None:
        """Rewrite the lease, and see whether somebody has claimed the run."""
        if self._lost:
            return
        self._beats += 1
        lease = Lease(
            self.attempt,
            self._mark.job,
            self._mark.process,
            self._mark.since,
            self._beats,
            self._step,
            "ended" if ended else "running",
            self.made,
            time.time(),
        )
        url = lease_url(self.run_url, lease_name(self._mark))
        with contextlib.suppress(DataError):
            objects.write_bytes(url, lease_bytes(lease), ONE_TRY, durable=False)
        # Our own commit may put a generation there at this moment.
        if not ended and _read_claim(self.run_url, self._next, ONE_TRY):
            self._lost = self._who()


def lease_name(mark: Claim) -> str:
    return f"{mark.attempt:06d}-{mark.token}.json"


def _entries(known: list[Named]) -> Iterator[Entry]:
    """What generations name; each segment is named by many."""
    for _, found in known:
        if isinstance(found, Generation):
            yield from found.manifest.objects
            yield from found.manifest.journal


def _content(url: str) -> bytes:
    """Of a link that is there, or was."""
    try:
        return objects.read_bytes(url)
    except NotFoundError:
        return b""


def _read_claim(run_url: str, link: Link, retry: Retry | None = None) -> Claim | None:
    """The claim that a link is; None where it is none, or not there."""
    url = checkpoint_url(run_url, link.name)
    try:
        found = parse_link(objects.read_bytes(url, retry), url)
    except (NotFoundError, CheckpointError):
        return None
    return found if isinstance(found, Claim) else None
