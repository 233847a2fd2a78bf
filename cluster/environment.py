"""What workers on other nodes have to know of the driver's environment.

It goes to them as an argument of the actor's, never as a runtime_env, which Ray's dashboard and
logs show: some of it is secret.
"""

from __future__ import annotations

import os

PASSED_ON = ("AWS_", "LXSCALE_")
"""Variables that are passed on begin so."""


def passed_on() -> dict[str, str]:
    """Those of this process."""
    return {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}


_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def take(environment: dict[str, str]) -> None:
    """Put what a driver has passed on into this process's environment.

    S3 is seen as the driver sees it: its AWS_* replace the node's, credentials as one set, but for
    names of files that are not here. Of LXSCALE_* the node's own count, as the folder of its cache.
    """
    if _CREDENTIALS[0] in environment:
        for key in _CREDENTIALS:
            os.environ.pop(key, None)
    for key, value in environment.items():
        if not key.startswith("AWS_"):
            os.environ.setdefault(key, value)
        elif not value.startswith("/") or os.path.exists(value):
            os.environ[key] = value
