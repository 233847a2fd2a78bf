"""What pages to look at have in common: one file, no network, no markup out of data.

All that comes from the data is in a page as base64 of compressed bytes, which is no markup whatever
the data says; the script shows it as text and never as markup, and the page's policy allows that
script alone and no network.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import importlib.resources
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from shards.errors import DataError
from shards.store.atomic import written_whole


@contextlib.contextmanager
def page_file(given: Path) -> Iterator[IO[bytes]]:
    """The file of a page, to be written; it is at its place at the end of the block, or, if that
    raises, what was there before. DataError where it cannot be written."""
    path = Path(os.path.realpath(given))  # renaming would replace a link, not what it is to
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no plain file"
        raise DataError(f"{given} is {what}: name a file for the page")
    try:
        with written_whole(path) as temporary, open(temporary, "wb") as f:
            yield f
            f.flush()
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path}: {error.strerror or error}"
        ) from None


def check_pictures(folder: Path | None) -> None:
    """DataError where a folder of pictures is named that is none."""
    if folder and not folder.is_dir():
        raise DataError(f"there is no folder of pictures {folder}: name one, or none")


def frame(package: str, title: str, scripts: Sequence[str]) -> tuple[str, str]:
    """What a page has before its data and after it: `page.html` of a package, filled with its
    `page.css` and its scripts in this order, which go on from `common.css` and `common.js` here."""
    style = _part(__package__, "common.css") + _part(package, "page.css")
    script = "".join([_part(__package__, "common.js"), *(_part(package, s) for s in scripts)])
    values = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "policy": f"default-src 'none'; img-src blob:; script-src '{_hash(script)}'; "
        f"style-src '{_hash(style)}'; base-uri 'none'; form-action 'none'",
    }
    head, tail = _part(package, "page.html").split("{data}")
    return _filled(head, values), _filled(tail, values)


def data_element(kind: str, payload: bytes) -> str:
    """Bytes as an element of class `kind`, which the script unpacks."""
    text = base64.b64encode(zlib.compress(payload, 6)).decode()
    return f'<script type="text/plain" class="{kind}">{text}</script>\n'


def as_json(document: Any) -> bytes:
    """A document for the script."""
    return json.dumps(document, separators=(",", ":")).encode()


def with_header(header: Any, parts: list[bytes]) -> bytes:
    """A header in JSON after its length (u32, little-endian), then some bytes, each of which begins
    at a multiple of 4 if their lengths are such."""
    head = as_json(header)
    head += b" " * (-len(head) % 4)
    return b"".join([len(head).to_bytes(4, "little"), head, *parts])


def _part(package: str, name: str) -> str:
    return (importlib.resources.files(package) / name).read_text("utf-8")


def _filled(template: str, values: dict[str, str]) -> str:
    """A template with its `{name}`s replaced, all at once: what a value has is left alone."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def _hash(text: str) -> str:
    """For the page's policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
