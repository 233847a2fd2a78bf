"""Files in a node's cache that are made from others: verified like what they were made from.

Beside each lies its seal, a small file with its size and sha256. A file that is not as its seal
says, or has none, is made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from shards.errors import DataError, NodeError, explained
from shards.store.atomic import written_whole
from shards.store.cache import hashed_file, is_local, local_file
from shards.store.locks import locked
from shards.store.stored import StoredFile

log = logging.getLogger("lxscale")


def derived_file(path: Path, cache: Path, build: Callable[[Path], None]) -> Path:
    """The file `path`, verified as every file of the cache is. Where it is missing or damaged,
    `build(temporary path)` makes it: one process of the node does, and nobody sees it half-written.

    path: named by all that it is made from.
    """
    with explained(path):
        if (sealed := sealed_file(path)) and is_local(sealed, cache):
            return path
        with locked(path.parent, path.name):
            # Another process may have made it meanwhile.
            if (sealed := sealed_file(path)) and path.exists():
                try:
                    return local_file(sealed, cache)
                except NodeError:
                    raise
                except DataError as error:
                    log.warning("%s: it is made again", error)
            # Unsealed until it is whole under its name.
            seal_of(path).unlink(missing_ok=True)
            with written_whole(path, alone=True) as temporary:
                build(temporary)
            made = hashed_file(path, cache)
            with written_whole(seal_of(path), alone=True) as temporary:
                temporary.write_text(json.dumps([made.size, made.sha256]))
            return path


def seal_of(path: Path) -> Path:
    """Where the seal of a file is."""
    return path.with_name(f"{path.name}.seal")


def sealed_file(path: Path) -> StoredFile | None:
    """The file as its seal describes it; None where there is no good seal."""
    try:
        size, sha256 = json.loads(seal_of(path).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if type(size) is not int or not isinstance(sha256, str):
        return None
    return StoredFile(str(path), sha256, size)
