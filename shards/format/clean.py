"""What lies at a data set's place and nothing refers to any more: said, and removed when asked.

That is what builds leave that are replaced, killed, or cut off from their store. A build that is
still at work looks the same. So nothing is removed before the manifest has been written anew, with
one more in its count of cleanings: a build that began before then can no longer commit, and one
that begins later has a folder that is not on the list. Where there is no data set, a manifest that
says no more than that takes its place.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace

from shards.errors import DataError, NotFoundError
from shards.format.manifest import FORMAT, MANIFEST, Manifest, parse_manifest
from shards.format.staging import remove
from shards.progress import Progress, no_progress
from shards.store import objects
from shards.store.create import replace_bytes
from shards.store.objects import Listed

# What builds write, now and before each had a folder; other files at the place are somebody else's.
_OURS = re.compile(
    r"build-[0-9a-f]{8}/.+|shard-\d{6}\.(tar|table\.safetensors)|vocab\.txt|answers\.json"
    r"|\.(unfinished|publishing)"
)


@dataclass(frozen=True)
class Leftovers:
    """What can go."""

    objects: list[Listed]
    tag: str | None
    """Of the manifest that does not refer to them."""
    manifest: Manifest | None
    cleaned: int
    """How often the place was cleaned before."""


def leftovers(url: str, older: float = 0.0) -> Leftovers:
    """What lies at `url` and its manifest does not refer to, written more than `older` hours ago.
    DataError where the manifest cannot be read: what it refers to is not known then."""
    tag, manifest, cleaned = _manifest(url)
    # Listed after the manifest was read: what a build commits meanwhile has another tag.
    found = objects.list_tree(url)
    named = _named(manifest) if manifest else set()
    before = time.time() - older * 3600
    old = [
        o for o in found if _OURS.fullmatch(o.name) and o.name not in named and o.modified <= before
    ]
    return Leftovers(old, tag, manifest, cleaned)


def _manifest(url: str) -> tuple[str | None, Manifest | None, int]:
    """The manifest's tag, the data set's manifest, and how often the place was cleaned."""
    try:
        data, tag = objects.read_tagged(objects.join(url, MANIFEST))
    except NotFoundError:
        return None, None, 0
    try:
        manifest = parse_manifest(data, url)
    except NotFoundError:
        return tag, None, int(json.loads(data)["cleaned"])
    return tag, manifest, manifest.cleaned


def _named(manifest: Manifest) -> set[str]:
    """The objects of a data set."""
    shards = manifest.shards
    names = [n.decode() for n in (*shards.name.tolist(), *shards.table.tolist())]
    names += [f.file for f in (manifest.vocab, manifest.answers, *manifest.pages)]
    return {f"{manifest.folder}/{n}" if manifest.folder else n for n in names}


def clean(url: str, found: Leftovers, progress: Progress = no_progress) -> None:
    """Remove leftovers. DataError where a build has committed since they were listed."""
    if not found.objects:
        return
    where, count = objects.join(url, MANIFEST), found.cleaned + 1
    if found.manifest:
        fence = replace(found.manifest, cleaned=count).to_json()
    else:
        fence = (json.dumps({"format": FORMAT, "cleaned": count}) + "\n").encode()
    if not replace_bytes(where, fence, found.tag):
        raise DataError(
            f"{where} has changed meanwhile: nothing was removed; run the command again"
        )
    for i, old in enumerate(found.objects, 1):
        remove([objects.join(url, old.name)])
        progress("objects removed", i, len(found.objects))
