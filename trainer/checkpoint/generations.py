"""Committed checkpoints: list, find, and read whole or in part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from shards.errors import NotFoundError
from shards.store import objects
from trainer.checkpoint.chain import list_links, read_link
from trainer.checkpoint.errors import CheckpointError, NewerFormatError
from trainer.checkpoint.format import (
    KINDS,
    MANIFEST_PATTERN,
    CheckpointManifest,
    Entry,
    Span,
    checkpoint_url,
    sha256_of,
)

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Generation:
    """One committed checkpoint."""

    run_url: str
    name: str
    """Of the manifest's file."""
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def url(self) -> str:
        return checkpoint_url(self.run_url, self.name)


# --- finding ------------------------------------------------------------------------------------


def generations(run_url: str) -> Iterator[Generation | str]:
    """Committed generations, newest first; a str says what is wrong with a damaged manifest.

    Raises NewerFormatError when there is one of a newer format before all that are whole.
    """
    for _, found in named_generations(run_url):
        yield found


def named_generations(run_url: str) -> Iterator[tuple[str, Generation | str]]:
    """As `generations`, each with its manifest's name.

    The last link of an attempt that is not the last is a claim, by its name; there is one for each
    attempt, and they are not read. Unless nothing else is whole: in a copy without claims these
    are generations, too.
    """
    links, manifests = list_links(run_url)
    ends = {link.attempt: link for link in links}
    claims = [link for link in ends.values() if link != links[-1]]
    # A later attempt descends from the earlier ones.
    ranked = [((link.attempt, 1, link.index), link.name) for link in set(links).difference(claims)]
    for m in filter(None, map(MANIFEST_PATTERN.fullmatch, manifests)):
        ranked.append(((int(m["attempt"]), 0, int(m["step"])), m[0]))
    whole = False
    for _, name in sorted(ranked, reverse=True):
        try:
            found = _read_generation(run_url, name)
        except NotFoundError:
            continue  # an owner has pruned it since
        except NewerFormatError as error:
            if not whole:
                raise
            yield name, str(error)
        except CheckpointError as error:
            yield name, str(error)
        else:
            whole = whole or found is not None
            if found:
                yield name, found
    for link in [] if whole else sorted(claims, reverse=True):
        try:
            found = _read_generation(run_url, link.name)
        except NewerFormatError:
            raise
        except (NotFoundError, CheckpointError):
            continue
        if found:
            yield link.name, found


def run_and_manifest(path: str) -> tuple[str, str | None]:
    """A run's folder or URL, and the manifest's name if `path` is one of its. CheckpointError where
    it is a manifest of no run."""
    if not path.endswith(".json"):
        return path, None
    # A relative path may begin below the run's folder.
    local = objects.local_path(path)
    folder, _, name = (os.path.abspath(local) if local else path).rpartition("/")
    run_url = folder.removesuffix("/checkpoints")
    if run_url == folder:
        raise CheckpointError(f"{path} is not in a run's folder")
    return run_url, name


def find_generation(path: str) -> Generation:
    """The generation named by a run's folder or URL (its newest) or by a manifest's.

    Raises CheckpointError when there is none, or the one that is named is damaged.
    """
    run_url, name = run_and_manifest(path)
    if name:
        try:
            named = _read_generation(run_url, name)
        except NotFoundError as error:
            raise CheckpointError(str(error)) from None
        if named is None:
            raise CheckpointError(f"{path} is the claim of an attempt, not a checkpoint")
        return named
    problems = []
    for candidate in generations(path):
        if isinstance(candidate, Generation):
            return candidate
        problems.append(candidate)
    raise CheckpointError("; ".join(problems) or no_checkpoint(path))


def no_checkpoint(path: str) -> str:
    return f"no checkpoint under {path}: name a run's folder or a manifest"


def _read_generation(run_url: str, name: str) -> Generation | None:
    """The generation of that name; None for a claim."""
    link = read_link(run_url, name)
    return Generation(run_url, name, link) if isinstance(link, CheckpointManifest) else None


# --- reading ------------------------------------------------------------------------------------


def read_entry(run_url: str, entry: Entry) -> bytes:
    """Read and verify what a manifest names; CheckpointError names it when it is not whole,
    DataError when the store cannot be reached."""
    url = entry.url(run_url)
    try:
        data = objects.read_bytes(url)
    except NotFoundError as error:
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
