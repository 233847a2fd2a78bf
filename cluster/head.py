"""The head of a Ray cluster at the address that a user gives: whether it can be joined from here.

Ray itself would try for a minute or more and print a page; here each fault is one line, in time.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import grpc
import ray
import ray._private.services as services
from ray._private.authentication import authentication_token_setup as tokens
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster.bounded import StillBusyError, bounded
from cluster.errors import AgainError, LaunchError
from cluster.nodes import greet
from shards.urls import shown

# Seconds for a head that is being started; the last try begins then. A try takes no longer than the
# three below together.
_REACH_S = 10.0
_RESOLVE_S, _ANSWER_S = 5.0, 4.0
_USUAL_PORT = 6379

TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to one secret, for `ray start` on every node and "
    "for this command (or copy the head's ~/.ray/auth_token to each)"
)


class _NotYetError(Exception):
    """What a head that is being started may mend."""


def reach(address: str, asked: Callable[[], bool]) -> str:
    """The address as host:port, once a Ray head that can be joined answers there.

    asked: whether a stop has been. Raises LaunchError within some 20 s, AgainError after a stop.
    """
    host, port = host_and_port(address)
    until = time.monotonic() + _REACH_S
    while True:
        try:
            return _checked(host, port)
        except _NotYetError as error:
            if asked():
                raise AgainError("stopped while Ray was starting") from None
            if time.monotonic() > until:
                raise _cannot(address, str(error)) from None
        time.sleep(0.2)


def host_and_port(address: str) -> tuple[str, int]:
    """The host and the port of Ray's head. LaunchError where the address has another form."""
    remedy = f"give HOST:PORT of its head (Ray's usual port is {_USUAL_PORT}), or auto"
    if address == "auto":
        address = _of_this_machine()
    if address == "local":
        raise _cannot(address, "for a Ray of this machine alone leave --ray-address out")
    if address.startswith("ray://"):
        raise _cannot(address, f"Ray Client does not do here; on a node of the cluster, {remedy}")
    if address.startswith(("http://", "https://")):
        raise _cannot(
            address, f"that is a dashboard's, where `lxscale submit` goes to; to join, {remedy}"
        )
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    good = host and "/" not in host and port.isascii() and port.isdigit()
    if not good or not 0 < int(port) < 2**16:
        raise _cannot(address, f"that is no address; {remedy}")
    return host, int(port)


def _of_this_machine() -> str:
    """What `auto` stands for."""
    try:
        found = bounded(lambda: services.canonicalize_bootstrap_address("auto"), _REACH_S)
    except Exception:  # ConnectionError where there is none
        found = None
    if not found:
        raise _cannot(
            "auto",
            "no Ray runs on this machine: begin with `ray start`, or give HOST:PORT of the head",
        )
    return str(found)


def _checked(host: str, port: int) -> str:
    """host:port. Raises _NotYetError, or LaunchError for what no waiting mends."""
    try:
        addresses = bounded(lambda: _resolve(host, port), _RESOLVE_S)
    except StillBusyError:
        raise _NotYetError(f"the name {host} is not resolved within {_RESOLVE_S:g} s") from None
    except (OSError, UnicodeError) as error:
        raise _NotYetError(f"the name {host} is not known ({error})") from None
    try:
        if not _tls():
            greet(addresses[0], port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise _NotYetError(f"{why}; is this the address of its head?") from None
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    _ask(where)
    if not _is_node(where):
        raise _NotYetError(
            f"no node of it is on this machine: begin with `ray start --address={where}` here, or "
            "run the command on one of its nodes"
        )
    return where


def _resolve(host: str, port: int) -> list[str]:
    return [str(a[4][0]) for a in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _ask(where: str) -> None:
    """Ask the head whether it lives: what answers may be another service, of another version, or
    one that wants a token. Where one is at hand it is used, as Ray does for `auto` alone."""
    try:
        reply = _call(where, "CheckAlive", _message("CheckAliveRequest"))
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            loader = tokens.AuthenticationTokenLoader.instance()
            given = tokens.AUTH_MODE_ENV_VAR in os.environ
            if not given and loader.has_token(ignore_auth_mode=True):
                tokens._enable_token_auth()
                return _ask(where)
            raise _cannot(where, f"it asks for a token that is not here; {TOKEN_REMEDY}") from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise _NotYetError(
                "another kind of server answers there; is this the address of its head?"
            ) from None
        raise _NotYetError(f"no answer of its head ({error.code().name.lower()})") from None
    except ray.exceptions.AuthenticationError:
        raise _cannot(where, f"RAY_AUTH_MODE=token, and no token is here; {TOKEN_REMEDY}") from None
    if reply.ray_version and reply.ray_version != ray.__version__:
        raise _cannot(
            where,
            f"it runs Ray {reply.ray_version}, and here is {ray.__version__}: install the same "
            "versions on all nodes",
        )


def _is_node(where: str) -> bool:
    """Whether one of this machine's Rays, of which there may be several, is of this cluster: Ray
    would wait a minute for it."""
    here = services.find_node_ids()
    if not here:
        return False
    question = _message("GetAllNodeInfoRequest")
    for node in here:
        question.node_selectors.add().node_id = bytes.fromhex(node)
    try:
        found = _call(where, "GetAllNodeInfo", question).node_info_list
    except grpc.RpcError as error:
        raise _NotYetError(f"no answer of its head ({error.code().name.lower()})") from None
    return any(node.state == 0 for node in found)  # ALIVE of GcsNodeInfo's states


def _message(name: str) -> Any:
    return vars(gcs_service_pb2)[name]()


def _call(where: str, method: str, question: Any) -> Any:
    """The head's answer. Raises grpc.RpcError, AuthenticationError without a token."""
    channel = init_grpc_channel(where, options=[("grpc.enable_http_proxy", 0)])
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        return getattr(stub, method)(question, timeout=_ANSWER_S)
    finally:
        channel.close()


def _cannot(address: str, why: str) -> LaunchError:
    return LaunchError(f"cannot join Ray at {shown(address)}: {why}")
