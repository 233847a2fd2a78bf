"""moto's S3 with conditional writes that are one step: python -m tests.moto_server

moto looks whether there is an object, and writes, in two, so now and then two of several writers
win.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from moto.server import DomainDispatcherApplication, main

CONDITIONS = ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH")
_plain = DomainDispatcherApplication.__call__
_turn = threading.Lock()


def _one_by_one(self: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    conditional = environ["REQUEST_METHOD"] == "PUT" and not environ.keys().isdisjoint(CONDITIONS)
    with _turn if conditional else nullcontext():
        answer: Iterable[bytes] = _plain(self, environ, start_response)
        return answer


if __name__ == "__main__":
    with patch.object(DomainDispatcherApplication, "__call__", _one_by_one):
        main()
