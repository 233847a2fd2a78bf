"""Data sets of older versions and layouts → the present one.

`_FORMATS` has a row for each format there was: what turns a data set of it into one of the present.
So far there is one, `lxscale-1`. Before builds had folders of their own, its files lay right beside
the manifest; records cannot be added to such a data set, nor can it be replaced while it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from shards.errors import DataError, NotFoundError
from shards.format.manifest import FORMAT, MANIFEST, Manifest, load_manifest
from shards.format.publish import is_index
from shards.progress import Progress, no_progress
from shards.store import objects
from shards.tools.transfer import transfer

Migration = Callable[[str, str, bool, Path | None, Progress], Manifest | None]
"""(url, out, overwrite, staging, progress) → what is at `out` now; None where nothing was to be
done."""


def migrate(
    url: str,
    out: str,
    *,
    overwrite: bool = False,
    staging: Path | None = None,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Write the data set at `url` to `out` in the present format and layout; None, and nothing
    written, where it has these already. `out` may be `url`, with `overwrite`.

    Raises DataError for a format that this lxscale does not know, and for what is missing or
    damaged; what is whole then stays for the same command to go on with.
    """
    try:
        document = json.loads(objects.read_bytes(objects.join(url, MANIFEST)))
    except NotFoundError as error:
        raise DataError(f"no data set at {url}: {error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{objects.join(url, MANIFEST)} is not a manifest ({error}): restore it"
        ) from None
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(found, str) or found not in _FORMATS:
        raise DataError(
            f"{url} has format {found!r:.80}, and this lxscale knows {', '.join(_FORMATS)}: use a "
            "later version"
        )
    return _FORMATS[found](url, out, overwrite, staging, progress)


def _present(
    url: str, out: str, overwrite: bool, staging: Path | None, progress: Progress
) -> Manifest | None:
    """Files right beside the manifest get a folder of their own; they stay as they are."""
    manifest = load_manifest(url)
    if manifest.folder or is_index(manifest):
        return None
    made = transfer(url, out, overwrite=overwrite, staging=staging, anew=True, progress=progress)
    return made.manifest


_FORMATS: Mapping[str, Migration] = {FORMAT: _present}
