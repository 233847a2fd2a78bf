"""URLs as people may see them."""

from __future__ import annotations

import re

# A name and a password may have any signs in them: they end at the last @. What has no password,
# or a host's port there, ends at the last @ before the path.
_USER = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:(?<=s3://)[^\s/:@]*:\S*|[^\s/:@]*:(?!\d+/)\S*|[^\s/]*)@"
)
_QUERY = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://[^\s?#]*[?#])[^\s\"']*=[^\s\"']*[^\s\"':;,.)]")


def shown(text: object) -> str:
    """A URL, or a text with URLs in it, without what may be secret there: users' names, passwords
    and queries, of which `…` is left. Everything that is said, logged or raised goes through it."""
    return _QUERY.sub(r"\1…", _USER.sub(r"\1…@", str(text)))
