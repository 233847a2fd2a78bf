"""JSON files that users give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.errors import DataError


def read_list(path: str | Path, what: str) -> list[Any]:
    """The list in a JSON file; DataError naming `what` it is and the file where there is none."""
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the {what} {path} is not JSON: {error}") from None
    if not isinstance(document, list):
        raise DataError(f"the {what} {path} is not a list")
    return document
