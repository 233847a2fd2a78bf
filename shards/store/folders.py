"""Folders that belong to a process while it lives, and are swept when it is dead."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

# Seconds after which a folder without a lock is nobody's.
_ABANDONED_S = 600

Keep = Callable[[Path], bool]


def _keep_none(_folder: Path) -> bool:
    return False


@contextlib.contextmanager
def owned_folder(parent: Path, prefix: str, keep: Keep = _keep_none) -> Iterator[Path]:
    """A new folder `<prefix>…` in `parent`, with nothing in it but `lock`; removed at the end, and
    with it what had to be made of `parent`, if that is then empty.

    First, other folders of the prefix are removed whose processes are dead, however they ended,
    unless `keep` says otherwise. A block that renames its folder keeps it from being removed at
    the end, and has `keep` decide for how long.
    """
    owner = os.getpid()
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, prefix, keep)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with open(folder / "unlocked", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when this process ends
            # It gets its name once it is held: a free lock is a dead process's.
            os.rename(folder / "unlocked", folder / "lock")
            yield folder
    finally:
        if os.getpid() == owner:  # and not a forked child, which drops what it has of the block
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                for above in made:
                    above.rmdir()


def sweep(parent: Path, prefix: str, keep: Keep = _keep_none) -> None:
    """Remove the folders of a prefix whose processes are dead, but for those to `keep`."""
    for folder in abandoned(parent, prefix, keep):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(parent: Path, prefix: str, keep: Keep = _keep_none) -> Iterator[Path]:
    """The folders of a prefix whose processes are dead, each locked until the next is asked for."""
    for folder in parent.glob(f"{prefix}*"):
        try:
            if keep(folder):
                continue
            with open(folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder
        except FileNotFoundError:
            # Made again by a process that outlived the folder; or just being made.
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                    yield folder
        except OSError:
            log.debug("%s is in use, or not ours", folder)
