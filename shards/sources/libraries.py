"""Libraries that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from shards.errors import DataError


def library(module: str, what: str) -> Any:
    """A module that reading `what` needs. DataError names package and remedy where it is not there.

    It is imported when it is needed, so that commands that need it not begin quickly.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"reading {what} needs the package {package} ({error}): install it, or all of these "
            "with `pip install 'lxscale[formats]'`"
        ) from None
