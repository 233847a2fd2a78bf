"""What lies at a data set's place and nothing refers to any more: said, and removed when asked.

That is what builds leave that are replaced, killed, or cut off from their store. A build that is
still at work looks the same. So nothing is removed before the manifest has been written anew, with
one more in its count of cleanings: a build that began before then can no longer commit, and one
that begins later has a folder that is not on the list. Where there is no data set, a manifest that
says no more than that takes its place.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, replace

from shards.errors import DataError, NotFoundError
from shards.format.manifest import MANIFEST, Manifest, new_tombstone, parse_manifest, tombstone
from shards.format.staging import killed, remove_folders
from shards.progress import Progress, no_progress
from shards.store import objects
from shards.store.create import replace_bytes
from shards.store.objects import Listed

# What builds write, each in its folder. Whatever else is in a folder of that name makes it
# somebody else's.
_FOLDER = re.compile(r"(build-[a-f][0-9a-f]{7})/(.+)", re.DOTALL)
_IN_FOLDER = re.compile(
    r"shard-(?:[0-9a-f]{8}-)?\d{6,}\.(tar|table\.safetensors|part\.json)"
    r"|shards-(?:[0-9a-f]{8}-)?\d{6,}\.safetensors|vocab\.txt|answers\.json|\.[^/]+\.tmp"
)
# What builds wrote before each had a folder: shards, each with its table, and with them the others.
_SHARD = re.compile(r"(shard-\d{6})\.(tar|table\.safetensors)")
_WITH_SHARDS = {"vocab.txt", "answers.json"}
# What marked them. All these only beside a manifest.
_MARKS = {".unfinished", ".publishing"}
# What an index has beside the tars of others; never these (shards/tools/index.py).
_OF_INDEX = re.compile(
    r"index-[a-f][0-9a-f]{7}-(?:[A-Za-z0-9_][A-Za-z0-9_.\-]*\.table\.safetensors"
    r"|shards-\d{6,}\.safetensors|vocab\.txt|answers\.json)"
)
# What any build tries the store with, and writes a manifest by.
_BRIEFLY = re.compile(r"probe-[0-9a-f]{16}|\.manifest\.json\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Leftovers:
    """What can go."""

    objects: list[Listed]
    tag: str | None
    """Of the manifest that does not refer to them."""
    young: int
    """Others that nothing refers to, which stay for their age, or for the data set's."""
    manifest: Manifest | None
    cleaned: int
    """How often the place was cleaned before."""


def leftovers(url: str, older: float = 0.0) -> Leftovers:
    """What lies at `url` and its manifest does not refer to, written more than `older` hours ago;
    nothing where the manifest is not that old, as runs may read what it has replaced.

    DataError where the manifest cannot be read or names what is not there: what belongs to the data
    set is not known then. DataError where no build has ever been.
    """
    tag, manifest, cleaned = _manifest(url)
    # Listed after the manifest was read: what a build commits meanwhile has another tag.
    found = objects.list_tree(url)
    named = _named(manifest) if manifest else set()
    if lost := sorted(named - {o.name for o in found}):
        raise DataError(
            f"the manifest of {url} names {len(lost):,} files that are not there, {lost[0]} the "
            "first: restore them or it; nothing was removed"
        )
    of_builds, dead = _of_builds(found, tag), killed(url)
    ours = [
        o
        for o in found
        if o.name not in named and (o.name in of_builds or o.name.partition("/")[0] in dead)
    ]
    if tag is None and not ours:
        raise DataError(f"no data set at {url}, and nothing that a build has left there")
    before = time.time() - older * 3600
    old = [o for o in ours if o.modified <= before]
    if manifest and older and any(o.name == MANIFEST and o.modified > before for o in found):
        old = []
    return Leftovers(old, tag, len(ours) - len(old), manifest, cleaned)


def _of_builds(found: list[Listed], tag: str | None) -> set[str]:
    """The names of what builds have written."""
    names = {o.name for o in found}
    parts = {name: match for name in names if (match := _FOLDER.fullmatch(name))}
    others = {m[1] for m in parts.values() if not _IN_FOLDER.fullmatch(m[2])}
    out = {name for name, m in parts.items() if m[1] not in others}
    out |= {name for name in names if _BRIEFLY.fullmatch(name) or _OF_INDEX.fullmatch(name)}
    if tag is not None:
        # Somebody's own tars, of which a data set was made, have no tables.
        stems = {m[1] for name in names if (m := _SHARD.fullmatch(name))}
        pairs = [{f"{stem}.tar", f"{stem}.table.safetensors"} for stem in stems]
        if whole := [pair for pair in pairs if pair <= names]:
            out = out.union(*whole, _WITH_SHARDS & names)
        out |= _MARKS & names
    return out


def _manifest(url: str) -> tuple[str | None, Manifest | None, int]:
    """The manifest's tag, the data set's manifest, and how often the place was cleaned."""
    try:
        data, tag = objects.read_tagged(objects.join(url, MANIFEST))
    except NotFoundError:
        return None, None, 0
    if (cleaned := tombstone(data)) is not None:
        return tag, None, cleaned
    manifest = parse_manifest(data, url)
    return tag, manifest, manifest.cleaned


def _named(manifest: Manifest) -> set[str]:
    """The objects of a data set."""
    shards = manifest.shards
    names = [n.decode() for n in (*shards.name.tolist(), *shards.table.tolist())]
    names += [f.file for f in (manifest.vocab, manifest.answers, *manifest.pages)]
    return {f"{manifest.folder}/{n}" if manifest.folder else n for n in names}


def clean(url: str, found: Leftovers, progress: Progress = no_progress) -> None:
    """Remove leftovers. DataError where a build has committed since they were listed, and where
    some cannot be removed."""
    if not found.objects:
        return
    where, count = objects.join(url, MANIFEST), found.cleaned + 1
    # No other cleaning's: of two at once the second, whose list is older than a build that came
    # between, must not take the first one's fence for its own.
    fence = secrets.token_hex(8)
    if found.manifest:
        data = replace(found.manifest, cleaned=count, fence=fence).to_json()
    else:
        data = new_tombstone(count, fence)
    if not replace_bytes(where, data, found.tag):
        raise DataError(
            f"{where} has changed meanwhile: nothing was removed; run the command again"
        )
    urls, left = [objects.join(url, old.name) for old in found.objects], []
    for i, old in enumerate(urls, 1):
        try:
            objects.delete(old)
        except (DataError, OSError) as error:
            left.append(f"{old}: {error}")
        progress("objects removed", i, len(urls))
    remove_folders(urls)
    if left:
        raise DataError(f"{len(left):,} objects could not be removed, the first {left[0]}")
