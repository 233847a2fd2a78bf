"""Committed checkpoints: commit, prune, list, find, and read whole or in part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from shards.errors import DataError
from shards.store import objects
from trainer.checkpoint.attempts import check_not_stale
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import (
    KINDS,
    MANIFEST_PATTERN,
    CheckpointManifest,
    Entry,
    ObjectEntry,
    SegmentEntry,
    Span,
    checkpoint_url,
    manifest_bytes,
    manifest_name,
    parse_manifest,
    sha256_of,
)

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Generation:
    """One committed checkpoint."""

    run_url: str
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def name(self) -> str:
        return manifest_name(self.manifest)

    @property
    def url(self) -> str:
        return checkpoint_url(self.run_url, self.name)


# --- committing ---------------------------------------------------------------------------------


def commit(run_url: str, manifest: CheckpointManifest, keep: int) -> Generation:
    """Make a generation visible by writing its manifest, then remove what it makes superfluous.

    Everything that the manifest names must have been written. Raises StaleAttemptError, and writes
    nothing, when a later attempt has started.
    """
    check_not_stale(run_url, manifest.attempt)
    generation = Generation(run_url, manifest)
    objects.write_bytes(generation.url, manifest_bytes(manifest))
    prune(run_url, keep, manifest.attempt)
    return generation


def prune(run_url: str, keep: int, attempt: int) -> None:
    """Keep the newest generations; remove older ones and what dead attempts left uncommitted."""
    names = _manifest_names(run_url)
    for name in names[keep:]:
        objects.delete(checkpoint_url(run_url, name))
    used = set()
    for name in names[:keep]:
        try:
            manifest = _read_generation(run_url, name).manifest
        except CheckpointError:
            return  # a damaged manifest: remove no object that it might name
        used |= {entry.name for entry in (*manifest.objects, *manifest.journal)}
    newest = max((int(m["step"]) for m in map(MANIFEST_PATTERN.fullmatch, names) if m), default=0)
    for kind in (ObjectEntry, SegmentEntry):
        for name in objects.list_names(checkpoint_url(run_url, kind.folder)):
            m = kind.pattern.fullmatch(name)
            # An object of this attempt that is not yet in a manifest may be a save under way.
            if m and name not in used and (int(m["attempt"]) < attempt or int(m["step"]) < newest):
                objects.delete(checkpoint_url(run_url, kind.folder, name))


# --- finding ------------------------------------------------------------------------------------


def generations(run_url: str) -> Iterator[Generation | str]:
    """Committed generations, newest first; a str says what is wrong with a damaged manifest."""
    for name in _manifest_names(run_url):
        try:
            yield _read_generation(run_url, name)
        except CheckpointError as error:
            yield str(error)


def find_generation(path: str) -> Generation:
    """The generation named by a run's folder or URL (its newest) or by a manifest's.

    Raises CheckpointError when there is none, or the one that is named is damaged.
    """
    if path.endswith(".json"):
        # A relative path may begin below the run's folder.
        local = objects.local_path(path)
        folder, _, name = (os.path.abspath(local) if local else path).rpartition("/")
        run_url = folder.removesuffix("/checkpoints")
        if run_url == folder:
            raise CheckpointError(f"{path} is not in a run's folder")
        return _read_generation(run_url, name)
    problems = []
    for candidate in generations(path):
        if isinstance(candidate, Generation):
            return candidate
        problems.append(candidate)
    raise CheckpointError(
        "; ".join(problems) or f"no checkpoint under {path}: name a run's folder or a manifest"
    )


def _manifest_names(run_url: str) -> list[str]:
    """Names of manifests, newest first: a later attempt descends from the earlier ones."""
    names = objects.list_names(checkpoint_url(run_url))
    found = [m for m in map(MANIFEST_PATTERN.fullmatch, names) if m]
    found.sort(key=lambda m: (int(m["attempt"]), int(m["step"])), reverse=True)
    return [m[0] for m in found]


def _read_generation(run_url: str, name: str) -> Generation:
    url = checkpoint_url(run_url, name)
    try:
        return Generation(run_url, parse_manifest(objects.read_bytes(url), url))
    except DataError as error:
        raise CheckpointError(str(error)) from None


# --- reading ------------------------------------------------------------------------------------


def read_entry(run_url: str, entry: Entry) -> bytes:
    """Read and verify what a manifest names; CheckpointError names it when it is not whole."""
    url = entry.url(run_url)
    try:
        data = objects.read_bytes(url)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if len(data) != entry.size or sha256_of(data) != entry.sha256:
        raise CheckpointError(f"{url} is damaged: size or sha256 differ from the manifest's")
    return data


def read_fragments(
    generation: Generation, wanted: Sequence[Span]
) -> Iterator[tuple[int, int, dict[str, F32]]]:
    """Yield (which of `wanted`, start within it, {kind: values}) until all of it is covered.

    A span may come in several pieces, in any order. Only objects that hold a wanted element are
    read, one at a time. Raises CheckpointError when an object is damaged or an element is missing.
    """
    by_name: dict[str, list[int]] = {}
    for i, span in enumerate(wanted):
        by_name.setdefault(span.name, []).append(i)
    covered = [0] * len(wanted)
    for entry in generation.manifest.objects:
        arrays: dict[str, F32] | None = None
        offset = 0
        for name, start, length in entry.fragments:
            for i in by_name.get(name, ()):
                begin = max(start, wanted[i].start)
                end = min(start + length, wanted[i].start + wanted[i].length)
                if begin < end:
                    if arrays is None:
                        arrays = safetensors.numpy.load(read_entry(generation.run_url, entry))
                    source = slice(offset + begin - start, offset + end - start)
                    yield i, begin - wanted[i].start, {k: arrays[k][source] for k in KINDS}
                    covered[i] += end - begin
            offset += length
    for span, have in zip(wanted, covered, strict=True):
        if have != span.length:
            raise CheckpointError(
                f"{generation.url}: {span.length - have} elements of {span.name} are missing"
            )


def load_weights(generation: Generation) -> dict[str, F32]:
    """The fp32 weights of every parameter, whole, by name."""
    shapes = generation.manifest.parameters
    wanted = [Span(name, 0, int(np.prod(shape))) for name, shape in shapes.items()]
    flat = {span.name: np.empty(span.length, dtype=np.float32) for span in wanted}
    for i, start, values in read_fragments(generation, wanted):
        part = values["master"]
        flat[wanted[i].name][start : start + len(part)] = part
    return {name: flat[name].reshape(shape) for name, shape in shapes.items()}
