"""The journal of what a run has consumed: one line a step, kept with the checkpoints.

A line says how many pairs a step took, at what world size, and a digest of what the ranks really
trained on; a segment of lines begins with the sampler state that it starts from. Segments are
immutable objects, and a generation's manifest names all that lead to it: steps that were done and
lost in a crash are in nobody's history. `lxscale shards audit` proves a journal (trainer/audit.py).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, ValidationError

from shards.order.sampler import SamplerState
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import (
    SegmentEntry,
    parse_document,
    segment_name,
    sha256_of,
    what_is_wrong,
)
from trainer.checkpoint.generations import read_entry
from trainer.data.digest import VERSION as DIGEST

log = logging.getLogger("lxscale")

FORMAT = "lxscale-record-1"


# --- sums over ranks ----------------------------------------------------------------------------


def to_limbs(number: int) -> list[float]:
    """Four pieces of 16 bits: sums of them over any number of ranks are exact in float64."""
    return [float(number >> shift & 0xFFFF) for shift in (0, 16, 32, 48)]


def from_limbs(limbs: list[float]) -> int:
    return sum(int(limb) << 16 * i for i, limb in enumerate(limbs)) % (1 << 64)


# --- what a segment holds -----------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentHead:
    """The first line of a segment: what its steps are to be read with."""

    data: tuple[str, ...]
    """URLs of the data sets, as the run opened them."""
    data_state: dict[str, Any]
    """As in the manifest (`RunDescription`)."""
    start: SamplerState
    """Before the segment's first step."""
    digest: int = 1
    """Version of its lines' digests (trainer/data/digest.py)."""


# As hexadecimal text: readers of JSON need not keep integers above 2^53 exact.
Hex64 = Annotated[
    int,
    BeforeValidator(lambda text: int(str(text), 16)),
    PlainSerializer(lambda number: f"{number:016x}", return_type=str),
]


@dataclass(frozen=True)
class StepLine:
    """What all ranks together trained on in one step."""

    step: int
    """Steps of the run, this one included."""
    pairs: int
    """Positions taken, those that were passed over included."""
    world: int
    digest: Hex64
    """Of the pairs that were really there."""
    skipped: tuple[int, ...] = ()
    """Shards that were passed over, under data.on_error=skip. Not written when there are none."""
    seconds: float | None = None
    """That the step took on rank 0, the wait for its data included; None in older journals."""


_HEAD: TypeAdapter[SegmentHead] = TypeAdapter(SegmentHead)
_LINE: TypeAdapter[StepLine] = TypeAdapter(StepLine)


def _segment_bytes(head: SegmentHead, lines: Iterable[StepLine]) -> bytes:
    documents = [{"format": FORMAT, **_HEAD.dump_python(head)}]
    documents += [_LINE.dump_python(line, exclude_defaults=True) for line in lines]
    return "".join(json.dumps(d, separators=(",", ":")) + "\n" for d in documents).encode()


def read_segments(
    run_url: str, entries: Iterable[SegmentEntry]
) -> Iterator[tuple[SegmentHead, list[StepLine]]]:
    """Read and verify segments, one at a time; CheckpointError names the one that is damaged."""
    for entry in entries:
        yield _parse_segment(read_entry(run_url, entry), entry.url(run_url))


def verify_behind(run_url: str, entries: Sequence[SegmentEntry]) -> threading.Thread:
    """Read and verify segments in a thread, behind the training: the weights do not depend on them,
    and they grow in number with every save. A warning names those that are not whole."""

    def verify() -> None:
        damaged, problem = [], ""
        for entry in entries:
            try:
                read_entry(run_url, entry)
            except CheckpointError as error:
                damaged.append(entry)
                problem = problem or str(error)
        if damaged:
            steps = ", ".join(f"{entry.first}-{entry.last}" for entry in damaged[:5])
            log.warning(
                "%d of the %d segments of the journal are not whole (%s): training goes on, as the "
                "weights are, but until they are restored no audit can prove steps %s%s",
                len(damaged),
                len(entries),
                problem,
                steps,
                ", …" if len(damaged) > 5 else "",
            )

    thread = threading.Thread(target=verify, name="lxscale-journal", daemon=True)
    thread.start()
    return thread


def _parse_segment(data: bytes, url: str) -> tuple[SegmentHead, list[StepLine]]:
    head, *lines = data.splitlines() or [b""]
    parse_document(head, url, FORMAT)
    try:
        return (
            _HEAD.validate_json(head, strict=True),
            [_LINE.validate_json(line, strict=True) for line in lines],
        )
    except ValidationError as error:
        raise CheckpointError(f"{url}: not a journal: {what_is_wrong(error)}") from None


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JournalPart:
    """The account of a run up to some step."""

    segments: tuple[SegmentEntry, ...]
    """On the store."""
    start: SamplerState
    """After the last step of the segments."""
    lines: tuple[StepLine, ...]
    """The steps since."""


@dataclass
class Journal:
    """Rank 0's account of the run: the segments so far, and the steps since."""

    data: tuple[str, ...]
    """URLs of the data sets."""
    data_state: dict[str, Any]
    segments: tuple[SegmentEntry, ...]
    """Those that the newest generation names."""
    start: SamplerState
    """After the last step of the segments."""
    _since: list[tuple[StepLine, SamplerState]] = field(default_factory=list, init=False)
    """Steps that no generation holds yet, each with the state after it."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    """Saves take note of theirs in a thread."""

    def add(self, line: StepLine, after: SamplerState) -> None:
        """Note a step that was done, and the sampler state after it."""
        self._since.append((line, after))

    def part(self) -> JournalPart:
        """The account up to the last step that was added."""
        with self._lock:
            return JournalPart(self.segments, self.start, tuple(line for line, _ in self._since))

    def go_on(self, part: JournalPart) -> None:
        """Take up the account of a snapshot, whose steps no generation holds yet."""
        after, self.segments, self.start = self.start, part.segments, part.start
        # The next segment has all of them: of no step but the last one is the state needed.
        self._since = [(line, after) for line in part.lines]

    def write(self, run_url: str, attempt: int, step: int) -> tuple[SegmentEntry, ...]:
        """Write the steps up to `step` as a segment; the segments that a manifest is to name."""
        lines = [line for line, _ in self._since if line.step <= step]
        if not lines:
            return self.segments
        data = _segment_bytes(SegmentHead(self.data, self.data_state, self.start, DIGEST), lines)
        first, last = lines[0].step, lines[-1].step
        name = segment_name(first, last, attempt)
        entry = SegmentEntry(name, len(data), sha256_of(data), first, last)
        objects.write_bytes(entry.url(run_url), data)
        return (*self.segments, entry)

    def committed(self, segments: tuple[SegmentEntry, ...]) -> None:
        """A generation names these segments now: their steps need not be kept."""
        with self._lock:
            while segments and self._since and self._since[0][0].step <= segments[-1].last:
                _, self.start = self._since.pop(0)
            self.segments = segments
