"""Checkpoints: immutable objects, one manifest as the only commit point, readable at any size.

    storage/name/attempts/000002-1f3a….json                  claimed when an attempt starts
    storage/name/checkpoints/objects/step-…-a…-r…-….safetensors   one a rank: its fragments
    storage/name/checkpoints/record/step-…-…-a…-….jsonl      what was consumed (journal.py)
    storage/name/checkpoints/step-00001000-a000002.json      the generation: written last

A generation exists when its manifest does and the manifest's own hash is right; no pointer says
which is newest. A restore walks the manifests from the newest and takes the first whose objects
are all whole. An attempt that finds a newer one at its commit is stale and stops.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.errors import DataError
from shards.store import objects
from trainer.checkpoint.journal import FOLDER as RECORD
from trainer.checkpoint.zero_state import KINDS, Fragment

FORMAT = "lxscale-checkpoint-2"
_MANIFEST = re.compile(r"^step-(\d+)-a(\d+)\.json$")
_OBJECT = re.compile(r"^step-(\d+)-a(\d+)-r(\d+)-[0-9a-f]+\.safetensors$")
_SEGMENT = re.compile(r"^step-\d+-(\d+)-a(\d+)-[0-9a-f]+\.jsonl$")
_ATTEMPT = re.compile(r"^(\d+)-([0-9a-f]+)\.json$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used for this run."""


@dataclass(frozen=True)
class Generation:
    """One committed checkpoint: where its run lives, and the parsed manifest."""

    run_url: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def attempt(self) -> int:
        return int(self.manifest["attempt"])

    @property
    def name(self) -> str:
        return _manifest_name(self.step, self.attempt)

    @property
    def url(self) -> str:
        return objects.join(self.run_url, "checkpoints", self.name)


def _manifest_name(step: int, attempt: int) -> str:
    return f"step-{step:08d}-a{attempt:06d}.json"


