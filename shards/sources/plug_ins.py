"""Formats of somebody else's, named by the path of a module with a `FORMAT`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TypeVar

from shards.errors import DataError

F = TypeVar("F")


def plug_in(name: str, kind: type[F], what: str, ours: Iterable[str]) -> F:
    """The format of `what` in a module; DataError where there is none, with the names of ours."""
    if "." not in name:
        raise DataError(
            f"there is no format of {what} {name!r:.40}: choose one of {', '.join(ours)}, or give "
            "the path of a module that has a FORMAT"
        )
    try:
        found = importlib.import_module(name).FORMAT
    except (ImportError, AttributeError) as error:
        raise DataError(f"{name} is no module with a FORMAT of {what}: {error}") from None
    if not isinstance(found, kind):
        raise DataError(f"{name}.FORMAT is a {type(found).__name__}, no {kind.__name__}")
    return found
