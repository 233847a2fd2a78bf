"""The bytes of a manifest and of a journal's segment are those that earlier versions wrote."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.order.sampler import SamplerState
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import (
    CheckpointManifest,
    ObjectEntry,
    SegmentEntry,
    Span,
    manifest_bytes,
    parse_manifest,
)
from trainer.checkpoint.journal import Journal, SegmentHead, StepLine, read_segments

# Written by the version before this file, from the same values.
MANIFEST = (
    b'{"format": "lxscale-checkpoint-2", "world_size": 2, "zero_stage": 1, "parameters": {"a": '
    b'[4, 3], "b": [5]}, "config": {"train": {"steps": 8, "lr": 0.0001}, "tags": []}, '
    b'"data_state": {"order": 2, "data.weights": [null]}, "objectives": {"qa": 1.0}, '
    b'"vocab_sha256": "c0", "answers_sha256": "c1", "sampler": {"consumed": 13, "cursors": [13], '
    b'"mismatched": [6], "steps": [1], "skipped": [[2, 5]], "skipped_pairs": 4}, "step": 2, '
    b'"attempt": 7, "objects": [{"name": "o0", "size": 9, "sha256": "d0", "fragments": [["a", 0, '
    b'8]]}, {"name": "o1", "size": 9, "sha256": "d1", "fragments": [["a", 8, 4], ["b", 0, 5]]}], '
    b'"record": [{"name": "step-00000001-00000002-a000007-abababab.jsonl", "size": 328, "sha256": '
    b'"a2942bfc727c4662ac7d199a84e65429c7ee3104cdd9b0742bd022a1b3396d35", "first": 1, "last": 2}], '
    b'"sha256": "c0c038e5f273ff58718b62c92708edf24796291ce9d1717406c2b53118129409"}'
)
SEGMENT = (
    b'{"format":"lxscale-record-1","data":["data/set"],"data_state":{"order":2,"data.weights":'
    b'[null]},"start":{"consumed":0,"cursors":[0],"mismatched":[0],"steps":[0],"skipped":[],'
    b'"skipped_pairs":0}}\n'
    b'{"step":1,"pairs":13,"world":2,"digest":"00ff00ff00ff00ff"}\n'
    b'{"step":2,"pairs":13,"world":2,"digest":"123456789abcdef0","skipped":[2]}\n'
)

START = SamplerState(0, (0,), (0,), (0,))
AFTER = SamplerState(13, (13,), (6,), (1,), ((2, 5),), 4)
DATA_STATE = {"order": 2, "data.weights": [None]}
ENTRY = SegmentEntry(
    "step-00000001-00000002-a000007-abababab.jsonl",
    len(SEGMENT),
    hashlib.sha256(SEGMENT).hexdigest(),
    1,
    2,
)
VALUES = CheckpointManifest(
    world_size=2,
    zero_stage=1,
    parameters={"a": [4, 3], "b": [5]},
    config={"train": {"steps": 8, "lr": 1e-4}, "tags": []},
    data_state=DATA_STATE,
    objectives={"qa": 1.0},
    vocab_sha256="c0",
    answers_sha256="c1",
    sampler=AFTER,
    step=2,
    attempt=7,
    objects=(
        ObjectEntry("o0", 9, "d0", (Span("a", 0, 8),)),
        ObjectEntry("o1", 9, "d1", (Span("a", 8, 4), Span("b", 0, 5))),
    ),
    journal=(ENTRY,),
)
LINES = [StepLine(1, 13, 2, 0x00FF00FF00FF00FF), StepLine(2, 13, 2, 0x123456789ABCDEF0, (2,))]


def test_a_manifest_is_written_and_read_to_the_byte() -> None:
    assert manifest_bytes(VALUES) == MANIFEST
    assert parse_manifest(MANIFEST, "url") == VALUES


def test_skipped_updates_are_kept() -> None:
    some = replace(VALUES, skipped_updates=1)
    assert parse_manifest(manifest_bytes(some), "url") == some


def test_a_segment_is_written_and_read_to_the_byte(tmp_path: Path) -> None:
    run = str(tmp_path)
    journal = Journal(("data/set",), DATA_STATE, (), START)
    for line, after in zip(LINES, (START, AFTER), strict=True):
        journal.add(line, after)
    (entry,) = journal.write(run, 7, 2)
    written = SEGMENT.replace(b'_pairs":0}}', b'_pairs":0},"digest":2}')
    assert Path(entry.url(run)).read_bytes() == written
    assert (entry.size, entry.sha256) == (len(written), hashlib.sha256(written).hexdigest())
    assert (entry.first, entry.last) == (ENTRY.first, ENTRY.last)
    # The digests of an earlier version's segments are of its kind.
    Path(ENTRY.url(run)).write_bytes(SEGMENT)
    assert list(read_segments(run, [entry, ENTRY])) == [
        (SegmentHead(("data/set",), DATA_STATE, START, 2), LINES),
        (SegmentHead(("data/set",), DATA_STATE, START, 1), LINES),
    ]


def test_steps_leave_the_journal_when_a_generation_names_them(tmp_path: Path) -> None:
    """Steps that were done while a segment was written are in the next one."""
    run = str(tmp_path)
    journal = Journal(("data/set",), DATA_STATE, (), START)
    journal.add(LINES[0], AFTER)
    journal.write(run, 7, 1)  # not committed: its step is written again
    first = journal.write(run, 7, 1)
    journal.add(LINES[1], AFTER)
    journal.committed(first)
    both = journal.write(run, 7, 2)
    journal.committed(both)
    assert journal.write(run, 7, 2) == both
    head, last = list(read_segments(run, both))
    assert head[1] == LINES[:1] and last == (
        SegmentHead(("data/set",), DATA_STATE, AFTER, 2),
        LINES[1:],
    )


def hashed(document: dict[str, Any]) -> bytes:
    """A manifest whose own hash is right, whatever it says."""
    body = json.dumps({k: v for k, v in document.items() if k != "sha256"}, sort_keys=True)
    return json.dumps(document | {"sha256": hashlib.sha256(body.encode()).hexdigest()}).encode()


def test_what_is_wrong_with_a_manifest_is_named() -> None:
    good = json.loads(MANIFEST)
    entry = good["objects"][0]
    for data, message in (
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (hashed(good | {"format": "lxscale-checkpoint-1"}), "'lxscale-checkpoint-1', this lxscale"),
        (
            hashed(good | {"format": "lxscale-checkpoint-3"}),
            r"newer lxscale \(format lxscale-checkpoint-3\): upgrade",
        ),
        (MANIFEST.replace(b'"step": 2', b'"step": 3'), "its own hash does not match"),
        # What no field holds is covered by the hash, too.
        (MANIFEST.replace(b'"qa": 1.0}', b'"qa": 1.0}, "extra": 1'), "its own hash does not match"),
        (hashed({k: v for k, v in good.items() if k != "record"}), "record: Field required"),
        (hashed(good | {"step": "2"}), "step: Input should be a valid integer"),
        (hashed(good | {"objects": [entry | {"size": None}]}), r"objects\.0\.size: Input"),
    ):
        with pytest.raises(CheckpointError, match=f"^the/url.*{message}"):
            parse_manifest(data, "the/url")
    assert parse_manifest(hashed(good | {"extra": 1}), "url") == VALUES


def test_what_is_wrong_with_a_segment_is_named(tmp_path: Path) -> None:
    run = str(tmp_path)
    path = Path(ENTRY.url(run))
    path.parent.mkdir(parents=True)
    for data, message in (
        (b"", "not a JSON object"),
        (SEGMENT.replace(b"record-1", b"record-0"), "format 'lxscale-record-0', this lxscale"),
        (SEGMENT.replace(b'"pairs":13', b'"pairs":"x"'), "pairs: Input should be"),
        (SEGMENT.replace(b"00ff00ff00ff00ff", b"zz"), "digest: "),
    ):
        path.write_bytes(data)
        entry = SegmentEntry(path.name, len(data), hashlib.sha256(data).hexdigest(), 1, 2)
        with pytest.raises(CheckpointError, match=f"{path.name}: .*{message}"):
            list(read_segments(run, [entry]))
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
            list(read_segments(run, [ENTRY]))
