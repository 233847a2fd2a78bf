"""Nodes of the Ray cluster that a run should not use."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

import ray

_CONNECT_S = 1.0


def unreachable(nodes: Iterable[str]) -> frozenset[str]:
    """Those of the nodes whose Ray takes no connection. Ray's own list says so only after its
    health checks, some 15 s later, and until then places workers there."""
    suspects = set(nodes)
    found = set()
    with contextlib.suppress(ray.exceptions.RayError):
        for node in ray.nodes():
            if node["NodeID"] in suspects and not (node["Alive"] and _answers(node)):
                found.add(node["NodeID"])
    return frozenset(found)


def _answers(node: dict) -> bool:
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        socket.create_connection(address, _CONNECT_S).close()
    except OSError:
        return False
    return True
