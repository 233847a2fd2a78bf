"""Nodes of the Ray cluster that a run should not use."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import ray

from cluster.bounded import StillBusyError, bounded

# Seconds for a node's answer, and for that of Ray's head.
_CONNECT_S, _ANSWER_S = 2.0, 5.0
# The beginning of HTTP/2 with no settings, which every gRPC server answers.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def unreachable(nodes: Iterable[str]) -> frozenset[str]:
    """Those of the nodes whose Ray does not answer. Ray's own list says so only after its
    health checks, some 15 s later, and until then places workers there."""
    suspects = set(nodes)
    if not suspects:
        return frozenset()
    with contextlib.suppress(ray.exceptions.RayError, StillBusyError):
        asked = [n for n in bounded(ray.nodes, _ANSWER_S) if n["NodeID"] in suspects]
        with ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(lambda n: n["Alive"] and _answers(n), asked))
        return frozenset(n["NodeID"] for n, ok in zip(asked, answers, strict=True) if not ok)
    return frozenset()


def _answers(node: dict) -> bool:
    """Whether its raylet speaks: one that is stopped still takes connections."""
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        with socket.create_connection(address, _CONNECT_S) as s:
            s.sendall(_HELLO)
            s.recv(1)
    except OSError:
        return False
    return True