def _self_hash(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# --- attempts -----------------------------------------------------------------------------------


def claim_attempt(run_url: str) -> int:
    """Number this attempt: one above every earlier one. Two at once: one gets the number."""
    folder = objects.join(run_url, "attempts")
    number = 1 + max((n for n, _ in _attempts(folder)), default=0)
    token = secrets.token_hex(8)
    objects.write_bytes(objects.join(folder, f"{number:06d}-{token}.json"), b"{}")
    if min(t for n, t in _attempts(folder) if n == number) != token:
        raise CheckpointError(
            f"another job has just started the run {run_url}: give this one another run.name"
        )
    return number


def _attempts(folder: str) -> list[tuple[int, str]]:
    found = (_ATTEMPT.match(name) for name in objects.list_names(folder))
    return [(int(m[1]), m[2]) for m in found if m]


def check_not_stale(run_url: str, attempt: int) -> None:
    newest = max((n for n, _ in _attempts(objects.join(run_url, "attempts"))), default=attempt)
    if newest > attempt:
        raise CheckpointError(
            f"attempt {attempt} of {run_url} is stale: attempt {newest} has started since; "
            "this one stops and commits nothing"
        )


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A rank's fragments copied to host memory: for each kind one 1-D fp32 array."""

    index: list[tuple[str, int, int]]
    arrays: dict[str, NDArray[np.float32]]


def snapshot(fragments: list[Fragment], views: dict[str, list[Tensor]]) -> Snapshot:
    """Copy views (one per fragment, for each of KINDS) into host memory: the stall of a save."""
    arrays = {}
    for kind in KINDS:
        parts = views[kind]
        whole = torch.empty(sum(p.numel() for p in parts), dtype=torch.float32)
        if parts:
            torch.cat([p.detach().to("cpu", torch.float32) for p in parts], out=whole)
        arrays[kind] = whole.numpy()
    return Snapshot([(f.name, f.start, f.count) for f in fragments], arrays)


def write_object(
    run_url: str, step: int, attempt: int, rank: int, snap: Snapshot
) -> dict[str, Any]:
    """Upload a rank's part under a name no other attempt can use; its entry in the manifest."""
    name = f"step-{step:08d}-a{attempt:06d}-r{rank:05d}-{secrets.token_hex(4)}.safetensors"
    data = safetensors.numpy.save(snap.arrays)
    objects.write_bytes(objects.join(run_url, "checkpoints", "objects", name), data)
    return {
        "name": name,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "fragments": [list(entry) for entry in snap.index],
    }


def commit(run_url: str, manifest: dict[str, Any], keep: int) -> Generation:
    """Make a generation visible, then remove what it makes superfluous."""
    attempt = int(manifest["attempt"])
    check_not_stale(run_url, attempt)
    manifest = {"format": FORMAT, **manifest}
    manifest["sha256"] = _self_hash(manifest)
    generation = Generation(run_url, manifest)
    objects.write_bytes(generation.url, json.dumps(manifest).encode())
    prune(run_url, keep, attempt)
    return generation


def prune(run_url: str, keep: int, attempt: int) -> None:
    """Keep the newest generations; remove older ones and what dead attempts left uncommitted."""
    folder = objects.join(run_url, "checkpoints")
    names = _manifest_names(folder)
    for name in names[keep:]:
        objects.delete(objects.join(folder, name))
    used = set()
    for name in names[:keep]:
        generation = _read_manifest(run_url, name)
        if isinstance(generation, str):
            return  # a damaged manifest: remove no object that it might name
        used |= {o["name"] for o in generation.manifest["objects"]}
        used |= {o["name"] for o in generation.manifest["record"]}
    newest = max((int(m[1]) for m in map(_MANIFEST.match, names) if m), default=0)
    for inside, pattern in (("objects", _OBJECT), (RECORD, _SEGMENT)):
        for name in objects.list_names(objects.join(folder, inside)):
            m = pattern.match(name)
            # An object of this attempt that is not yet in a manifest may be a save under way.
            if m and name not in used and (int(m[2]) < attempt or int(m[1]) < newest):
                objects.delete(objects.join(folder, inside, name))


# --- reading ------------------------------------------------------------------------------------


def _manifest_names(folder: str) -> list[str]:
    """Names of manifests, newest first: a later attempt descends from the earlier ones."""
    found = [m for m in map(_MANIFEST.match, objects.list_names(folder)) if m]
    return [m[0] for m in sorted(found, key=lambda m: (int(m[2]), int(m[1])), reverse=True)]


def _read_manifest(run_url: str, name: str) -> Generation | str:
    """The generation, or what is wrong with its manifest."""
    url = objects.join(run_url, "checkpoints", name)
    try:
        manifest = json.loads(objects.read_bytes(url))
        if manifest.get("format") != FORMAT:
            return f"{url}: format {manifest.get('format')!r}, this lxscale reads {FORMAT!r}"
        if manifest["sha256"] != _self_hash(manifest):
            return f"{url}: its own hash does not match, it is damaged"
    except (ValueError, KeyError, AttributeError):
        return f"{url}: not a checkpoint manifest"
    return Generation(run_url, manifest)


def generations(run_url: str) -> Iterator[Generation | str]:
    """Committed generations, newest first; a str says what is wrong with a damaged manifest."""
    for name in _manifest_names(objects.join(run_url, "checkpoints")):
        yield _read_manifest(run_url, name)


def find_generation(path: str) -> Generation:
    """The generation named by a run's folder or URL (its newest) or by a manifest's."""
    if path.endswith(".json"):
        run_url, inside, name = path.rpartition("/checkpoints/")
        found = _read_manifest(run_url, name) if inside else f"{path} is not in a run's folder"
        if isinstance(found, str):
            raise CheckpointError(found)
        return found
    problems = []
    for candidate in generations(path):
        if isinstance(candidate, Generation):
            return candidate
        problems.append(candidate)
    raise CheckpointError(
        "; ".join(problems) or f"no checkpoint under {path}: name a run's folder or a manifest"
    )


def load_object(generation: Generation, entry: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Read, verify and parse one object; CheckpointError names it when it is not whole."""
    url = objects.join(generation.run_url, "checkpoints", "objects", entry["name"])
    try:
        data = objects.read_bytes(url)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{url} is damaged: size or sha256 differ from the manifest's")
    arrays: dict[str, NDArray[np.float32]] = safetensors.numpy.load(data)
    return arrays


def read_fragments(
    generation: Generation, wanted: list[tuple[str, int, int]]
) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
    """Yield (which wanted, start within it, {kind: values}) until every wanted run is covered.

    Only objects that hold a wanted element are read, one at a time. Raises CheckpointError when an
    object is damaged or the generation lacks an element.
    """
    by_name: dict[str, list[int]] = {}
    for i, (name, _, _) in enumerate(wanted):
        by_name.setdefault(name, []).append(i)
    covered = [0] * len(wanted)
    for entry in generation.manifest["objects"]:
        arrays: dict[str, NDArray[np.float32]] | None = None
        offset = 0
        for name, start, count in entry["fragments"]:
            for i in by_name.get(name, ()):
                _, want_start, want_count = wanted[i]
                begin = max(start, want_start)
                end = min(start + count, want_start + want_count)
                if begin < end:
                    if arrays is None:
                        arrays = load_object(generation, entry)
                    source = slice(offset + begin - start, offset + end - start)
                    yield i, begin - want_start, {k: arrays[k][source] for k in KINDS}
                    covered[i] += end - begin
            offset += count
    for (name, _, count), have in zip(wanted, covered, strict=True):
        if have != count:
            raise CheckpointError(
                f"{generation.url}: {count - have} elements of {name} are missing"
            )


def load_weights(generation: Generation) -> dict[str, NDArray[np.float32]]:
    """The fp32 weights of every parameter, whole, by name."""
    shapes: dict[str, list[int]] = generation.manifest["parameters"]
    wanted = [(name, 0, int(np.prod(shape))) for name, shape in shapes.items()]
    flat = {name: np.empty(count, dtype=np.float32) for name, _, count in wanted}
    for i, start, values in read_fragments(generation, wanted):
        part = values["master"]
        flat[wanted[i][0]][start : start + len(part)] = part
    return {name: flat[name].reshape(shape) for name, shape in shapes.items()}
