"""The record of what a run has consumed: one line a step, kept with the checkpoints.

A line says how many pairs a step took, at what world size, and a digest of what the ranks really
trained on; a segment of lines begins with the sampler state that it starts from. Segments are
immutable objects, and a generation's manifest names all that lead to it: steps that were done and
lost in a crash are in nobody's history. `lxscale shards audit` proves a record (trainer/audit.py).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.order.draws import I64, draw
from shards.store import objects

FORMAT = "lxscale-record-1"
FOLDER = "record"


def digest(position: I64, pair: I64, sentence: I64) -> int:
    """A 64-bit number for pairs shown with sentences at positions of the run, i64 (n,) each.

    Digests of slices add up, modulo 2^64, to the digest of the whole, whatever the slices.
    """
    return int(draw(0, position, pair, sentence).sum(dtype=np.uint64))


def to_limbs(number: int) -> list[float]:
    """Four pieces of 16 bits: sums of them over any number of ranks are exact in float64."""
    return [float(number >> shift & 0xFFFF) for shift in (0, 16, 32, 48)]


def from_limbs(limbs: list[float]) -> int:
    return sum(int(limb) << 16 * i for i, limb in enumerate(limbs)) % (1 << 64)


@dataclass
class Journal:
    """Rank 0's account. `entries`: committed segments; `lines`: steps since; `header`: what a
    segment's lines are to be read with; `start`: sampler state before the first line."""

    header: dict[str, Any]
    entries: list[dict[str, Any]]
    start: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """line: step, pairs, world, digest, and the sampler state after it as `state`."""
        self.lines.append(line)

    def write(self, run_url: str, attempt: int, step: int) -> tuple[list[dict[str, Any]], int]:
        """Write the lines up to `step` as a segment; the entries with it, and how many lines."""
        lines = [line for line in self.lines if line["step"] <= step]
        if not lines:
            return self.entries, 0
        head = {"format": FORMAT, **self.header, "start": self.start}
        shown = [{k: v for k, v in line.items() if k != "state"} for line in lines]
        data = "".join(json.dumps(x, separators=(",", ":")) + "\n" for x in [head, *shown]).encode()
        first = lines[0]["step"]
        name = f"step-{first:08d}-{step:08d}-a{attempt:06d}-{secrets.token_hex(4)}.jsonl"
        objects.write_bytes(objects.join(run_url, "checkpoints", FOLDER, name), data)
        entry = {
            "name": name,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "first": first,
            "last": step,
        }
        return [*self.entries, entry], len(lines)

    def committed(self, entries: list[dict[str, Any]], lines: int) -> None:
        """A generation with these entries exists now: its lines need not be kept."""
        if lines:
            self.start = self.lines[lines - 1]["state"]
        self.entries = entries
        del self.lines[:lines]
