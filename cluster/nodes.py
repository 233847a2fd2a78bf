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
# The beginning of HTTP/2 with no settings, which every gRPC server answers with its own: the length
# of a frame's head, and the kind that it begins with (RFC 9113, 3.4 and 4.1).
_FRAME, _SETTINGS = 9, b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, *_SETTINGS, 0, 0, 0, 0, 0])


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
    try:
        greet(node["NodeManagerAddress"], node["NodeManagerPort"])
    except OSError:
        return False
    return True


def greet(host: str, port: int) -> None:
    """Raises OSError where nothing takes a connection or answers, ConnectionRefusedError where what
    answers does not speak as Ray does."""
    with socket.create_connection((host, port), _CONNECT_S) as s:
        s.sendall(_HELLO)
        answer = s.recv(_FRAME, socket.MSG_WAITALL)
    if answer[3:4] != _SETTINGS:
        raise ConnectionRefusedError("another kind of server answers there")
